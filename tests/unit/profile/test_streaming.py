"""Profiles of the weights alone, from disk: the numbers of the loaded model, a layer at a time, kept as they are
finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mpqsearch.core import Budget, LayerSpec, Policy, QuantFormat
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.methods import MethodSpec, Programs, channel_losses, predicted_loss
from mpqsearch.models import StreamedModel, discover, discover_streamed, open_streamed
from mpqsearch.profile import Arrays, CalibrationSpec, Partial, profile_model, profile_weights
from mpqsearch.profile import streaming as module
from mpqsearch.sampling import SamplerSpec, load_model
from tests.support import tiny_denoiser
from tests.support.tiny import DDPM, tiny_unet

FMT = QuantFormat(n_candidates=20)
POLICY = Policy(widths=(2, 4, 8))
SCHEMES = ("asymmetric", "auto")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_unet().to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    (folder / "scheduler_config.json").write_text(json.dumps(DDPM))
    return open_streamed(str(folder))


def test_numbers_are_those_of_the_loaded_model(streamed: StreamedModel) -> None:
    table = discover_streamed(streamed)
    found = profile_weights(streamed, table, POLICY, SCHEMES, FMT)
    spec = CalibrationSpec(samples=2, probe_inputs=2, probes=1, schemes=SCHEMES, smooth=False)
    whole = profile_model(load_model(streamed.source, sampler=SamplerSpec(steps=2)), table, POLICY, spec, FMT)
    assert set(found.arrays) == {"kurtosis", "weight_rms", "weight_error/asymmetric", "weight_error/auto"}
    for key, array in found.arrays.items():
        np.testing.assert_allclose(array, whole.arrays[key], rtol=1e-5, err_msg=key)  # float32 sums in another order
    assert found.model_digest == whole.model_digest


def test_a_run_that_was_killed_continues_with_the_next_layer(
    streamed: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = discover_streamed(streamed)
    expected = profile_weights(streamed, table, POLICY, SCHEMES, FMT)
    names: list[str] = []
    real = module.layer_weights

    def counted(model: StreamedModel, layer: object, *args: object) -> object:
        if len(names) == 5:
            raise KeyboardInterrupt
        names.append(layer.name)  # type: ignore[attr-defined]
        return real(model, layer, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "layer_weights", counted)
    with pytest.raises(KeyboardInterrupt):
        profile_weights(
            streamed, table, POLICY, SCHEMES, FMT, partial=Partial(folder=tmp_path / "p", inputs={"a": "1"})
        )
    assert len(list((tmp_path / "p").glob("[0-9]*.npz"))) == 5
    done, names[:] = list(names), [""] * -len(names)
    monkeypatch.setattr(
        module, "layer_weights", lambda model, layer, *a: names.append(layer.name) or real(model, layer, *a)
    )
    seen: list[int] = []
    again = profile_weights(
        streamed,
        table,
        POLICY,
        SCHEMES,
        FMT,
        partial=Partial(folder=tmp_path / "p", inputs={"a": "1"}),
        progress=lambda _label, n, total: seen.append(total - n),
    )
    assert names == [la.name for la in table][5:]
    assert not set(done) & set(names)
    assert seen[-1] == 0
    for key, array in expected.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], array)
    names.clear()
    profile_weights(streamed, table, POLICY, SCHEMES, FMT, partial=Partial(folder=tmp_path / "p", inputs={"a": "2"}))
    assert len(names) == len(table), "layers of other inputs are measured again"


def test_a_layer_larger_than_the_limit_is_read_some_rows_at_a_time(streamed: StreamedModel) -> None:
    table = discover_streamed(streamed)
    whole = profile_weights(streamed, table, POLICY, SCHEMES, FMT)
    with pytest.raises(
        ConfigError, match=r"the layer '.*' needs .* MB for one of its rows .* Raise the limit to ([\d.]+) MB"
    ) as caught:
        profile_weights(streamed, table, POLICY, SCHEMES, FMT, memory_limit=100)
    largest = max(table, key=lambda la: la.weights_per_channel)
    least = (
        2 + 16
    ) * largest.weights_per_channel + 3 * 2 * 2 * 24  # a row in bf16 and in float32 with temporaries, its quantizers
    assert f"the layer {largest.name!r}" in str(caught.value)
    assert len(module.rows_within(streamed, table, 3, 2, "cpu", least)[largest.name]) == largest.n_channels
    with pytest.raises(ConfigError, match="for one of its rows"):
        module.rows_within(streamed, table, 3, 2, "cpu", least - 1)
    for limit in (least, 3 * least):
        limited = profile_weights(streamed, table, POLICY, SCHEMES, FMT, memory_limit=limit)
        for key, array in whole.arrays.items():
            np.testing.assert_allclose(limited.arrays[key], array, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_rows_of_a_transposed_convolution_are_read_in_slices(groups: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from mpqsearch.models.files import Stored, _header
    from mpqsearch.profile.recomputed import slices_of
    from mpqsearch.quant import rows_of

    conv = torch.nn.ConvTranspose2d(6, 12, 3, groups=groups)
    save_file({"up.weight": conv.weight.detach()}, tmp_path / "w.safetensors")
    stored: dict[str, Stored] = dict(_header(tmp_path / "w.safetensors"))
    model = StreamedModel(name="m", module=conv, stored=stored)
    layer = LayerSpec(
        name="up", kind="ConvTranspose2d", weight_shape=tuple(conv.weight.shape), channel_axis=1, groups=groups
    )
    expected = rows_of(conv.weight.detach(), layer)
    for size in (1, 2, 5, 100):
        slices = slices_of(layer, size)
        assert max(s.stop - s.start for s in slices) <= size
        assert torch.equal(torch.cat([module._rows(model, layer, s) for s in slices]), expected)


def test_weights_that_are_not_finite_name_their_layer(streamed: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    table = discover_streamed(streamed)
    real = StreamedModel.read

    def broken(self: StreamedModel, key: str, part: slice = slice(None)) -> torch.Tensor:
        weight = real(self, key, part).clone()
        if key == "conv_in.weight":
            weight[3] = torch.inf
        return weight

    monkeypatch.setattr(StreamedModel, "read", broken)
    with pytest.raises(NumericsError, match="layer 'conv_in': weight row 3"):
        profile_weights(streamed, table, POLICY, SCHEMES, FMT)


def test_allocation_from_weights_alone_says_what_it_cannot_do(streamed: StreamedModel) -> None:
    table = discover_streamed(streamed)
    profile = profile_weights(streamed, table, POLICY, SCHEMES, FMT)
    assert profile.weights_only
    assert profile.formats == ("asymmetric", "auto")
    budget = Budget.parse("uniform:4")
    for allocator in ("ilp-layer", "ilp-channel"):
        made = Programs(table=table, profile=profile, policy=POLICY, format=FMT).allocate(
            MethodSpec(name="m", allocator=allocator, loss="weight", scheme="auto"), budget
        )
        assert made.within_budget
        losses = channel_losses(profile, table, "auto", "weight", bias_correction=False)
        assert losses.shape == (table.n_channels, 3)
        again = predicted_loss(table, profile, made.bit_map, bias_correction=True, loss="weight")
        assert made.predicted_loss == pytest.approx(again)
        assert again > 0
    policy = Policy(widths=(3, 4, 5))
    narrow = profile_weights(streamed, table, policy, SCHEMES, FMT)
    programs = Programs(table=table, profile=narrow, policy=policy, format=FMT)
    omq = programs.allocate(MethodSpec(name="m", allocator="omq", scheme="auto"), budget).bit_map
    assert {int(b) for w in omq.weights.values() for b in np.unique(w)} <= {3, 4, 5, 8}
    for loss, key in (("output", "output_error/auto"), ("probe", "sensitivity")):
        with pytest.raises(ConfigError, match=rf"the loss '{loss}' needs '{key}': .* the loss 'weight' works"):
            Programs(table=table, profile=profile, policy=POLICY, format=FMT).allocate(
                MethodSpec(name="m", allocator="ilp-layer", loss=loss, scheme="auto"), budget
            )


class _Stops(Exception):  # noqa: N818
    pass


@dataclass
class _Killed(Partial):
    """Keeps so many parts and stops, as a process that is killed."""

    left: int = 0

    def save(self, part: int | str, arrays: Arrays) -> None:
        if not self.left:
            raise _Stops
        super().save(part, arrays)
        self.left -= 1


@pytest.mark.parametrize("memory_limit", [None, 2_000_000])
def test_a_calibrated_profile_continues_after_any_layer_and_any_probes(
    tmp_path: Path, memory_limit: int | None
) -> None:
    denoiser = tiny_denoiser("dit", steps=2)
    table = discover(denoiser)
    spec = CalibrationSpec(
        samples=2,
        probe_inputs=2,
        probes=1,
        sampler_seeds=2,
        sampler_probes=1,
        context_seeds=3,
        schemes=("asymmetric", "auto"),
    )
    given = (
        denoiser,
        table,
        Policy(widths=(2, 3, 4)),
        spec,
        QuantFormat(n_candidates=10),
    )
    straight = profile_model(*given, memory_limit=memory_limit)
    steps = ["sensitivities", "sensitivities-at-contexts", "sensitivities-of-the-final-sample", "slopes-at-contexts"]
    for finished in (3, len(table) - 4, 1, *[1] * (len(steps) - 1)):
        partial = _Killed(folder=tmp_path, inputs={"model": table.digest}, left=finished)
        with pytest.raises(_Stops):
            profile_model(*given, memory_limit=memory_limit, partial=partial)
    assert {p.stem for p in tmp_path.glob("*.npz")} == {f"{i:05d}" for i in range(len(table))} | set(steps) - {
        "slopes-at-contexts"
    }
    resumed = profile_model(
        *given, memory_limit=memory_limit, partial=Partial(folder=tmp_path, inputs={"model": table.digest})
    )
    assert resumed.arrays.keys() == straight.arrays.keys()
    for key, array in straight.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[key], array, err_msg=key)
        assert resumed.arrays[key].dtype == array.dtype
    stale = Partial(folder=tmp_path, inputs={"model": "another"})
    assert stale.load("sensitivities") is None
    assert not stale.finished()


def test_one_layer_at_a_time_continues_after_any_layer(tmp_path: Path) -> None:
    denoiser = tiny_denoiser("dit", steps=1)
    table = discover(denoiser)
    spec = CalibrationSpec(
        samples=1,
        probe_inputs=1,
        probes=1,
        sampler_seeds=0,
        context_seeds=0,
        schemes=("asymmetric",),
        final_widths=(2,),
        final_seeds=2,
    )
    given = (denoiser, table, Policy(widths=(2, 4)), spec, QuantFormat(n_candidates=4))
    straight = profile_model(*given)
    error = straight.arrays["layer_final_error/asymmetric"]
    assert np.isfinite(error[:, 0]).all()
    assert np.isnan(error[:, 1]).all(), "not measured"
    inputs = {"model": table.digest}
    with pytest.raises(_Stops):  # the tables of all layers, the sensitivities twice, and two layers alone
        profile_model(*given, partial=_Killed(folder=tmp_path, inputs=inputs, left=len(table) + 4))
    assert {p.stem for p in tmp_path.glob("final-*.npz")} == {"final-00000", "final-00001"}
    began = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.npz")}
    resumed = profile_model(*given, partial=Partial(folder=tmp_path, inputs=inputs))
    assert all(p.stat().st_mtime_ns == t for p, t in began.items())
    for key, array in straight.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[key], array, err_msg=key)
