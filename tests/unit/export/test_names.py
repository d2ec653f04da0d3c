"""Names of published checkpoints: diffusers, which reads those, is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_model
from torch import nn

from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable
from mpqsearch.export import ExportJob, check, get_exporter, read_map
from mpqsearch.export.names import PREFIX, SCHEMES, fused, in_diffusers, joined, places, separated
from mpqsearch.sampling import adapt
from tests.conformance.test_exporters import own_map
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


LARGER: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {"attention_head_dim": 16, "caption_projection_dim": 32, "joint_attention_dim": 32},
    "WanTransformer3DModel": {"attention_head_dim": 16, "added_kv_proj_dim": 32, "text_dim": 32, "image_dim": 32},
    "UNet2DConditionModel": {"block_out_channels": (32, 64), "norm_num_groups": 8, "cross_attention_dim": 32},
}
"""Rows that blocks of 32 fit."""


@pytest.mark.parametrize("name", LARGER)
def test_diffusers_reads_a_gguf_file_under_published_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("libgguf")
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    monkeypatch.setattr(check, "write_check", lambda *_: [])  # the model is not called
    torch.manual_seed(0)
    cls: Any = model_classes()[name]
    module = cls(**RECIPES[name].config | LARGER[name])
    linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    layers = (LayerSpec(name=n, kind="Linear", weight_shape=tuple(m.weight.shape)) for n, m in linear.items())
    table, target = LayerTable(digest="0", layers=tuple(layers)), get_exporter("gguf")
    bit_map, choices = own_map(target, table, seed=1)
    job = ExportJob(table=table, bit_map=bit_map, denoiser=adapt(module, sample_shape=(4, 8, 8)), choices=choices)
    assert target.unread(module) == "", "others load it too"
    target.write(tmp_path, job)
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    file = str(tmp_path / "diffusion_model.gguf")
    loaded = cls.from_single_file(file, quantization_config=config, config=str(tmp_path), torch_dtype=torch.float32)
    types = {n: m.weight for n, m in loaded.named_modules() if isinstance(getattr(m, "weight", None), GGUFParameter)}
    planned = {e.layer: e.choice for e in target.plan(job) if e.choice}
    assert planned
    held = {n: kind for n, kind in planned.items() if not set(n.split(".")) & set(cls._keep_in_fp32_modules or ())}
    assert {n: weight.quant_type.name for n, weight in types.items()} == held
    ours = target.weights(tmp_path)
    for layer, weight in types.items():
        assert torch.equal(ours[f"{layer}.weight"], dequantize_gguf_tensor(weight).float()), layer
    read = read_map(file, table)
    assert {n for n, w in read.bit_map.weights.items() if int(w) < FULL_PRECISION} == set(planned)
