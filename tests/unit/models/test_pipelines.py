"""Recorded calls of real pipelines, made of tiny parts: what is measured with them is what the pipeline does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpqsearch.core import Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ModelError, UnknownNameError
from mpqsearch.models import Denoiser, capture, discover, load_calls, save_calls
from mpqsearch.profile import CalibrationSpec, profile_model
from mpqsearch.sampling import adapt, latents, load_model, require_sampler
from tests.support import tiny_prompted_pipeline, tiny_text_unet
from tests.support.pipelines import TINY, arguments

STEPS = 3
TEXT = ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "PixArtAlphaPipeline", "Lumina2Pipeline")


def profile_of(denoiser: Denoiser) -> SensitivityProfile:
    spec = CalibrationSpec(probe_inputs=2, probes=1, schemes=("asymmetric",), smooth=False)
    return profile_model(denoiser, discover(denoiser), Policy(widths=(2, 4)), spec, QuantFormat(n_candidates=8))


def recorded(name: str, folder: Path, part: str = "transformer") -> tuple[Any, Denoiser]:
    """What a user writes around a pipeline of his own, and the model that this gives; and its bare denoiser."""
    pipe, given = TINY[name]()
    with capture(getattr(pipe, part)) as calls:
        pipe(**arguments(pipe, given, (0,)))
    pipe.save_pretrained(folder / "p")
    save_calls(folder / "calls.safetensors", calls)
    return getattr(pipe, part), load_model(str(folder / "p"), calls=load_calls(folder / "calls.safetensors"))


def test_rows_that_no_sampler_reads_have_no_sensitivity(tmp_path: Path) -> None:
    module, denoiser = recorded("DiTPipeline", tmp_path)
    calls: Any = denoiser.runner.calls  # type: ignore[attr-defined]
    assert [c.timestep for c in calls] == sorted((c.timestep for c in calls), reverse=True)
    assert (len(calls), calls[0].batch, calls[0].kwargs["class_labels"].tolist()) == (STEPS, 2, [0, 1000])
    with torch.no_grad():
        assert calls[0].replay(module).shape == (2, 4, 8, 8)  # both halves of guidance, without the learned variance
    profile = profile_of(denoiser)
    gain = profile.arrays["sensitivity"]
    silent = gain == 0
    assert silent.sum() == 16  # rows of the last layer that predict the variance
    assert not silent[: profile.rows("proj_out_2").start].any()


@pytest.mark.parametrize("name", TEXT)
def test_a_text_pipeline_is_recorded_and_profiled(name: str, tmp_path: Path) -> None:
    module, denoiser = recorded(name, tmp_path, "unet" if name == "StableDiffusionPipeline" else "transformer")
    calls: Any = denoiser.runner.calls  # type: ignore[attr-defined]
    with torch.no_grad():
        # Weights that were read from a file lie elsewhere in memory, and vectorised sums round otherwise.
        torch.testing.assert_close(calls[0].replay(denoiser.module), calls[0].replay(module), rtol=1e-5, atol=1e-6)
    table = discover(denoiser)
    assert not any(la.role == "unused" for la in table)
    sensitivity = profile_of(denoiser).arrays["sensitivity"]
    assert float(sensitivity.min()) >= 0
    assert sum(sensitivity > 0) > 0.9 * table.n_channels


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_weights_load_in_the_precision_that_is_asked_for(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_text_unet().to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    assert next(load_model(str(folder), dtype=name).module.parameters()).dtype == dtype
    assert next(load_model(str(folder), dtype="stored").module.parameters()).dtype == torch.bfloat16
    with pytest.raises(UnknownNameError, match="bfloat16"):
        load_model(str(folder), dtype="bf16")


def test_a_half_precision_profile_is_that_of_single_precision() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        module = tiny_text_unet().to(torch.bfloat16).to(dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), capture(module) as calls:
            for t in (900, 500, 100):
                x, text = (torch.randn(s, generator=generator).to(dtype) for s in ((1, 4, 8, 8), (1, 4, 8)))
                module(x, torch.tensor(t), encoder_hidden_states=text)
        found[dtype] = profile_of(adapt(module, calls=calls))
    full, half = (p.layer_sum(p.arrays["output_error/asymmetric"]) for p in found.values())
    # bfloat16 keeps eight bits: activations differ by about a percent, and so do the squares of errors.
    assert 0 < float(abs(half / full - 1).max()) < 0.1


def test_a_model_known_from_recorded_calls_only_says_what_it_cannot(tmp_path: Path) -> None:
    folder = str(tiny_prompted_pipeline(tmp_path / "sd"))
    module = tiny_text_unet()
    with torch.no_grad(), capture(module) as calls:
        module(torch.randn(2, 4, 8, 8), torch.tensor(9), encoder_hidden_states=torch.randn(2, 4, 8))
    denoiser = load_model(folder, calls=calls)
    with pytest.raises(ModelError, match=r"a search was asked for.*1 recorded calls.*To sample, give the pipeline's"):
        require_sampler(denoiser, "a search")
    with pytest.raises(ModelError, match="1 recorded calls"):
        latents(denoiser, [0])
    with pytest.raises(ModelError, match=r"cannot load the pipeline .*must hold every component"):
        discover(load_model(folder))  # its text encoder is not there
