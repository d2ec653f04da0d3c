"""Files in the words of the consumers' own documentation, and what they mean for the layers of a model."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqsearch.artifacts import save_bit_map
from mpqsearch.core import BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.errors import ArtifactError, ConfigError, LayerMismatchError, UnknownNameError
from mpqsearch.export import SOURCES, import_map, neutral_extra, read_map, reading

TABLE = LayerTable(
    digest="d" * 64,
    model="tiny",
    layers=(
        LayerSpec(name="conv_in", kind="Conv2d", weight_shape=(8, 4, 3, 3)),
        LayerSpec(name="blocks.0.to_q", kind="Linear", weight_shape=(64, 32)),
        LayerSpec(name="blocks.0.to_k", kind="Linear", weight_shape=(64, 32)),
        LayerSpec(name="blocks.1.to_q", kind="Linear", weight_shape=(64, 32)),
        LayerSpec(name="proj_out", kind="Linear", weight_shape=(4, 64)),
    ),
)
NAMES = [la.name for la in TABLE]


def config(method: str, **more: Any) -> dict[str, Any]:
    return {"_class_name": "X", "quantization_config": {"quant_method": method, **more}}


INTX = {
    "_type": "IntxWeightOnlyConfig",
    "_version": 2,
    "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "int3"}},
}
INT8 = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}

FOREIGN = {
    "quanto": (
        "quanto_qmap.json",
        {
            "conv_in": {"weights": "qint8", "activations": "none"},
            "blocks.0.to_q": {"weights": "qint4", "activations": "qint8"},
            "blocks.1.to_q": {"weights": "qfloat8_e4m3fn", "activations": "none"},
            "proj_out": {"weights": "none", "activations": "none"},
        },
        [8, 4, 16, 8, 16],
    ),
    "autoround": (
        "config.json",
        config(
            "auto-round",
            bits=4,
            group_size=32,
            extra_config={"blocks.0.to_q": {"bits": 3}, r".*1\.to.*": {"bits": 8}, "proj_out": {"bits": 16}},
        ),
        [16, 3, 4, 8, 16],
    ),
    "torchao": (
        "config.json",
        config(
            "torchao",
            quant_type={
                "default": {
                    "_type": "FqnToConfig",
                    "_data": {
                        "fqn_to_config": {
                            "blocks.0.to_q": INTX,
                            r"re:blocks\.0\..*": INT8,
                            "proj_out.weight": None,
                            "_default": INTX,
                        }
                    },
                }
            },
        ),
        [16, 3, 8, 3, 16],
    ),
    "mlx": (
        "config.json",
        {
            "quantization": {
                "group_size": 32,
                "bits": 4,
                "blocks.0.to_q": {"group_size": 32, "bits": 6},
                "proj_out": False,
            }
        },
        [16, 6, 4, 4, 16],
    ),
    "sdnq": (
        "config.json",
        config(
            "sdnq",
            weights_dtype="int8",
            quant_conv=True,
            modules_dtype_dict={"uint3": ["blocks.0.to_q.weight"], "float8_e4m3fn": ["blocks.0.to_k.weight"]},
            modules_to_not_convert=["proj_out.weight"],
        ),
        [8, 3, 8, 8, 16],
    ),
    "modelopt": (
        "modelopt_config.json",
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*.to_q.weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}, "enable": True},
                {"quantizer_name": "blocks.1.to_q.weight_quantizer", "cfg": {"num_bits": [4, 3]}, "enable": True},
            ]
        },
        [16, 4, 16, 8, 16],
    ),
    "coreml": ("x.json", {"module_name_configs": {"conv_in": {"n_bits": 6}, "proj_out": None}}, [6, 16, 16, 16, 16]),
    "ctq": (
        "x.json",
        {
            r"blocks\.\d+\.to_q": {"format": "float8_e4m3fn"},
            r"blocks\.0": {"format": "int8_tensorwise"},
            "blocks.1.to_q": {"skip": True},
            "_default": {"skip": True},
        },
        [16, 8, 8, 8, 16],
    ),
    "diffsynth": (
        "diffsynth_quant.json",
        {
            "configs": [
                {"method": "torchao_int8_w8a16", "exclude_modules": ["to_q"]},
                {"method": "bitsandbytes_nf4", "target_modules": ["blocks.1.to_q"]},
            ]
        },
        [16, 16, 8, 4, 8],
    ),
    "cachedit": (
        "cache_dit_quant.json",
        {
            "quant_type": "float8_weight_only",
            "precision_plan": {"to_q": "int4_weight_only"},
            "exclude_layers": ["to_k"],
        },
        [16, 4, 16, 4, 16],
    ),
    "comfyui": (
        "meta.json",
        {
            "_quantization_metadata": {
                "format_version": "1.0",
                "layers": {"model.diffusion_model.proj_out": {"format": "float8_e4m3fn"}},
            }
        },
        [16, 16, 16, 16, 8],
    ),
}


def written(folder: Path, name: str, data: Any) -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def widths(bit_map: BitMap) -> list[int]:
    return [int(bit_map.weights[n]) for n in NAMES]


@pytest.mark.parametrize("source", FOREIGN)
def test_a_file_is_known_by_what_it_holds(source: str, tmp_path: Path) -> None:
    name, data, expected = FOREIGN[source]
    path = written(tmp_path, name, data)
    for where in (path, tmp_path) if not name.startswith(("x.", "meta.")) else (path,):
        imported = read_map(where, TABLE)
        assert imported.source == source
        assert widths(imported.bit_map) == expected
    assert widths(read_map(path, TABLE, source).bit_map) == expected
    floats = any("float" in n for n in imported.notes)
    assert floats == (source in ("quanto", "sdnq", "comfyui", "ctq", "diffsynth"))


def test_every_target_but_the_graph_is_importable() -> None:
    assert set(SOURCES) == {*FOREIGN, "gguf", "sdcpp", "neutral"}


def test_rules_of_sdcpp_in_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, "rules.txt", r"^blocks\.0\.to_q\.weight$=q8_0,blocks\.0=q4_K,to_q=q5_1,proj_out=f16")
    imported = read_map(path, TABLE)
    assert widths(imported.bit_map) == [16, 8, 16, 5, 16], "rows of 32 do not fit blocks of 256: left alone"
    assert "1 layers that the program leaves alone" in imported.notes[0]
    written(tmp_path, "rules.txt", "to_q=q9_9")
    with pytest.raises(ArtifactError, match="q9_9"):
        read_map(path, TABLE)


def test_gguf_types_become_the_widths_of_their_codes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    rows = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    for name, kind in (("blocks.0.to_q", "Q8_0"), ("blocks.0.to_k", "Q5_1")):
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"model.diffusion_model.{name}.weight", gguf.quants.quantize(rows, raw), raw_dtype=raw)
    writer.add_tensor("conv_in.weight", np.zeros((8, 4, 3, 3), dtype=np.float16))
    writer.add_tensor("norm.weight", np.zeros(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for where in (path, tmp_path):
        imported = read_map(where, TABLE)
        assert (imported.source, widths(imported.bit_map)) == ("gguf", [16, 8, 5, 16, 16])
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged or no GGUF"):
        read_map(path, TABLE)


def neutral(path: Path, table: LayerTable = TABLE) -> BitMap:
    weights = {la.name: np.array(3, dtype=np.uint8) for la in table} | {
        "conv_in": np.array([2, 2, 2, 2, 4, 4, 4, 4], dtype=np.uint8)
    }
    bit_map = BitMap(model_digest=table.digest, weights=weights, format=QuantFormat(scheme="auto"))
    save_bit_map(path, bit_map, {"layers": "x"}, neutral_extra(table, bit_map))
    return bit_map


def test_our_own_map_comes_back_whole(tmp_path: Path) -> None:
    made = neutral(tmp_path / "bitmap.json")
    for where in (tmp_path, tmp_path / "bitmap.json"):
        imported = read_map(where, TABLE, fmt=QuantFormat(scheme="symmetric"))
        assert imported.bit_map.digest == made.digest, "its settings are its own"
    retrained = LayerTable(digest="e" * 64, layers=TABLE.layers)
    moved = read_map(tmp_path, retrained)
    assert moved.bit_map.model_digest == "e" * 64
    assert "other weights" in moved.notes[0]
    with pytest.raises(LayerMismatchError, match="missing"):
        read_map(
            tmp_path,
            LayerTable(
                digest="d" * 64, layers=(*TABLE.layers, LayerSpec(name="new", kind="Linear", weight_shape=(2, 2)))
            ),
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"blocks.9.to_q": {"weights": "qint4"}},
            r"the layer 'blocks\.9\.to_q' \(did you mean 'blocks\.[01]\.to_q'\?\), which 'tiny' does not have",
        ),
        ({"conv_in": {"weights": "qint12"}}, r"gives 'conv_in' 12 bits; widths are 1 to 8, or 16"),
        ({"conv_in": {"weights": "qfancy"}}, "'qfancy' names no width"),
        ({"conv_in": {"weights": None}}, "quantizes no layer"),
        ("{", "no valid JSON"),
        ({"something": "else"}, r"no bit map that is known .*Say which with --from"),
    ],
)
def test_what_cannot_be_is_refused_by_name(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((ArtifactError, LayerMismatchError), match=message):
        read_map(written(tmp_path, "quanto_qmap.json", data), TABLE)


def test_sources_and_places_that_do_not_fit(tmp_path: Path) -> None:
    path = written(tmp_path, "quanto_qmap.json", FOREIGN["quanto"][1])
    with pytest.raises(UnknownNameError, match="did you mean 'quanto'"):
        read_map(path, TABLE, "quant")
    with pytest.raises(ArtifactError, match="of the format 'mlx'"):
        read_map(path, TABLE, "mlx")
    with pytest.raises(ArtifactError, match="does not exist"):
        read_map(tmp_path / "nothing", TABLE)
    written(tmp_path, "coreml_config.json", FOREIGN["coreml"][1])
    with pytest.raises(ConfigError, match="as quanto and as coreml. Say which"):
        read_map(tmp_path, TABLE)
    assert read_map(tmp_path, TABLE, "coreml").source == "coreml"


def test_the_front_door_gives_the_map_and_logs_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "quanto_qmap.json", FOREIGN["quanto"][1])
    bit_map = import_map(str(path), TABLE)
    assert widths(bit_map) == FOREIGN["quanto"][2]
    assert "quantized activations are not taken over" in caplog.text


DAMAGED = [
    ("config.json", config("auto-round", bits="four")),
    ("config.json", config("auto-round", bits=4.5)),
    ("config.json", config("auto-round", bits=True)),
    ("config.json", config("auto-round", extra_config=["a"])),
    ("config.json", config("auto-round", extra_config={"blocks[": {"bits": 4}})),
    ("config.json", config("auto-round", modules_to_not_convert=["("])),
    ("config.json", config("sdnq", modules_dtype_dict={"uint3": 5})),
    ("config.json", config("sdnq", weights_dtype="best")),
    ("config.json", config("sdnq", modules_to_not_convert=["*[("])),
    (
        "config.json",
        config("torchao", quant_type={"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": [1]}}}),
    ),
    (
        "config.json",
        config("torchao", quant_type={"default": {"_type": "X", "_data": {"fqn_to_config": {"re:(": INT8}}}}),
    ),
    ("config.json", config("torchao", quant_type="finest")),
    ("config.json", {"quantization": {"group_size": 0, "bits": 4}}),
    ("config.json", {"quantization": {"group_size": "all", "bits": 4}}),
    ("modelopt_config.json", {"quant_cfg": [5]}),
    ("modelopt_config.json", {"quant_cfg": [{"quantizer_name": "*", "cfg": {"num_bits": [4, 3, 2]}}]}),
    ("coreml_config.json", {"global_config": "4 bits"}),
    ("coreml_config.json", {"module_name_configs": {"*": {"n_bits": 4}}}),
    ("comfyui_metadata.json", {"_quantization_metadata": {"layers": {"proj_out": 8}}}),
    ("quanto_qmap.json", {"conv_in": {"weights": ["qint8"]}}),
    ("bitmap.json", {"schema": "mpqsearch/bitmap", "data": 5}),
    ("rules.txt", "to_q(=q8_0"),
]


@pytest.mark.parametrize(("name", "data"), DAMAGED)
def test_damaged_files_and_expressions_are_one_line_errors(name: str, data: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_map(written(tmp_path, name, data), TABLE)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("text", [r"(.|..|\w)*\.\d\d\d$", r"^(?:(?:\w|\.)|[a-z_]|.\w)*\.\d\d\d$"])
def test_an_expression_that_would_hang_is_given_up(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "MATCHING_S", 0.5)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    table = LayerTable(digest="d", layers=(LayerSpec(name=name, kind="Linear", weight_shape=(32, 32)),))
    began = time.process_time()
    with pytest.raises(ArtifactError, match=r"takes more than 0\.5 s"):
        read_map(written(tmp_path, "rules.txt", f"{text}=q8_0"), table)
    assert time.process_time() - began < 5


def gguf_header(values: bytes = b"", n_values: int = 0, n_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + values


def key(name: bytes = b"k") -> bytes:
    return struct.pack("<Q", len(name)) + name


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"GG", "no GGUF file"),
        (b"GGUF", "cut off or damaged"),
        (gguf_header(n_values=10**11), "claims 100,000,000,000 values"),
        (gguf_header(n_tensors=2**63), "values, more than"),
        (gguf_header(key() + struct.pack("<IIQ", 9, 4, 10**11), 1), "more bytes"),
        (gguf_header(key() + struct.pack("<IIQ", 9, 8, 10**11), 1), "claims 100,000,000,000 values"),
        (gguf_header(key() + struct.pack("<IIQ", 9, 9, 1), 1), "array of the unknown type 9"),
        (gguf_header(key() + struct.pack("<I", 77), 1), "value of the unknown type 77"),
        (gguf_header(key() + struct.pack("<IQ", 8, 2**62), 1), "more bytes"),
        (gguf_header(struct.pack("<Q", 2**62), 1), "more bytes"),
        (gguf_header(key() + struct.pack("<I", 2**31), 0, 1), "more bytes"),
        (gguf_header(key() + struct.pack("<IQI", 1, 32, 8), 0, 1), "more bytes"),
    ],
)
def test_a_header_of_gguf_is_held_against_the_size_of_its_file(header: bytes, message: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(header)
    began = time.process_time()
    with pytest.raises(ArtifactError, match=message):
        read_map(tmp_path / "m.gguf", TABLE)
    assert time.process_time() - began < 5
