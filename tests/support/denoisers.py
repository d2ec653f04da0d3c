"""Every denoiser class that diffusers ships, tiny and with random weights, and inputs that it takes.

`denoiser_classes` enumerates them from diffusers itself, so that new ones are found; `build` makes one from `RECIPES`,
or from its signature when nobody has written a recipe yet. Shapes are the smallest that run every layer once.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Random = Callable[..., Tensor]
"""Gaussian numbers of a shape."""

KNOWN_REFUSALS = {
    "CosmosControlNetModel": "its forward resizes a mask with torchvision, which is not required here",
    "AnyFlowFARTransformer3DModel": "flexible attention has no backward pass on the CPU, so sensitivities cannot be measured there",
    "Kandinsky6SRTransformer3DModel": "flexible attention has no backward pass on the CPU, so sensitivities cannot be measured there",
    "WanAnimate2Transformer3DModel": "needs a key-value cache object that the reference pass fills: it can be neither stored nor replayed",
}
"""Denoisers that do not go all the way, with the reason. Any other class that fails is a failure."""

_TIME = re.compile(r"^(t|timesteps?|timestep_ratio|\w+_timesteps?|\w+_time)$")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a class is made small (``config``, or ``make`` for classes that take modules) and what its forward takes
    (``inputs``)."""

    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Random], dict[str, Any]]
    make: Callable[[type[nn.Module]], nn.Module] | None = None


def denoiser_classes() -> dict[str, type[nn.Module]]:
    """All classes of the installed diffusers that are called with a time, by name: ``ModelMixin`` subclasses of
    ``diffusers.models``."""
    return {name: cls for name, cls in model_classes().items() if not reason_against(cls)}


def model_classes() -> dict[str, type[nn.Module]]:
    """All concrete models of the installed diffusers, by name."""
    import diffusers

    for module in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        importlib.import_module(module.name)  # all of them: diffusers loads its classes when they are asked for
    found = {c.__name__: c for c in subclasses(diffusers.ModelMixin) if c.__module__.startswith("diffusers.models.")}
    return {
        name: found[name]
        for name in sorted(found)
        if found[name].forward is not nn.Module.forward or name == "MotionAdapter"
    }


def reason_against(cls: type[nn.Module]) -> str:
    """Why a model is no denoiser; empty when it is one."""
    if ".autoencoders." in cls.__module__:
        return "autoencoder: it maps between pixels and latents"
    names = list(inspect.signature(cls.forward).parameters)[1:]
    if not any(_TIME.match(n) for n in names):
        return f"takes no time: forward({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    return ""


def build(name: str, *, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of the class ``name`` in evaluation mode and keyword arguments for one call. Raises what the class
    raises."""
    cls = model_classes()[name]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    recipe = RECIPES.get(name) or _guess(cls)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = recipe.make(cls) if recipe.make else cls(**recipe.config)
        disturb(module)
    return module.eval().requires_grad_(False), recipe.inputs(random)


@torch.no_grad()
def disturb(module: nn.Module) -> None:
    """Random values for parameters that have none: gates and last layers that start at zero, and whatever starts as raw
    memory."""
    for owner in module.modules():
        known = isinstance(owner, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))
        for parameter in owner.parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            if not known and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
            elif parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter.dtype))


def subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def _guess(cls: type[nn.Module]) -> Recipe:
    """A recipe from the signature alone: small numbers for the usual names of sizes, and latents with text for the
    usual inputs."""
    made = inspect.signature(cls.__init__).parameters
    config = {k: v for k, v in _SMALL.items() if k in made}
    channels = int(config.get("in_channels", 4))
    text = next(
        (
            config[k]
            for k in ("joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim", "caption_channels")
            if k in config
        ),
        16,
    )
    video = "3D" in cls.__name__ or "Video" in cls.__name__

    def inputs(r: Random) -> dict[str, Any]:
        known: dict[str, Any] = {
            "sample": r(1, channels, 2, 8, 8) if video else r(1, channels, 8, 8),
            "hidden_states": r(1, channels, 2, 8, 8) if video else r(1, channels, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": r(1, 6, int(text)),
            "encoder_attention_mask": torch.ones(1, 6),
            "pooled_projections": r(1, int(config.get("pooled_projection_dim", 16))),
        }
        return {k: known[k] for k in inspect.signature(cls.forward).parameters if k in known}

    return Recipe(config=config, inputs=inputs)


_SMALL: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 8, "hidden_size": 16, "text_dim": 16, "text_embed_dim": 16, "joint_attention_dim": 16, "cross_attention_dim": 16,
    "caption_channels": 16, "pooled_projection_dim": 16, "ffn_dim": 32, "freq_dim": 16, "time_embed_dim": 16, "sample_size": 8,
}  # fmt: skip


def _t(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


def _flux(r: Random, *, axes: int = 3, channels: int = 4, dim: int = 16, **more: Any) -> dict[str, Any]:
    """Tokens of a 4x4 grid with text and position ids, as in Flux."""
    return {
        "hidden_states": r(1, 16, channels), "encoder_hidden_states": r(1, 6, dim), "timestep": _t(0.5),
        "img_ids": _grid(4, 4, axes), "txt_ids": torch.zeros(6, axes), **more,
    }  # fmt: skip


def _grid(height: int, width: int, axes: int) -> Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.reshape(height * width, axes)


def _image(r: Random, dim: int = 16, *, channels: int = 4, size: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": r(1, channels, size, size),
        "timestep": _t(),
        "encoder_hidden_states": r(1, 6, dim),
        **more,
    }


def _video(
    r: Random, dim: int = 16, *, channels: int = 4, frames: int = 2, size: int = 8, **more: Any
) -> dict[str, Any]:
    return _image(r, dim) | {"hidden_states": r(1, channels, frames, size, size)} | more


def _unet(r: Random, dim: int = 8, *, channels: int = 4, frames: int = 0, **more: Any) -> dict[str, Any]:
    shape = (1, channels, frames, 8, 8) if frames else (1, channels, 8, 8)
    return {"sample": r(*shape), "timestep": _t(), "encoder_hidden_states": r(1, 4, dim), **more}


_UNET: dict[str, Any] = {
    "block_out_channels": (4, 8), "norm_num_groups": 2, "cross_attention_dim": 8, "attention_head_dim": 2, "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}  # fmt: skip
_UNET2D = _UNET | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 8}
_CONTROL = _UNET | {"conditioning_embedding_out_channels": (4, 4)}
_UNION = _CONTROL | {"num_trans_channel": 4, "num_proj_channel": 4, "num_trans_head": 2}
_CONTROL3D = _CONTROL | {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "motion_num_attention_heads": 2,
}
_FLUX: dict[str, Any] = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
_FLUX_POOLED = _FLUX | {"pooled_projection_dim": 16}
_HUNYUAN: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 8,
    "cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "hidden_size": 16, "text_len": 4, "text_len_t5": 4,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "patch_size": 2, "in_channels": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
    "axes_dims_rope": (4, 2, 2),
}  # fmt: skip
_SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "caption_projection_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
}  # fmt: skip
_SANA: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 8,
}  # fmt: skip
_WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
    "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip
_COGVIDEO: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 8,
    "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6,
}  # fmt: skip
_HUNYUANVIDEO: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1, "num_single_layers": 1,
    "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
}  # fmt: skip
_LTX2: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8, "num_layers": 1, "caption_channels": 16, "rope_double_precision": False,
}  # fmt: skip


def _hunyuan_inputs(r: Random, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 4, 8, 8), "timestep": _t(), "encoder_hidden_states": r(1, 4, 8), "text_embedding_mask": torch.ones(1, 4),
        "encoder_hidden_states_t5": r(1, 4, 8), "text_embedding_mask_t5": torch.ones(1, 4), "style": torch.zeros(1, dtype=torch.long),
        "image_meta_size": torch.tensor([[64.0, 64, 8, 8, 0, 0]]), "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)), **more,
    }  # fmt: skip


def _qwen_inputs(r: Random, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 16, 16), "encoder_hidden_states": r(1, 6, 16), "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.long),
        "timestep": _t(0.5), "img_shapes": [(1, 4, 4)], **more,
    }  # fmt: skip


def _hunyuanvideo_inputs(r: Random, **more: Any) -> dict[str, Any]:
    return _video(r, encoder_attention_mask=torch.ones(1, 6), pooled_projections=r(1, 8), guidance=_t(6000.0)) | more


def _several(name: str) -> Callable[[type[nn.Module]], nn.Module]:
    """Two models of the class ``name`` in one wrapper."""

    def make(cls: type[nn.Module]) -> nn.Module:
        inner = model_classes()[name]
        return cls([inner(**RECIPES[name].config) for _ in range(2)])

    return make


def _twice(name: str, *, lists: tuple[str, ...]) -> Callable[[Random], dict[str, Any]]:
    """Inputs of `_several`: one image and one scale for each model."""

    def inputs(r: Random) -> dict[str, Any]:
        one = RECIPES[name].inputs(r)
        return one | {k: [one[k], one[k]] for k in lists} | {"conditioning_scale": [1.0, 0.5], "return_dict": False}

    return inputs


def _zimage_control(cls: Any) -> nn.Module:
    """It borrows the embedders of a transformer."""
    transformer = model_classes()["ZImageTransformer2DModel"](**RECIPES["ZImageTransformer2DModel"].config)
    made: nn.Module = cls.from_transformer(cls(**RECIPES["ZImageControlNetModel"].config), transformer)
    return made


_SIZES: dict[str, Any] = {
    "original_size": torch.tensor([[64, 64]]),
    "target_size": torch.tensor([[64, 64]]),
    "crop_coords": torch.tensor([[0, 0]]),
}

RECIPES: dict[str, Recipe] = {
    # U-Nets
    "UNet1DModel": Recipe(
        config={
            "block_out_channels": (8, 16), "in_channels": 4, "out_channels": 4, "time_embedding_type": "positional",
            "use_timestep_embedding": True, "out_block_type": "OutConv1DBlock", "mid_block_type": "MidResTemporalBlock1D", "act_fn": "swish",
            "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"), "up_block_types": ("UpResnetBlock1D",),
        },
        inputs=lambda r: {"sample": r(1, 4, 16), "timestep": _t()},
    ),
    "UNet2DModel": Recipe(
        config={
            "block_out_channels": (4, 8), "norm_num_groups": 2, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4, "layers_per_block": 1, "sample_size": 8,
            "num_class_embeds": 5,
        },
        inputs=lambda r: {"sample": r(1, 3, 8, 8), "timestep": _t(), "class_labels": torch.tensor([2])},
    ),
    "UNet2DConditionModel": Recipe(
        config=_UNET2D | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
        inputs=lambda r: _unet(r, added_cond_kwargs={"text_embeds": r(1, 16), "time_ids": r(1, 6)}),
    ),
    "UNet3DConditionModel": Recipe(
        config=_UNET2D | {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        inputs=lambda r: _unet(r, frames=2),
    ),
    "UNetMotionModel": Recipe(
        config={k: v for k, v in _UNET2D.items() if k != "attention_head_dim"} | {
            "num_attention_heads": 2, "motion_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        inputs=lambda r: _unet(r, frames=2) | {"encoder_hidden_states": r(2, 4, 8)},
    ),
    "UNetSpatioTemporalConditionModel": Recipe(
        config={
            "block_out_channels": (32, 32), "cross_attention_dim": 8, "num_attention_heads": 2, "in_channels": 4, "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), "sample_size": 8,
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        inputs=lambda r: {
            "sample": r(1, 2, 4, 8, 8), "timestep": _t(), "encoder_hidden_states": r(1, 1, 8), "added_time_ids": torch.tensor([[6.0, 127, 0.02]]),
        },
    ),
    "I2VGenXLUNet": Recipe(
        config={
            "block_out_channels": (4, 8), "norm_num_groups": 2, "cross_attention_dim": 8, "attention_head_dim": 2, "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "sample_size": 8,
        },
        inputs=lambda r: _unet(r, frames=2, fps=torch.tensor([8]), image_latents=r(1, 4, 2, 8, 8), image_embeddings=r(1, 8)),
    ),
    "Kandinsky3UNet": Recipe(
        config={
            "time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2, "block_out_channels": (8, 8, 8, 8),
            "cross_attention_dim": 8, "encoder_hid_dim": 8,
        },
        inputs=lambda r: _unet(r, encoder_attention_mask=torch.ones(1, 4)),
    ),
    "StableCascadeUNet": Recipe(
        config={
            "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 8, "block_out_channels": (8, 8),
            "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 8, "clip_text_pooled_in_channels": 8, "clip_image_in_channels": 8, "dropout": (0.0, 0.0),
        },
        inputs=lambda r: {
            "sample": r(1, 4, 8, 8), "timestep_ratio": _t(0.5), "clip_text_pooled": r(1, 1, 8), "clip_text": r(1, 4, 8), "clip_img": r(1, 1, 8),
        },
    ),
    "DreamLiteUNetModel": Recipe(
        config={
            "block_out_channels": (8, 8, 8), "norm_num_groups": 2, "cross_attention_dim": 8, "attention_head_dim": 2, "layers_per_block": 1,
            "sample_size": 8, "ff_mult": 2,
        },
        inputs=_unet,
    ),
    "UNetControlNetXSModel": Recipe(
        config={
            "sample_size": 8, "block_out_channels": (4, 8), "cross_attention_dim": 8, "num_attention_heads": 2, "norm_num_groups": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "ctrl_block_out_channels": (2, 4), "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 2, "upcast_attention": False,
            "ctrl_conditioning_embedding_out_channels": (2, 2),
        },
        inputs=lambda r: _unet(r, controlnet_cond=r(1, 3, 16, 16)),
    ),
    # ControlNets
    "ControlNetModel": Recipe(config=_CONTROL, inputs=lambda r: _unet(r, controlnet_cond=r(1, 3, 16, 16))),
    "MultiControlNetModel": Recipe(
        make=_several("ControlNetModel"), inputs=_twice("ControlNetModel", lists=("controlnet_cond",)),
    ),
    "ControlNetUnionModel": Recipe(
        config=_UNION | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
        inputs=lambda r: _unet(
            r, controlnet_cond=[r(1, 3, 16, 16)], control_type=torch.tensor([[1.0, 0, 0, 0, 0, 0]]), control_type_idx=[0], conditioning_scale=1.0,
            added_cond_kwargs={"text_embeds": r(1, 16), "time_ids": r(1, 6)},
        ),
    ),
    "MultiControlNetUnionModel": Recipe(
        make=_several("ControlNetUnionModel"),
        inputs=_twice("ControlNetUnionModel", lists=("controlnet_cond", "control_type", "control_type_idx")),
    ),
    "SparseControlNetModel": Recipe(
        config=_CONTROL3D,
        inputs=lambda r: _unet(r, frames=2, controlnet_cond=r(1, 4, 2, 8, 8), conditioning_mask=torch.ones(1, 1, 2, 8, 8))
        | {"encoder_hidden_states": r(2, 4, 8)},
    ),
    "FluxControlNetModel": Recipe(
        config=_FLUX_POOLED, inputs=lambda r: _flux(r, pooled_projections=r(1, 16), controlnet_cond=r(1, 16, 4)),
    ),
    "FluxMultiControlNetModel": Recipe(
        make=_several("FluxControlNetModel"),
        inputs=lambda r: _twice("FluxControlNetModel", lists=("controlnet_cond",))(r) | {"controlnet_mode": [torch.tensor([0])] * 2},
    ),
    "HunyuanDiT2DControlNetModel": Recipe(
        config=_HUNYUAN | {"transformer_num_layers": 4}, inputs=lambda r: _hunyuan_inputs(r, controlnet_cond=r(1, 4, 8, 8)),
    ),
    "HunyuanDiT2DMultiControlNetModel": Recipe(
        make=_several("HunyuanDiT2DControlNetModel"), inputs=_twice("HunyuanDiT2DControlNetModel", lists=("controlnet_cond",)),
    ),
    "QwenImageControlNetModel": Recipe(config=_QWEN, inputs=lambda r: _qwen_inputs(r, controlnet_cond=r(1, 16, 16))),
    "QwenImageMultiControlNetModel": Recipe(
        make=lambda cls: cls([model_classes()["QwenImageControlNetModel"](**_QWEN)]),
        inputs=lambda r: _qwen_inputs(r, controlnet_cond=[r(1, 16, 16)], conditioning_scale=[1.0]),
    ),
    "SanaControlNetModel": Recipe(config=_SANA, inputs=lambda r: _image(r, 8, controlnet_cond=r(1, 4, 8, 8))),
    "SD3ControlNetModel": Recipe(config=_SD3, inputs=lambda r: _image(r, pooled_projections=r(1, 16), controlnet_cond=r(1, 4, 8, 8))),
    "SD3MultiControlNetModel": Recipe(
        make=_several("SD3ControlNetModel"), inputs=_twice("SD3ControlNetModel", lists=("controlnet_cond",)),
    ),
    "CosmosControlNetModel": Recipe(
        config={
            "n_controlnet_blocks": 1, "in_channels": 6, "latent_channels": 6, "model_channels": 32, "num_attention_heads": 2,
            "attention_head_dim": 16, "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 8, 8),
            "img_context_dim_in": 16, "img_context_dim_out": 16,
        },
        inputs=lambda r: {
            "controls_latents": r(1, 4, 1, 8, 8), "latents": r(1, 4, 1, 8, 8), "timestep": _t(0.5), "padding_mask": torch.zeros(1, 1, 8, 8),
            "encoder_hidden_states": (r(1, 6, 16), r(1, 4, 16)), "condition_mask": torch.ones(1, 1, 1, 8, 8),
        },
    ),
    "ZImageControlNetModel": Recipe(
        make=_zimage_control,
        config={
            "control_layers_places": (0,), "control_refiner_layers_places": (0,), "control_in_dim": 4, "dim": 16, "n_refiner_layers": 1,
            "n_heads": 1, "n_kv_heads": 1,
        },
        inputs=lambda r: {"x": [r(4, 1, 8, 8)], "t": _t(0.5), "cap_feats": [r(6, 16)], "control_context": [r(4, 1, 8, 8)]},
    ),
    # Transformers for images
    "DiTTransformer2DModel": Recipe(
        config={
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1, "sample_size": 8,
            "num_embeds_ada_norm": 4, "norm_num_groups": 1,
        },
        inputs=lambda r: {"hidden_states": r(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])},
    ),
    "Transformer2DModel": Recipe(
        config={
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "norm_num_groups": 2, "cross_attention_dim": 16,
            "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "patch_size": 2, "sample_size": 8, "norm_elementwise_affine": False,
            "attention_bias": True, "activation_fn": "gelu-approximate", "caption_channels": 16,
        },
        inputs=lambda r: _image(r, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "DreamLiteTransformer2DModel": Recipe(
        config={"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "norm_num_groups": 2, "cross_attention_dim": 8},
        inputs=lambda r: _image(r, 8),
    ),
    "TransformerTemporalModel": Recipe(
        config={"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "norm_num_groups": 2},
        inputs=lambda r: {"hidden_states": r(2, 4, 8, 8), "timestep": _t(), "num_frames": 2},
    ),
    "PriorTransformer": Recipe(
        config={"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "embedding_dim": 8, "num_embeddings": 7},
        inputs=lambda r: {"hidden_states": r(1, 8), "timestep": _t(), "proj_embedding": r(1, 8), "encoder_hidden_states": r(1, 7, 8)},
    ),
    "PixArtTransformer2DModel": Recipe(
        config={
            "sample_size": 8, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "cross_attention_dim": 8,
            "caption_channels": 16, "use_additional_conditions": False,
        },
        inputs=lambda r: _image(r, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "SD3Transformer2DModel": Recipe(
        config=_SD3 | {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        inputs=lambda r: _image(r, pooled_projections=r(1, 16)),
    ),
    "AuraFlowTransformer2DModel": Recipe(
        config={
            "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 16,
        },
        inputs=_image,
    ),
    "HunyuanDiT2DModel": Recipe(config=_HUNYUAN | {"num_layers": 4}, inputs=_hunyuan_inputs),
    "LuminaNextDiT2DModel": Recipe(
        config={
            "sample_size": 8, "hidden_size": 24, "num_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8,
            "cross_attention_dim": 16, "learn_sigma": False,
        },
        inputs=lambda r: _image(r, encoder_mask=torch.ones(1, 6), image_rotary_emb=r(384, 384, 4), cross_attention_kwargs={}),
    ),
    "Lumina2Transformer2DModel": Recipe(
        config={
            "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 3,
            "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32), "cap_feat_dim": 16,
        },
        inputs=lambda r: _image(r, encoder_attention_mask=torch.ones(1, 6, dtype=torch.bool)),
    ),
    "SanaTransformer2DModel": Recipe(config=_SANA, inputs=lambda r: _image(r, 8)),
    "FluxTransformer2DModel": Recipe(
        config=_FLUX_POOLED | {"guidance_embeds": True}, inputs=lambda r: _flux(r, pooled_projections=r(1, 16), guidance=_t(3.5)),
    ),
    "Flux2Transformer2DModel": Recipe(
        config=_FLUX | {"timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2)}, inputs=lambda r: _flux(r, axes=4, guidance=_t(3.5)),
    ),
    "Flux3Transformer2DModel": Recipe(
        config=_FLUX | {"cond_in_channels": 4, "timestep_channels": 16, "axes_dims_rope": (2, 2, 2, 2), "flow_map": True},
        inputs=lambda r: _flux(r, axes=4, image_cond_hidden_states=r(1, 4, 4), image_cond_ids=_grid(2, 2, 4), target_timestep=_t(0.2)),
    ),
    "ChromaTransformer2DModel": Recipe(
        config=_FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}, inputs=_flux,
    ),
    "BriaTransformer2DModel": Recipe(config=_FLUX | {"axes_dims_rope": [2, 2, 4]}, inputs=_flux),
    "BriaFiboTransformer2DModel": Recipe(
        config=_FLUX | {"axes_dims_rope": [2, 2, 4], "text_encoder_dim": 8, "num_layers": 1},
        inputs=lambda r: _flux(r, text_encoder_layers=[r(1, 6, 8), r(1, 6, 8)]),
    ),
    "BriaFibo2Transformer2DModel": Recipe(
        config={
            "in_channels": 4, "dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8, "injection_layer_ids": (1,),
            "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4, "gist_step": 1, "gist_min_text_len": 2,
            "gist_max_text_len": 8, "axes_dims": (16, 16, 16), "axes_lens": (32, 32, 32),
        },
        inputs=lambda r: {"hidden_states": r(1, 4, 8, 8), "timestep": _t(0.5), "encoder_hidden_states": r(1, 2, 6, 8)},
    ),
    "LongCatImageTransformer2DModel": Recipe(
        config=_FLUX_POOLED | {"axes_dims_rope": [2, 2, 4]}, inputs=lambda r: _flux(r, guidance=_t(3.5)),
    ),
    "OvisImageTransformer2DModel": Recipe(config=_FLUX | {"out_channels": 4}, inputs=_flux),
    "QwenImageTransformer2DModel": Recipe(config=_QWEN | {"out_channels": 4}, inputs=_qwen_inputs),
    "QwenImage21Transformer2DModel": Recipe(
        config={
            "in_channels": 16, "out_channels": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "context_in_dim": 16,
            "axes_dims_rope": (4, 2, 2),
        },
        # four tokens a slot
        inputs=lambda r: _qwen_inputs(r, img_shapes=[[(1, 4, 4)]], img_mask=torch.tensor([[False] * 6 + [True] * 4])),
    ),
    "NucleusMoEImageTransformer2DModel": Recipe(
        config=_QWEN | {
            "num_attention_heads": 6, "out_channels": 4, "num_layers": 5, "num_experts": 2, "moe_intermediate_dim": 16, "capacity_factors": [2.0] * 5,
        },
        inputs=_qwen_inputs,
    ),
    "HiDreamImageTransformer2DModel": Recipe(
        config={
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "caption_channels": [8, 4], "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": (0, 1), "force_inference_output": True,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 4, 8, 8), "timesteps": _t(), "encoder_hidden_states_t5": r(1, 6, 8),
            "encoder_hidden_states_llama3": r(2, 1, 6, 4), "pooled_embeds": r(1, 8),
        },
    ),
    "HunyuanImageTransformer2DModel": Recipe(
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1,
            "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "rope_axes_dim": (4, 4),
        },
        inputs=lambda r: _image(
            r, encoder_attention_mask=torch.ones(1, 6), encoder_hidden_states_2=r(1, 3, 8), encoder_attention_mask_2=torch.ones(1, 3),
        ),
    ),
    "CogView3PlusTransformer2DModel": Recipe(
        config={
            "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4, "text_embed_dim": 16,
            "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
        },
        inputs=lambda r: _image(r, **_SIZES),
    ),
    "CogView4Transformer2DModel": Recipe(
        config={
            "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4, "text_embed_dim": 16,
            "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (8, 8),
        },
        inputs=lambda r: _image(r, **_SIZES),
    ),
    "GlmImageTransformer2DModel": Recipe(
        config={
            "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "text_embed_dim": 16,
            "time_embed_dim": 16, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 16,
        },
        inputs=lambda r: _image(
            r, prior_token_id=torch.tensor([3]), prior_token_drop=torch.tensor([False]), target_size=torch.tensor([[8.0, 8.0]]),
            crop_coords=torch.zeros(1, 2),
        ),
    ),
    "ErnieImageTransformer2DModel": Recipe(
        config={
            "hidden_size": 16, "num_attention_heads": 1, "num_layers": 1, "ffn_hidden_size": 16, "in_channels": 4, "out_channels": 4,
            "text_in_dim": 16, "rope_axes_dim": (8, 4, 4),
        },
        inputs=lambda r: {"hidden_states": r(1, 4, 8, 8), "timestep": _t(), "text_bth": r(1, 6, 16), "text_lens": torch.tensor([6])},
    ),
    "Ideogram4Transformer2DModel": Recipe(
        config={
            "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "intermediate_size": 32, "adaln_dim": 16,
            "llm_features_dim": 16, "rope_theta": 10_000, "mrope_section": (2, 1, 1),
        },
        inputs=lambda r: {  # three text tokens (indicator 3) and four of the image (2)
            "hidden_states": r(1, 7, 4), "encoder_hidden_states": r(1, 7, 16), "timestep": _t(0.5),
            "position_ids": torch.arange(7)[None, :, None].expand(1, 7, 3).clone(), "segment_ids": torch.ones(1, 7, dtype=torch.long),
            "indicator": torch.tensor([[3, 3, 3, 2, 2, 2, 2]]),
        },
    ),
    "Krea2Transformer2DModel": Recipe(
        config={
            "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        inputs=lambda r: {
            "hidden_states": r(1, 16, 4), "encoder_hidden_states": r(1, 6, 2, 16), "timestep": _t(0.5),
            "position_ids": torch.cat([torch.zeros(6, 3), _grid(4, 4, 3)]), "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        },
    ),
    "OmniGenTransformer2DModel": Recipe(
        config={
            "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32, "num_layers": 1, "pad_token_id": 0,
            "vocab_size": 50, "time_step_dim": 4, "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]}, "pos_embed_max_size": 16,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 4, 8, 8), "timestep": _t(0.5), "input_ids": torch.arange(20)[None], "input_img_latents": [r(1, 4, 8, 8)],
            "input_image_sizes": {0: [[0, 16]]}, "attention_mask": torch.ones(1, 37, 37), "position_ids": torch.arange(37)[None],
        },
    ),
    "PRXTransformer2DModel": Recipe(
        config={"in_channels": 4, "context_in_dim": 16, "hidden_size": 16, "num_heads": 2, "depth": 1, "axes_dim": [4, 4]}, inputs=_image,
    ),
    "ZImageTransformer2DModel": Recipe(
        config={
            "in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4], "axes_lens": [64, 32, 32],
        },
        inputs=lambda r: {"x": [r(4, 1, 8, 8)], "t": _t(0.5), "cap_feats": [r(6, 16)]},
    ),
    "JoyImageEditTransformer3DModel": Recipe(
        config={"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 1, "rope_dim_list": [4, 6, 6]},
        inputs=lambda r: _video(r, frames=1, size=4),
    ),
    "JoyImageEditPlusTransformer3DModel": Recipe(
        config={"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 1, "rope_dim_list": [4, 6, 6]},
        inputs=lambda r: {
            "hidden_states": r(1, 2, 4, 1, 2, 2), "encoder_hidden_states": r(1, 6, 16), "timestep": _t(), "shape_list": [[(1, 1, 1), (1, 1, 1)]],
        },
    ),
    # Transformers for video
    "CogVideoXTransformer3DModel": Recipe(config=_COGVIDEO, inputs=lambda r: _video(r, 8) | {"hidden_states": r(1, 2, 4, 8, 8)}),
    "ConsisIDTransformer3DModel": Recipe(
        config=_COGVIDEO | {
            "cross_attn_interval": 1, "is_train_face": True, "cross_attn_dim_head": 4, "cross_attn_num_heads": 1, "LFE_id_dim": 4,
            "LFE_vit_dim": 4, "LFE_depth": 5, "LFE_dim_head": 4, "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 2,
            "LFE_output_dim": 10, "LFE_ff_mult": 1, "LFE_num_scale": 1,
        },
        inputs=lambda r: _video(r, 8, id_cond=r(1, 4), id_vit_hidden=[r(1, 2, 4)]) | {"hidden_states": r(1, 2, 4, 8, 8)},
    ),
    "LatteTransformer3DModel": Recipe(
        config={
            "sample_size": 8, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_channels": 16, "in_channels": 4,
            "cross_attention_dim": 16, "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 2,
        },
        inputs=_video,
    ),
    "AllegroTransformer3DModel": Recipe(
        config={
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "cross_attention_dim": 24, "sample_width": 8,
            "sample_height": 8, "sample_frames": 2, "caption_channels": 16,
        },
        inputs=lambda r: _video(r, image_rotary_emb=None),
    ),
    "AnyFlowTransformer3DModel": Recipe(
        config=_WAN,
        inputs=lambda r: _video(r, r_timestep=torch.full((1, 2), 250.0)) | {
            "hidden_states": r(1, 2, 4, 8, 8), "timestep": torch.full((1, 2), 500.0),
        },
    ),
    "AnyFlowFARTransformer3DModel": Recipe(
        config=_WAN,
        inputs=lambda r: {
            "hidden_states": r(1, 4, 4, 8, 8), "timestep": torch.full((1, 4), 500.0), "r_timestep": torch.full((1, 4), 250.0),
            "encoder_hidden_states": r(1, 6, 16), "chunk_partition": [2, 2],
        },
    ),
    "WanTransformer3DModel": Recipe(
        config=_WAN | {"image_dim": 16, "added_kv_proj_dim": 24},
        inputs=lambda r: _video(r, encoder_hidden_states=r(1, 512, 16), encoder_hidden_states_image=r(1, 4, 16)),
    ),
    "WanVACETransformer3DModel": Recipe(
        config=_WAN | {"vace_layers": [0], "vace_in_channels": 12}, inputs=lambda r: _video(r, control_hidden_states=r(1, 12, 2, 8, 8)),
    ),
    "WanAnimateTransformer3DModel": Recipe(
        config=_WAN | {
            "in_channels": 12, "latent_channels": 4, "image_dim": 16, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
        },
        inputs=lambda r: _video(
            r, channels=12, frames=2, encoder_hidden_states_image=r(1, 4, 16), pose_hidden_states=r(1, 4, 1, 8, 8),
            face_pixel_values=r(1, 3, 1, 16, 16),
        ),
    ),
    "WanAnimate2Transformer3DModel": Recipe(
        config={
            "text_len": 8, "in_dim": 8, "dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16, "out_dim": 4, "num_heads": 2, "num_layers": 1,
        },
        inputs=lambda r: {
            "hidden_states": [r(4, 1, 8, 8)], "timestep": _t(), "encoder_hidden_states": [r(6, 16)], "condition_latents": [r(4, 1, 8, 8)],
            "encoder_hidden_states_image": r(1, 4, 1280), "kv_cache": None, "kv_cache_mode": None, "seq_len": 16,
            "offset_grid_sizes": torch.tensor([[1, 4, 4]]),
        },
    ),
    "ChronoEditTransformer3DModel": Recipe(config=_WAN, inputs=_video),
    "SkyReelsV2Transformer3DModel": Recipe(config=_WAN, inputs=lambda r: _video(r) | {"timestep": torch.tensor([500])}),
    "HeliosTransformer3DModel": Recipe(
        config={k: v for k, v in _WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        inputs=lambda r: _video(
            r, size=16, indices_hidden_states=torch.ones(1, 2), indices_latents_history_short=torch.ones(1, 1),
            indices_latents_history_mid=torch.ones(1, 1), indices_latents_history_long=torch.ones(1, 4),
            latents_history_short=r(1, 4, 1, 16, 16), latents_history_mid=r(1, 4, 1, 16, 16), latents_history_long=r(1, 4, 4, 16, 16),
        ),
    ),
    "HunyuanVideoTransformer3DModel": Recipe(config=_HUNYUANVIDEO, inputs=_hunyuanvideo_inputs),
    "HunyuanVideoFramepackTransformer3DModel": Recipe(
        config=_HUNYUANVIDEO | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        inputs=lambda r: _hunyuanvideo_inputs(
            r, hidden_states=r(1, 4, 3, 4, 4), image_embeds=r(1, 6, 16), indices_latents=torch.arange(3), latents_clean=r(1, 4, 2, 4, 4),
            indices_latents_clean=torch.arange(2), latents_history_2x=r(1, 4, 2, 4, 4), indices_latents_history_2x=torch.arange(2),
            latents_history_4x=r(1, 4, 8, 4, 4), indices_latents_history_4x=torch.arange(8),
        ),
    ),
    "HunyuanVideo15Transformer3DModel": Recipe(
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_refiner_layers": 1,
            "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (2, 2, 4), "target_size": 16,
            "task_type": "t2v",
        },
        inputs=lambda r: _video(
            r, frames=1, encoder_attention_mask=torch.ones(1, 6), encoder_hidden_states_2=r(1, 4, 8), encoder_attention_mask_2=torch.ones(1, 4),
            image_embeds=torch.ones(1, 3, 8),
        ),
    ),
    "MochiTransformer3DModel": Recipe(
        config={
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4,
            "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 8,
        },
        inputs=lambda r: _video(r, encoder_attention_mask=torch.ones(1, 6, dtype=torch.bool)),
    ),
    "MotifVideoTransformer3DModel": Recipe(
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "num_single_layers": 1,
            "text_embed_dim": 16, "image_embed_dim": 8, "rope_axes_dim": (4, 4, 4),
        },
        inputs=lambda r: _video(r, image_embeds=r(1, 3, 8)),
    ),
    "EasyAnimateTransformer3DModel": Recipe(
        config={
            "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 1, "num_layers": 1, "out_channels": 4,
            "patch_size": 2, "sample_height": 8, "sample_width": 8, "text_embed_dim": 16, "time_embed_dim": 8,
        },
        inputs=_video,
    ),
    "CosmosTransformer3DModel": Recipe(
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "mlp_ratio": 2,
            # the mask is resized by torchvision
            "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "concat_padding_mask": False,
        },
        inputs=lambda r: _video(r, frames=1, fps=30),
    ),
    "Cosmos3OmniTransformer": Recipe(
        config={
            "head_dim": 6, "hidden_size": 12, "intermediate_size": 24, "latent_channel": 2, "latent_patch_size": 1, "num_attention_heads": 2,
            "num_hidden_layers": 1, "num_key_value_heads": 1, "patch_latent_dim": 2, "rope_axes_dim": [1, 1, 1], "vocab_size": 32,
        },
        inputs=lambda r: {
            "input_ids": torch.tensor([1, 2]), "text_indexes": torch.tensor([0, 1]), "position_ids": torch.zeros(3, 6, dtype=torch.long),
            "und_len": 2, "sequence_length": 6, "vision_tokens": [r(1, 2, 1, 2, 2)], "vision_token_shapes": [(1, 2, 2)],
            "vision_sequence_indexes": torch.arange(2, 6), "vision_mse_loss_indexes": torch.arange(2, 6), "vision_timesteps": torch.ones(4),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
    ),
    "Kandinsky5Transformer3DModel": Recipe(
        config={
            "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1,
            "axes_dims": (4, 2, 2),
        },
        inputs=lambda r: {
            "hidden_states": r(1, 2, 8, 8, 4), "encoder_hidden_states": r(1, 6, 16), "timestep": _t(), "pooled_projections": r(1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)], "text_rope_pos": torch.arange(6),
        },
    ),
    "Kandinsky6Transformer3DModel": Recipe(
        config={
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "model_dim": 16, "ff_dim": 32,
            "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 2, 2), "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 2, 8, 8, 4), "encoder_hidden_states": r(1, 6, 16), "timestep": _t(), "pooled_projections": r(1, 8),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Recipe(
        config={
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 16, "ff_dim": 32, "num_visual_blocks": 1,
            "axes_dims": (4, 2, 2),
        },
        inputs=lambda r: {"hidden_states": r(1, 1, 8, 8, 9), "timestep": _t()},  # sample, anchor and mask
    ),
    "LTXVideoTransformer3DModel": Recipe(
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 1,
            "caption_channels": 16,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 32, 4), "encoder_hidden_states": r(1, 6, 16), "timestep": _t(),
            "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool), "num_frames": 2, "height": 4, "width": 4,
        },
    ),
    "LTX2VideoTransformer3DModel": Recipe(
        config=_LTX2,
        inputs=lambda r: {
            "hidden_states": r(1, 32, 4), "audio_hidden_states": r(1, 5, 4), "encoder_hidden_states": r(1, 6, 16),
            "audio_encoder_hidden_states": r(1, 6, 16), "timestep": _t(), "num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 5,
        },
    ),
    "SanaVideoTransformer3DModel": Recipe(
        config=_SANA | {"attention_head_dim": 12, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "rope_max_seq_len": 32},
        inputs=lambda r: _video(r, 8),
    ),
    "MiniMaxH3Transformer3DModel": Recipe(
        config={
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "ffn_dim": 32,
            "in_channels": 4, "audio_in_channels": 6, "text_dim": 8, "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 4, 16), "audio_hidden_states": r(1, 3, 6), "encoder_hidden_states": r(1, 2, 8), "timestep": _t(0.7),
            "timestep_indices": torch.zeros(9, dtype=torch.long), "token_tags": torch.tensor([1, 1, 0, 0, 0, 0, 2, 2, 2]),
            "position_ids": torch.arange(9.0)[:, None].expand(9, 3).clone(), "video_indices": torch.arange(2, 6), "audio_indices": torch.arange(6, 9),
            "text_indices": torch.arange(2),
        },
    ),
    "SanaWMTransformer3DModel": Recipe(
        config={
            "in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2, "linear_head_dim": 16,
            "chunk_plucker_channels": 6, "caption_channels": 16, "image_size": 8, "conv_kernel_size": 2,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 4, 2, 4, 4), "timestep": torch.full((1, 1, 2), 500.0), "encoder_hidden_states": r(1, 1, 6, 16),
            "encoder_attention_mask": torch.ones(1, 6),
            "camera_conditions": torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4, 2, 2])]).expand(1, 2, 20).clone(),
            "chunk_plucker": r(1, 6, 2, 4, 4),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Recipe(
        config=_LTX2,
        inputs=lambda r: {
            "hidden_states": r(1, 8, 4), "encoder_hidden_states": r(1, 6, 16), "timestep": torch.full((1, 8), 500.0),
            "video_rotary_emb": (torch.ones(1, 8, 16), torch.zeros(1, 8, 16)), "encoder_attention_mask": torch.ones(1, 6),
        },
    ),
    # Sound and other signals
    "RFD4ProteinaTransformer": Recipe(
        config={
            "nlayers": 2, "token_dim": 16, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "latent_dim": 4, "token_type_emb_dim": 4,
            "cath_emb_dim": 4, "t_emb_dim": 8, "seq_sep_dim": 8, "xt_pair_dist_dim": 6, "update_pair_repr_every_n": 1, "tri_mult_c": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"), "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        inputs=lambda r: {
            "bb_ca": r(1, 5, 3), "local_latents": r(1, 5, 4), "bb_ca_time": _t(0.5), "local_latents_time": _t(0.5),
            "padding_mask": torch.ones(1, 5, dtype=torch.bool), "token_type": torch.zeros(1, 5, dtype=torch.long),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 5, dtype=torch.bool), "supports_local_latent": torch.ones(1, 5, dtype=torch.bool),
            },
        },
    ),
    "StableAudioDiTModel": Recipe(
        config={
            "sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
            "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 8, "time_proj_dim": 8, "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 4, 8), "timestep": _t(0.5), "encoder_hidden_states": r(1, 6, 8), "global_hidden_states": r(1, 1, 8),
            "rotary_embedding": (torch.ones(9, 4), torch.zeros(9, 4)),
        },
    ),
    "StableAudio3DiTModel": Recipe(
        config={
            "io_channels": 4, "embed_dim": 128, "depth": 1, "num_heads": 2, "cond_token_dim": 8, "global_cond_dim": 8, "local_add_cond_dim": 5,
            "timestep_features_dim": 8, "ff_mult": 2.0, "num_memory_tokens": 2,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 4, 8), "timestep": _t(0.5), "encoder_hidden_states": r(1, 6, 8), "global_hidden_states": r(1, 8),
            "local_add_cond": r(1, 5, 8),
        },
    ),
    "AceStepTransformer1DModel": Recipe(
        config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 8,
        },
        inputs=lambda r: {
            "hidden_states": r(1, 8, 4), "timestep": _t(0.5), "timestep_r": _t(0.4), "encoder_hidden_states": r(1, 6, 32),
            "context_latents": r(1, 8, 8),
        },
    ),
    "LongCatAudioDiTTransformer": Recipe(
        config={"dit_dim": 64, "dit_depth": 1, "dit_heads": 4, "dit_text_dim": 16, "latent_dim": 4},
        inputs=lambda r: {
            "hidden_states": r(1, 8, 4), "encoder_hidden_states": r(1, 6, 16), "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
            "timestep": _t(0.5), "latent_cond": r(1, 8, 4),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": Recipe(
        config={
            "in_channels": 4, "condition_dim": 16, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "ff_inner_dim": 32,
            "rotary_dim": 4, "fourier_embedding_dim": 8,
        },
        inputs=lambda r: {"hidden_states": r(1, 4, 8), "encoder_hidden_states": r(1, 8, 16), "timestep": _t(0.5)},
    ),
    "T5FilmDecoder": Recipe(
        config={"input_dims": 8, "targets_length": 8, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        inputs=lambda r: {
            "encodings_and_masks": [(r(1, 6, 16), torch.ones(1, 6))], "decoder_input_tokens": r(1, 8, 8), "decoder_noise_time": _t(0.5),
        },
    ),
}  # fmt: skip
