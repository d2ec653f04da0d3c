"""Recorded calls: what a pipeline gave comes back, whatever it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.errors import ArtifactError, ConfigError, ModelError
from mpqsearch.models import capture, discover, load_calls, save_calls
from mpqsearch.models.calls import Recorder, call_of
from mpqsearch.sampling import adapt
from tests.support import tiny_unet


class Odd(nn.Module):
    """Takes about everything that pipelines pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 6)
        self.text = nn.Linear(3, 6)
        self.outlet = nn.Linear(6, 4)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added: dict[str, Any] | None = None,
        shapes: list[tuple[int, int]] | None = None,
        cache: Any = None,
        return_dict: bool = True,
    ) -> Any:
        h = self.inlet(hidden_states) + self.text(encoder_hidden_states).mean(1, keepdim=True)
        if added is not None:
            h = h * added["scale"][0] + (added["on"] is True) + float(added["limit"] < 1e9)
        out = self.outlet(torch.relu(h) * torch.as_tensor(timestep).view(-1, 1, 1))
        return {"sample": out} if return_dict else (out,)


def run(model: nn.Module, steps: int, *, passes: int = 1, text: Tensor | None = None) -> list[Tensor]:
    """A pipeline in miniature: every step calls the model ``passes`` times."""
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for step in range(steps):
        for _ in range(passes):
            added = {"scale": [torch.full((1,), 2.0)], "on": True, "limit": float("inf"), 3: np.arange(2)}
            x = torch.randn(2, 5, 4, generator=generator)
            extra = {"added": added, "shapes": [(2, 3)], "return_dict": False}
            outputs.append(
                model(x, torch.tensor([100.0 - step]), encoder_hidden_states=torch.ones(2, 7, 3), **extra)[0]
            )
    return outputs


@torch.no_grad()
def test_calls_come_back_as_they_were_made(tmp_path: Path) -> None:
    model = Odd()
    with capture(model) as calls:
        outputs = run(model, 6)
    assert not model._forward_pre_hooks
    assert (len(calls), calls.seen, calls.model) == (6, 6, "Odd")
    save_calls(tmp_path / "calls.safetensors", calls)
    loaded = load_calls(tmp_path / "calls.safetensors")
    assert loaded.digest == calls.digest
    for source in (calls, loaded):
        assert [c.timestep for c in source] == [100.0 - i for i in range(6)]
        assert all(torch.equal(c.replay(model), out) for c, out in zip(source, outputs, strict=True))
    assert loaded[0].kwargs["shapes"] == [(2, 3)]
    assert loaded[0].kwargs["added"]["limit"] == float("inf")
    np.testing.assert_array_equal(loaded[0].kwargs["added"][3], [0, 1])
    # The prompt embedding of all steps is one object in memory and one tensor on disk.
    assert loaded[0].kwargs["encoder_hidden_states"] is loaded[5].kwargs["encoder_hidden_states"]
    assert calls[0].kwargs["encoder_hidden_states"] is calls[5].kwargs["encoder_hidden_states"]


@torch.no_grad()
def test_a_limit_keeps_every_timestep_and_draws_evenly_from_its_calls() -> None:
    model = Odd()
    counts: Counter[int] = Counter()
    for seed in range(60):
        with capture(model, limit=10, seed=seed) as calls:
            run(model, 5, passes=8)
        assert calls.seen == 40
        assert set(Counter(c.timestep for c in calls).values()) == {2}
        order = [c.sample[0, 0, 0].item() for c in calls]
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(2, 5, 4, generator=generator)[0, 0, 0].item() for _ in range(40)]
        counts.update(made.index(v) % 8 for v in order)
        assert [made.index(v) for v in order] == sorted(made.index(v) for v in order)
    # 600 draws over 8 places of a step: 75 each, standard deviation about 7 (less than binomial: without replacement).
    assert len(counts) == 8
    assert max(abs(n - 75) for n in counts.values()) < 35


@torch.no_grad()
def test_several_outputs_are_joined_and_a_learned_variance_is_dropped() -> None:
    class Two(nn.Module):
        def __init__(self, joined: bool) -> None:
            super().__init__()
            self.layer = nn.Conv2d(2, 4, 1)
            self.joined = joined

        def forward(self, sample: Tensor) -> Any:
            out = self.layer(sample)
            return out if self.joined else ([out, {"a": out[:, :1]}], torch.tensor(3))

    x = torch.randn(1, 2, 3, 3)
    one, many = Two(True), Two(False)
    assert call_of(one, (x,), {}).replay(one).shape == (1, 2, 3, 3)
    assert call_of(many, (x,), {}).replay(many).shape == (1, 4 * 9 + 9)


def test_bad_calls_say_what_to_do(tmp_path: Path) -> None:
    model = Odd()
    with pytest.raises(ModelError, match="was not called"), capture(model):
        pass
    with pytest.raises(ConfigError, match="at least 1"), capture(model, limit=0):
        pass
    with pytest.raises(ModelError, match="'cache' holds a builtins.object"), capture(model):
        model(torch.randn(1, 5, 4), 1.0, torch.ones(1, 7, 3), cache=object())
    with capture(model, leave_out=("cache",)) as calls:
        model(torch.randn(1, 5, 4), 1.0, torch.ones(1, 7, 3), cache=object())
    assert "cache" not in calls[0].kwargs
    with pytest.raises(ArtifactError, match="does not exist"):
        load_calls(tmp_path / "none.safetensors")
    path = tmp_path / "calls.safetensors"
    save_calls(path, calls)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="damaged"):
        load_calls(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ArtifactError, match="lacks the key 'schema'"):
        load_calls(path)


def test_a_module_is_adapted_and_discovered_with_its_calls() -> None:
    model = Odd()
    with torch.no_grad(), capture(model) as calls:
        run(model, 3)
    denoiser = adapt(model, calls=calls)
    table = discover(denoiser)
    assert {la.name: la.role for la in table} == {"inlet": "first", "text": "linear", "outlet": "last"}
    assert {la.name: la.macs for la in table} == {
        "inlet": 5 * 24,
        "text": 7 * 18,
        "outlet": 5 * 24,
    }  # of one of the two samples
    with pytest.raises(ModelError, match="sample_shape"):
        adapt(tiny_unet())


def test_half_precision_calls_follow_the_module() -> None:
    model = Odd().to(torch.bfloat16)
    with torch.no_grad(), capture(model) as calls:
        text = torch.ones(1, 7, 3, dtype=torch.bfloat16)
        model(torch.randn(1, 5, 4, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16), text)
    model.float()
    assert calls[0].replay(model).dtype == torch.float32


@torch.no_grad()
def test_what_is_recorded_and_dropped_leaves_memory() -> None:
    model = Odd()
    with capture(model, limit=2) as calls:
        run(model, 30)
    recorder = Recorder(2)
    for call in calls[:1]:
        for step in range(30):
            recorder.add(model, (call.sample + step, torch.tensor([1.0]), torch.ones(1, 2, 3)), {})
    assert recorder.seen == 30
    assert len(recorder._pool) <= 2 * 3


def test_times_are_found_by_name_however_they_are_given() -> None:
    model = Odd()
    text, when = torch.ones(1, 7, 3), torch.tensor([0.83])
    by_place = call_of(model, (torch.ones(1, 5, 4), when, text), {})
    by_name = call_of(model, (torch.ones(1, 5, 4),), {"timestep": when, "encoder_hidden_states": text})
    number = call_of(model, (torch.ones(1, 5, 4), 3, text), {})
    assert [round(c.timestep, 2) for c in (by_place, by_name, number)] == [0.83, 0.83, 3.0]
    assert [len(c.times(model)) for c in (by_place, by_name, number)] == [1, 1, 0]
