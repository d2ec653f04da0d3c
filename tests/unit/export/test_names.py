"""Names of published checkpoints: diffusers, which reads those, is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_model
from torch import nn

from mpqsearch.core import LayerSpec, LayerTable
from mpqsearch.export.names import PREFIX, SCHEMES, fused, in_diffusers, joined, places, separated
from tests.support.denoisers import RECIPES, model_classes

WIDE = {
    "FluxTransformer2DModel": {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
}
"""diffusers reads checkpoints of FLUX.1 of the published width alone."""


def parameters(name: str) -> dict[str, torch.Tensor]:
    """A column of different numbers for every parameter of a small model of this class, with as many rows."""
    with torch.device("meta"):
        module: nn.Module = model_classes()[name](**RECIPES[name].config | WIDE.get(name, {}))
    out, n = {}, 0
    for key, tensor in module.state_dict().items():
        rows = len(tensor)
        out[key] = torch.arange(n, n + rows, dtype=torch.float64)[:, None]
        n += rows
    return out


@pytest.mark.parametrize("name", [*SCHEMES, "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel"])
def test_diffusers_reads_what_is_renamed(name: str) -> None:
    original = parameters(name)
    found = places(original)
    assert found is not None
    checkpoint = joined(original, found)
    rows = {key: len(tensor) for key, tensor in original.items()}
    back = separated(checkpoint, found, rows)
    assert all(torch.equal(back[key], tensor) for key, tensor in original.items())
    convert: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    prefix = PREFIX if name == "UNet2DConditionModel" else ""
    config = {"num_class_embeds": None, "addition_embed_type": "text_time"} | RECIPES[name].config
    read = convert({prefix + key: tensor for key, tensor in checkpoint.items()}, config=config)
    assert read.keys() == original.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize(
    "name", ["UNet3DConditionModel", "HunyuanVideoTransformer3DModel", "LTX2VideoTransformer3DModel"]
)
def test_relatives_keep_their_names(name: str) -> None:
    with torch.device("meta"):
        module = model_classes()[name](**RECIPES[name].config)
    assert places(module.state_dict()) is None


def flux() -> LayerTable:
    with torch.device("meta"):
        module = model_classes()["FluxTransformer2DModel"](**RECIPES["FluxTransformer2DModel"].config)
    linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    layers = (LayerSpec(name=n, kind="Linear", weight_shape=tuple(m.weight.shape)) for n, m in linear.items())
    return LayerTable(digest="0", layers=tuple(layers))


def test_values_of_joined_layers_go_to_all_their_parts() -> None:
    table = flux()
    block = "single_transformer_blocks.0"
    assert tuple(f"{block}.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")) in fused(table)
    read = in_diffusers({f"{PREFIX}double_blocks.0.txt_attn.qkv": 4, "img_in": 8, "nothing.here": 2}, table)
    assert read == {f"transformer_blocks.0.attn.add_{p}_proj": 4 for p in "qkv"} | {"x_embedder": 8, "nothing.here": 2}
    assert in_diffusers({"x_embedder": 8}, table) == {"x_embedder": 8}, "names of diffusers stay as they are"
