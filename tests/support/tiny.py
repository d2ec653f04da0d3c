"""Models of a few thousand random weights, and profiles made of numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch.core import KeptParameter, LayerSpec, LayerTable, SensitivityProfile

if TYPE_CHECKING:
    from torch import nn

    from mpqsearch.models import Denoiser

CLASSES = 4
"""Classes of the tiny models; the label after the last is the null class."""

DDPM: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": True,
}
"""Configuration of the scheduler of DDPM."""


def tiny_unet(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """A `UNet2DModel` for 8x8 grey images; unconditional with 0 ``classes``."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(  # type: ignore[no-any-return]
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=classes + 1 if classes else None,
    )


def tiny_dit(seed: int = 0) -> nn.Module:
    """A `DiTTransformer2DModel` for 8x8 grey images."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    return DiTTransformer2DModel(  # type: ignore[no-any-return]
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_num_groups=1,
    )


def tiny_text_unet(seed: int = 0) -> nn.Module:
    """A `UNet2DConditionModel` with text embeddings of 8 values for 8x8 latents, in its parts as in Stable Diffusion
    1.5."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(  # type: ignore[no-any-return]
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def tiny_prompted_pipeline(folder: Path) -> Path:
    """Write the folder of a Stable Diffusion 1.5 pipeline as far as its denoiser goes: the text encoder is named and is
    not there."""
    from diffusers import DDIMScheduler

    unet: Any = tiny_text_unet()
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "safety_checker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_denoiser(kind: str = "unet", seed: int = 0, **sampler: Any) -> Denoiser:
    """One of the tiny models behind a `Denoiser`; ``kind`` is ``unet`` or ``dit``, ``sampler`` what a `SamplerSpec`
    takes."""
    from mpqsearch.sampling import adapt
    from mpqsearch.specs import SamplerSpec

    return adapt(
        {"unet": tiny_unet, "dit": tiny_dit}[kind](seed),
        sample_shape=(1, 8, 8),
        name=f"tiny-{kind}",
        scheduler=DDPM,
        data_range=(-1.0, 1.0),
        n_classes=CLASSES,
        null_class=CLASSES,
        sampler=SamplerSpec(**sampler),
    )


def tiny_table(n_layers: int = 5, channels: int = 6, fan_in: int = 12) -> LayerTable:
    """A table of equal linear layers; the first and the last have those roles."""
    layers = tuple(
        LayerSpec(
            name=f"block.{i}.linear",
            kind="Linear",
            weight_shape=(channels, fan_in + i),
            macs=channels * (fan_in + i),
            role="first" if i == 0 else "last" if i == n_layers - 1 else "linear",
            has_bias=True,
        )
        for i in range(n_layers)
    )
    kept = (KeptParameter(name="norm.weight", n_values=16, reason="normalization"),)
    return LayerTable(digest="0" * 64, layers=layers, kept=kept, model="tiny")


def tiny_profile(
    table: LayerTable, widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8), seed: int = 0
) -> SensitivityProfile:
    """A profile of plausible random numbers: errors fall about fourfold a bit, with noise."""
    rng = np.random.default_rng(seed)
    n, bits = table.n_channels, np.array(widths, dtype=np.float64)

    def errors() -> Any:
        level = rng.lognormal(sigma=1.5, size=(n, 1))
        return (level * 4.0**-bits * rng.lognormal(sigma=0.2, size=(n, len(widths)))).astype(np.float32)

    arrays: dict[str, Any] = {
        k: rng.lognormal(size=n).astype(np.float32)
        for k in ("kurtosis", "kurtosis_smoothed", "weight_rms", "sensitivity", "output_power")
    }

    def price(variant: str) -> None:
        arrays[f"weight_error/{variant}"] = errors()
        arrays[f"output_error/{variant}"] = errors()
        arrays[f"output_error_corrected/{variant}"] = 0.9 * arrays[f"output_error/{variant}"]

    for variant in ("asymmetric", "auto", "asymmetric+smooth", "asymmetric+smooth+minmax"):
        price(variant)
    arrays["quantized_input_error/asymmetric+smooth@a4"] = arrays["output_error/asymmetric+smooth"] + errors().mean(
        1, keepdims=True
    )
    arrays["layer_activation_error"] = (4.0**-bits * rng.lognormal(sigma=1.0, size=(len(table), 1))).astype(np.float32)
    price("auto+smooth")
    return SensitivityProfile(
        model_digest=table.digest,
        names=tuple(la.name for la in table),
        channels=tuple(la.n_channels for la in table),
        widths=widths,
        arrays=arrays,
        means={la.name: np.zeros((1, la.weights_per_channel), dtype=np.float32) for la in table},
        input_max={la.name: np.ones(la.n_inputs, dtype=np.float32) for la in table},
    )
