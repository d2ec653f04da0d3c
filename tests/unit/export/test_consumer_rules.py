"""Maps of other tools, read by us and by the tool itself: both must give every layer the same width.

Tools that are not installed are skipped by name; the widths written out below are what their own code gave (auto-round
0.16.1, ModelOpt 0.47, coremltools 9.0, mlx-lm's predicate).
"""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mpqsearch.core import LayerTable
from mpqsearch.export import read_map
from mpqsearch.export.reading import bits_of
from mpqsearch.export.sdnq import WITHOUT_COMPILER
from mpqsearch.models import discover
from mpqsearch.sampling import adapt


@pytest.fixture(scope="module")
def module() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=4,
        norm_num_groups=1,
    )


@pytest.fixture(scope="module")
def table(module: nn.Module) -> LayerTable:
    return discover(adapt(module, sample_shape=(4, 8, 8), n_classes=4, null_class=4))


def imported(folder: Path, table: LayerTable, data: Any, name: str = "config.json") -> dict[str, int]:
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return {n: int(w) for n, w in read_map(folder / name, table).bit_map.weights.items()}


def config(**settings: Any) -> dict[str, Any]:
    return {"_class_name": "DiTTransformer2DModel", "quantization_config": settings}


INT4, INT8 = (
    {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": f"int{b}"}},
    }
    for b in (4, 8)
)


def rules(kind: str) -> list[dict[str, Any]]:
    """Configurations in the words of torchao or SDNQ, some drawn at random from parts of the model's names."""
    parts = ["attn1", "proj_out_2", "transformer_blocks", "norm1", "0", "net", "transformer_blocks.1", "to_q", "proj"]
    rng = random.Random(0)
    drawn = []
    for _ in range(12):
        names = [p if rng.random() < 0.5 else f"*{p}*" for p in rng.sample(parts, 4)]
        if kind == "sdnq":
            some: dict[str, Any] = {
                "modules_dtype_dict": {"uint3": names[:1], rng.choice(["minimum_6bit", "int7bits", "int5"]): names[1:2]}
            }
            some |= {"modules_to_not_convert": names[2:3], "weights_dtype": rng.choice(["int8", "uint4", "int5"])}
            some |= {"modules_quant_config": {names[3]: {"weights_dtype": "int2"}}} if rng.random() < 0.5 else {}
            drawn.append(some | {"quant_conv": rng.random() < 0.5})
        else:
            entries = {f"re:.*{n.strip('*')}.*": rng.choice([INT4, None]) for n in names[:2]}
            entries |= {"proj_out_1": INT8} | ({"_default": INT8} if rng.random() < 0.5 else {})
            drawn.append({"entries": entries, "modules_to_not_convert": [names[2].strip("*")]})
    return drawn


@pytest.mark.parametrize("case", range(12))
def test_sdnq(case: int, module: nn.Module, table: LayerTable, tmp_path: Path) -> None:
    os.environ.setdefault(*WITHOUT_COMPILER)
    utils = pytest.importorskip("sdnq.utils")
    quantizer = pytest.importorskip("sdnq.quantizer")
    settings = rules("sdnq")[case]
    # its class sorts "minimum" keys and the like by itself: ask for the width of every parameter through it
    theirs = quantizer.SDNQConfig(**copy.deepcopy(settings), add_skip_keys=False)
    expected = {}
    modules = dict(module.named_modules())
    for layer in table:
        name, owner = f"{layer.name}.weight", modules[layer.name]
        allowed = utils.check_quant_is_allowed(type(owner).__name__, owner.weight, theirs, pre_quantized=True)
        if not allowed or utils.check_param_name_in(name, theirs.modules_to_not_convert) is not None:
            expected[layer.name] = 16
            continue
        dtype = utils.get_quant_kwargs(owner, theirs, torch_dtype=torch.float32, param_name=name)["weights_dtype"]
        expected[layer.name] = utils.dtype_dict[dtype]["num_bits"]
    if set(expected.values()) == {16}:
        pytest.skip("nothing is quantized")
    assert imported(tmp_path, table, config(quant_method="sdnq", **settings)) == expected


def test_sdnq_dynamic(module: nn.Module, table: LayerTable, tmp_path: Path) -> None:
    """What SDNQ chooses by itself, from the error of each weight: the folder that it saves says it all."""
    os.environ.setdefault(*WITHOUT_COMPILER)
    pytest.importorskip("sdnq")
    from diffusers import SDNQConfig

    model: Any = copy.deepcopy(module)
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight.copy_(torch.randn(64, 256).pow(3))  # heavy tails
    model.save_pretrained(tmp_path / "plain")
    asked = SDNQConfig(weights_dtype="uint4", use_dynamic_quantization=True, dynamic_loss_threshold=4e-3)
    made = type(model).from_pretrained(tmp_path / "plain", quantization_config=asked, torch_dtype=torch.float32)
    made.save_pretrained(tmp_path / "dynamic")
    theirs = type(model).from_pretrained(tmp_path / "dynamic", torch_dtype=torch.float32)
    layers = dict(theirs.named_modules())
    held = {la.name: getattr(layers[la.name], "sdnq_dequantizer", None) for la in table}
    expected = {n: 16 if d is None else bits_of(d.weights_dtype) for n, d in held.items()}
    assert set(expected.values()) == {4, 5, 6, 16}, expected
    read = read_map(tmp_path / "dynamic", table)
    assert {n: int(w) for n, w in read.bit_map.weights.items()} == expected


@pytest.mark.parametrize("case", range(12))
def test_torchao_through_diffusers(case: int, module: nn.Module, table: LayerTable, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from diffusers.quantizers.torchao import TorchAoHfQuantizer
    from torchao.core.config import config_from_dict

    drawn = rules("torchao")[case]
    data = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": drawn["entries"]}}
    full = {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {"fqn_to_config": drawn["entries"], "module_fqn_to_config": {}},
    }
    try:
        theirs = config_from_dict(full)
    except (TypeError, ValueError):
        theirs = config_from_dict(data)
    quantizer = TorchAoHfQuantizer(
        TorchAoConfig(theirs, modules_to_not_convert=drawn["modules_to_not_convert"]), pre_quantized=False
    )
    quantizer.modules_to_not_convert = list(drawn["modules_to_not_convert"])
    clone = copy.deepcopy(module)
    for name, parameter in list(clone.named_parameters()):
        if quantizer.check_if_quantized_param(clone, parameter, name, {}):
            quantizer.create_quantized_param(clone, parameter.data, name, torch.device("cpu"), {}, [])
    owners = dict(clone.named_modules())
    types = {la.name: getattr(owners[la.name].weight, "target_dtype", None) for la in table}
    expected = {n: 16 if t is None else int(str(t).removeprefix("torch.int")) for n, t in types.items()}
    skipped = drawn["modules_to_not_convert"]
    found = config(quant_method="torchao", quant_type={"default": data}, modules_to_not_convert=skipped)
    assert imported(tmp_path, table, found) == expected


def by_rule(table: LayerTable, width: Any) -> dict[str, int]:
    return {layer.name: width(layer) if layer.kind == "Linear" else 16 for layer in table}


def test_autoround_quantizes_the_blocks_that_are_named(table: LayerTable, tmp_path: Path) -> None:
    base = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    inside = by_rule(table, lambda la: 4 if la.name.startswith("transformer_blocks") else 16)
    assert imported(tmp_path, table, config(**base, block_name_to_quantize="transformer_blocks")) == inside
    assert imported(tmp_path, table, config(**base)) == inside, "default: all lists of blocks"
    first = by_rule(table, lambda la: 4 if la.name.startswith("transformer_blocks.0") else 16)
    assert imported(tmp_path, table, config(**base, block_name_to_quantize=["transformer_blocks.0"])) == first
    less = inside | {n: 16 for n in inside if "attn1" in n} | {"proj_out_2": 8}
    extra = {"proj_out_2": {"bits": 8}}
    settings = config(**base, modules_to_not_convert=["attn1"], extra_config=extra)
    assert imported(tmp_path, table, settings) == less
    only = {n: 16 if "to_q" not in n else w for n, w in inside.items()}
    assert imported(tmp_path, table, config(**base, modules_in_block_to_quantize=[["to_q"]])) == only
    # an expression speaks of layers inside the blocks first, and of others only when none of those fits
    outside = {r"proj_out_\d": {"bits": 8}, r"to_[qk]": {"bits": 3}}
    expected = {n: 8 if "proj_out_" in n else 3 if n.endswith(("to_q", "to_k")) else w for n, w in inside.items()}
    assert imported(tmp_path, table, config(**base, extra_config=outside)) == expected


def test_modelopt_entries_apply_in_order_and_by_class(table: LayerTable, tmp_path: Path) -> None:
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*", "parent_class": "nn.BatchNorm2d", "enable": False},
        {"quantizer_name": "*", "parent_class": "nn.Conv2d", "enable": False},
        {"quantizer_name": "*attn1*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
        {"quantizer_name": "*attn1.to_v*", "enable": False},
        {"quantizer_name": "*attn1.to_v.weight_quantizer", "enable": True},
    ]
    expected = by_rule(table, lambda la: 4 if "attn1" in la.name else 8)
    assert imported(tmp_path, table, {"quant_cfg": entries, "algorithm": "max"}, "modelopt_config.json") == expected
    older = {"default": {"enable": False}, "*attn1*weight_quantizer": {"num_bits": (4), "axis": 0}}
    older |= {"nn.Conv2d": {"*weight_quantizer": {"num_bits": 6}}}
    expected = {la.name: 6 if la.kind == "Conv2d" else 4 if "attn1" in la.name else 16 for la in table}
    assert imported(tmp_path, table, {"quant_cfg": older}, "modelopt_config.json") == expected


def test_rules_of_sdcpp_see_the_name_of_the_weight(table: LayerTable, tmp_path: Path) -> None:
    widths = imported(tmp_path, table, "attn1.*weight=q8_0,transformer_blocks.*=q4_0\n", "rules.txt")
    skipped = ("embedding", "pos_embed")
    expected = {}
    for layer in table:
        fits = layer.kind == "Linear" and layer.weights_per_channel % 32 == 0
        named = "attn1" in layer.name or "transformer_blocks" in layer.name
        free = not any(part in layer.name for part in skipped)
        expected[layer.name] = (8 if "attn1" in layer.name else 4) if fits and named and free else 16
    assert widths == expected


def test_coreml_names_types_and_the_rest(table: LayerTable, tmp_path: Path) -> None:
    data = {
        "global_config": {"n_bits": 4, "granularity": "per_tensor"},
        "module_type_configs": {"Conv2d": None},
        "module_name_configs": {
            "proj_out_2": {"n_bits": 8},
            r"transformer_blocks\.0\..*": {"n_bits": 2},
            "proj_out_1": None,
        },
    }
    special = {"proj_out_2": 8, "proj_out_1": 16}
    expected = by_rule(table, lambda la: special.get(la.name, 2 if la.name.startswith("transformer_blocks.0.") else 4))
    assert imported(tmp_path, table, data, "coreml_config.json") == expected


def test_mlx_leaves_rows_that_its_groups_do_not_divide(table: LayerTable, tmp_path: Path) -> None:
    data = {
        "quantization": {"group_size": 64, "bits": 4, "proj_out_1": {"bits": 6, "group_size": 32}, "proj_out_2": False}
    }
    special = {"proj_out_1": 6, "proj_out_2": 16}
    expected = by_rule(table, lambda la: special.get(la.name, 4 if la.weights_per_channel % 64 == 0 else 16))
    assert imported(tmp_path, table, data) == expected
    large = by_rule(table, lambda la: 4 if la.weights_per_channel % 128 == 0 else 16)
    assert 4 in large.values()
    assert imported(tmp_path, table, {"quantization": {"group_size": 128, "bits": 4}}) == large


def drawn(seed: int, make: Any) -> list[Any]:
    rng = random.Random(seed)
    return [make(rng) for _ in range(8)]


def autoround_settings(rng: random.Random) -> dict[str, Any]:
    parts = ["attn1", "proj_out_2", r"norm1\.", "net", "transformer_blocks.1", "to_q", r"to_[kv]", r"proj_out_\d"]
    settings: dict[str, Any] = {"bits": rng.choice([4, 8]), "group_size": 32, "sym": True, "data_type": "int"}
    settings["extra_config"] = {p: {"bits": rng.choice([2, 3, 16])} for p in rng.sample(parts, 2)}
    if rng.random() < 0.5:
        blocks = ["transformer_blocks", ["transformer_blocks.0"], "transformer_blocks.1,proj_out_1"]
        settings["block_name_to_quantize"] = rng.choice(blocks)
    if rng.random() < 0.4:
        settings["modules_to_not_convert"] = [rng.choice(["attn1", "ff"])]
    if rng.random() < 0.3:
        settings["modules_in_block_to_quantize"] = [["to_q", "net"]]
    return settings


def modelopt_entries(rng: random.Random) -> list[dict[str, Any]]:
    parts = ["attn1", "proj_out", "norm1", "net", "transformer_blocks.1", "to_q", "to_v"]
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}] if rng.random() < 0.7 else []
    for _ in range(4):
        entry: dict[str, Any] = {"quantizer_name": f"*{rng.choice(parts)}*weight_quantizer"}
        entry |= {"cfg": {"num_bits": rng.choice([3, 4, 6]), "axis": 0}} if rng.random() < 0.6 else {}
        entry |= {"enable": rng.random() < 0.5} if "cfg" not in entry or rng.random() < 0.3 else {}
        entry |= {"parent_class": rng.choice(["nn.Linear", "nn.Conv2d"])} if rng.random() < 0.3 else {}
        entries.append(entry)
    return entries


def coreml_settings(rng: random.Random) -> dict[str, Any]:
    def one(bits: int) -> dict[str, Any]:
        return {"n_bits": bits, "granularity": "per_tensor"}

    names = [".*attn1.*", "proj_out_2", r".*\.to_q", r"transformer_blocks\.0\..*"]
    settings: dict[str, Any] = {"module_name_configs": {n: rng.choice([one(2), None]) for n in rng.sample(names, 3)}}
    settings |= {"global_config": one(6)} if rng.random() < 0.6 else {}
    if rng.random() < 0.5:
        settings["module_type_configs"] = {rng.choice(["Linear", "Conv2d"]): rng.choice([one(8), None])}
    return settings


def same(expected: dict[str, int], table: LayerTable, folder: Path, data: Any, name: str) -> None:
    if set(expected.values()) != {16}:  # a file that quantizes nothing is refused
        assert imported(folder, table, data, name) == expected


@pytest.mark.parametrize("settings", drawn(2, autoround_settings))
def test_autoround_itself(settings: Any, module: nn.Module, table: LayerTable, tmp_path: Path) -> None:
    convert = pytest.importorskip("auto_round.inference.convert_model")
    resolved = convert.get_layer_config(module, SimpleNamespace(**copy.deepcopy(settings)))
    expected = {la.name: min(int(resolved[la.name].bits), 16) if la.name in resolved else 16 for la in table}
    same(expected, table, tmp_path, config(quant_method="auto-round", **settings), "config.json")


@pytest.mark.parametrize("entries", drawn(1, modelopt_entries))
def test_modelopt_itself(entries: Any, module: nn.Module, table: LayerTable, tmp_path: Path) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    recipe = {"quant_cfg": entries, "algorithm": "max"}
    clone = copy.deepcopy(module)
    mtq.quantize(clone, copy.deepcopy(recipe), forward_loop=None)
    quantizers = {n: getattr(m, "weight_quantizer", None) for n, m in clone.named_modules()}
    expected = {
        la.name: int(q.num_bits) if (q := quantizers[la.name]) is not None and q.is_enabled else 16 for la in table
    }
    same(expected, table, tmp_path, recipe, "modelopt_config.json")


@pytest.mark.parametrize("settings", drawn(3, coreml_settings))
def test_coreml_itself(settings: Any, module: nn.Module, table: LayerTable, tmp_path: Path) -> None:
    palettization = pytest.importorskip("coremltools.optimize.torch.palettization")
    theirs = palettization.PostTrainingPalettizerConfig.from_dict(copy.deepcopy(settings))
    modules = dict(module.named_modules())
    found = {la.name: theirs.get_module_config(la.name, modules[la.name]) for la in table}
    expected = {n: 16 if c is None else int(c.n_bits) for n, c in found.items()}
    same(expected, table, tmp_path, settings, "coreml_config.json")


@pytest.mark.parametrize("case", range(8))
def test_ctq(case: int, table: LayerTable, tmp_path: Path) -> None:
    theirs = pytest.importorskip("convert_to_quant.config.layer_config")
    rng = random.Random(case)
    parts = [
        "attn1",
        r"proj_out_\d",
        r"transformer_blocks\.\d+\.",
        "norm1",
        r"ff\.net",
        r"transformer_blocks\.1",
        "to_[qk]",
    ]
    keys = [f"^.*{p}" if rng.random() < 0.3 else p for p in rng.sample(parts, 4)]
    settings = [{"format": "float8_e4m3fn"}, {"format": "int8_tensorwise"}, {"skip": True}]
    data: dict[str, Any] = {key: rng.choice(settings) for key in keys} | {keys[0]: settings[0]}
    data |= {"_default": rng.choice(settings)} if rng.random() < 0.5 else {}
    read = imported(tmp_path, table, data, "layers.json")
    config = theirs.load_layer_config(str(tmp_path / "layers.json"))
    for layer in (la for la in table if la.kind == "Linear"):
        said = theirs.get_layer_settings(f"{layer.name}.weight", config)
        assert read[layer.name] == (16 if said is None or said.get("skip") else 8), layer.name
