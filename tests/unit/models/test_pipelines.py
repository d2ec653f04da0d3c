"""Recording, loading and profiling of real pipelines, made of tiny parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpqsearch.core import Policy, QuantFormat
from mpqsearch.errors import ModelError, UnknownNameError
from mpqsearch.models import capture, discover, load_calls, load_model, save_calls
from mpqsearch.profile import CalibrationSpec, profile_model
from mpqsearch.sampling import SamplerSpec, sample
from tests.support import tiny_denoiser, tiny_prompted_pipeline, tiny_text_unet
from tests.support.denoisers import RECIPES, build, model_classes

STEPS = 3
TINY = CalibrationSpec(probe_inputs=2, probes=1, schemes=("asymmetric",), smooth=False)


def vae() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return model_classes()["AutoencoderKL"](block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, **blocks)


def pipeline(cls: str, scheduler: str, **parts: Any) -> Any:
    import diffusers

    made = getattr(diffusers, cls)(scheduler=getattr(diffusers, scheduler)(), **parts)
    made.set_progress_bar_config(disable=True)
    return made


def none(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def test_a_class_conditional_pipeline_is_recorded_saved_loaded_and_profiled(tmp_path: Path) -> None:
    pipe = pipeline(
        "DiTPipeline",
        "DDIMScheduler",
        transformer=resized("DiTTransformer2DModel", num_embeds_ada_norm=1000),
        vae=vae(),
    )
    with capture(pipe.transformer, guidance=4.0) as calls:
        pipe([1], num_inference_steps=STEPS, guidance_scale=4.0, output_type="np")
    assert [c.timestep for c in calls] == sorted((c.timestep for c in calls), reverse=True)
    assert (len(calls), calls[0].batch, calls[0].kwargs["class_labels"].tolist()) == (STEPS, 2, [1, 1000])
    with torch.no_grad():
        assert calls[0].replay(pipe.transformer).shape == (
            1,
            4,
            8,
            8,
        )  # one guided prediction, without the learned variance
    pipe.save_pretrained(tmp_path / "p")
    save_calls(tmp_path / "calls.safetensors", calls)
    denoiser = load_model(str(tmp_path / "p"), calls=load_calls(tmp_path / "calls.safetensors"))
    table = discover(denoiser)
    profile = profile_model(denoiser, table, Policy(widths=(2, 4)), SamplerSpec(), TINY, QuantFormat(n_candidates=8))
    gain = profile.arrays["sensitivity"]
    silent = gain == 0
    assert silent.sum() == 16  # rows of the last layer that predict the variance, which no sampler here reads
    assert not silent[: profile.rows("proj_out_2").start].any()


TEXT: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "StableDiffusionPipeline": (
        lambda: pipeline(
            "StableDiffusionPipeline", "DDIMScheduler", unet=tiny_text_unet(), vae=vae(), requires_safety_checker=False,
            **none("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        ),
        "unet",
        {"prompt_embeds": (1, 4, 8), "negative_prompt_embeds": (1, 4, 8), "height": 8, "width": 8},
    ),
    "StableDiffusion3Pipeline": (
        lambda: pipeline(
            "StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler",
            transformer=build("SD3Transformer2DModel")[0], vae=vae(),
            **none("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        ),
        "transformer",
        {
            "prompt_embeds": (1, 6, 16), "negative_prompt_embeds": (1, 6, 16), "pooled_prompt_embeds": (1, 16),
            "negative_pooled_prompt_embeds": (1, 16), "height": 8, "width": 8,
        },
    ),
    "FluxPipeline": (
        lambda: pipeline(
            "FluxPipeline", "FlowMatchEulerDiscreteScheduler", transformer=flux(), vae=vae(),
            **none("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        ),
        "transformer",
        {"prompt_embeds": (1, 6, 16), "pooled_prompt_embeds": (1, 16), "height": 8, "width": 8},
    ),
    "PixArtAlphaPipeline": (
        lambda: pipeline(
            "PixArtAlphaPipeline", "DDIMScheduler", transformer=build("PixArtTransformer2DModel")[0], vae=vae(),
            **none("text_encoder", "tokenizer"),
        ),
        "transformer",
        {
            "prompt_embeds": (1, 6, 16), "prompt_attention_mask": (1, 6), "negative_prompt_embeds": (1, 6, 16),
            "negative_prompt": None,
            "negative_prompt_attention_mask": (1, 6), "height": 8, "width": 8, "use_resolution_binning": False,
        },
    ),
}  # fmt: skip


def flux() -> nn.Module:
    """The pipeline packs 2x2 latents into one token, so the transformer takes four times the channels."""
    return resized("FluxTransformer2DModel", in_channels=16)


def resized(name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return model_classes()[name](**{**RECIPES[name].config, **config})


@pytest.mark.parametrize("name", TEXT)
def test_a_text_pipeline_is_recorded_and_profiled(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="diffusers makes text pipelines only where transformers is installed")
    make, part, given = TEXT[name]
    pipe = make()
    generator = torch.Generator().manual_seed(0)
    given = {k: torch.randn(v, generator=generator) if isinstance(v, tuple) else v for k, v in given.items()}
    given |= {k: torch.ones(v.shape) for k, v in given.items() if k.endswith("mask")}
    with capture(getattr(pipe, part)) as calls:
        pipe(num_inference_steps=STEPS, output_type="latent", **given)
    assert len(calls) == STEPS
    pipe.save_pretrained(tmp_path / "p")
    denoiser = load_model(str(tmp_path / "p"), calls=calls)
    table = discover(denoiser)
    assert not any(la.role == "unused" for la in table)
    profile = profile_model(denoiser, table, Policy(widths=(2, 4)), SamplerSpec(), TINY, QuantFormat(n_candidates=8))
    assert float(profile.arrays["sensitivity"].min()) >= 0
    assert sum(profile.arrays["sensitivity"] > 0) > 0.9 * table.n_channels


def test_only_the_denoiser_and_the_scheduler_of_a_pipeline_are_read(tmp_path: Path) -> None:
    folder = tiny_prompted_pipeline(tmp_path / "p")
    denoiser = load_model(str(folder))
    assert denoiser.scheduler["beta_schedule"] == "scaled_linear"
    assert denoiser.sample_shape == (4, 8, 8)
    with pytest.raises(ModelError, match=r"Record calls of its pipeline with mpqsearch\.models\.capture"):
        discover(denoiser)
    with pytest.raises(UnknownNameError, match="component of the pipeline"):
        load_model(str(folder), component="prior")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(UnknownNameError, match="unet/transformer"):
        load_model(str(folder))


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


def test_a_half_precision_profile_is_that_of_single_precision(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_text_unet().to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    found = {}
    for dtype in ("float32", "bfloat16"):
        denoiser = load_model(str(folder), dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        at = next(denoiser.module.parameters()).dtype
        with torch.no_grad(), capture(denoiser.module) as calls:
            for t in (900, 500, 100):
                x, text = (torch.randn(s, generator=generator).to(at) for s in ((1, 4, 8, 8), (1, 4, 8)))
                denoiser.module(x, torch.tensor(t), encoder_hidden_states=text)
        denoiser = denoiser.with_calls(calls)
        table = discover(denoiser)
        found[dtype] = profile_model(
            denoiser, table, Policy(widths=(2, 4)), SamplerSpec(), TINY, QuantFormat(n_candidates=8)
        )
    full, half = (found[d].layer_sum(found[d].arrays["output_error/asymmetric"]) for d in ("float32", "bfloat16"))
    # bfloat16 keeps eight bits: activations differ by about a percent, and so do the squares of errors.
    assert float(abs(half / full - 1).max()) < 0.1


def test_a_model_known_from_recorded_calls_only_says_what_it_cannot(tmp_path: Path) -> None:
    denoiser = load_model(str(tiny_prompted_pipeline(tmp_path / "sd")))
    with torch.no_grad(), capture(denoiser.module) as calls:
        denoiser.module(torch.randn(2, 4, 8, 8), torch.tensor(9), encoder_hidden_states=torch.randn(2, 4, 8))
    recorded = denoiser.with_calls(calls)
    text = r"a search was asked for.*1 recorded calls.*encoder_hidden_states.*'output' and 'probe'.*method denoise"
    with pytest.raises(ModelError, match=text):
        recorded.require_sampler("a search")
    with pytest.raises(ModelError, match="a prediction for a sample, a time and a class was asked for"):
        sample(recorded, [0], SamplerSpec(steps=2))
    denoiser.require_sampler("a search")  # no calls: what the module says itself is enough
    plain = tiny_denoiser("dit")
    with torch.no_grad(), capture(plain.module) as calls:
        plain.denoise(torch.randn(1, *plain.sample_shape), torch.tensor([3]), torch.tensor([0]))
    plain.with_calls(calls).require_sampler("a search")  # recorded, and can be called without
