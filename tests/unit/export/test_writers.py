"""Configurations against files that were compared with the consumer's own source by hand: what is written must not
drift.

For targets whose consumer was never run (`by_consumer` is False) this is all there is; Quark's file was also read by
Quark 0.13.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqsearch.core import BitMap, LayerSpec, LayerTable
from mpqsearch.errors import ArtifactError, ConfigError, LayerMismatchError
from mpqsearch.export import EXPORTERS, Capabilities, ExportJob, Reading, get_exporter
from mpqsearch.export.aimet import encodings
from mpqsearch.export.reading import resolve
from mpqsearch.export.sdcpp import SKIPPED, spelled

GOLDEN = Path(__file__).parent / "golden"
TABLE = LayerTable(
    digest="d",
    layers=(
        LayerSpec(name="conv_in", kind="Conv2d", weight_shape=(8, 4, 3, 3)),
        LayerSpec(name="time_embedding.linear_1", kind="Linear", weight_shape=(64, 32)),
        LayerSpec(name="blocks.0.attn.to_q", kind="Linear", weight_shape=(64, 256)),
        LayerSpec(name="blocks.0.attn.to_out.0", kind="Linear", weight_shape=(64, 96)),
        LayerSpec(name="proj_out", kind="Linear", weight_shape=(4, 20)),
        LayerSpec(name="kept", kind="Linear", weight_shape=(64, 64)),
    ),
)
WIDTHS = (8, 4, 2, 4, 8, 16)


def job(**more: Any) -> ExportJob:
    weights = {la.name: np.array(w, dtype=np.uint8) for la, w in zip(TABLE, WIDTHS, strict=True)}
    return ExportJob(table=TABLE, bit_map=BitMap(model_digest="d", weights=weights), rounding="up", **more)


@pytest.mark.parametrize("name", ["mixdq", "sdcpp", "comfyui", "quark"])
def test_the_file_is_the_golden_one(name: str, tmp_path: Path) -> None:
    target: Any = get_exporter(name)
    plan = target.plan(job())
    made = target.written(plan) if hasattr(target, "written") else json.dumps(target.recipe(plan), indent=1) + "\n"
    assert made == (GOLDEN / target.file).read_text()
    reading = target.read(GOLDEN / target.file)
    assert resolve(reading, TABLE, "golden") == {e.layer: e.will_get for e in plan}
    (tmp_path / "other.dat").write_text(made)
    assert target.read(tmp_path) is None
    assert target.read(tmp_path / "other.dat") is None


def test_what_was_never_run_says_so() -> None:
    unverified = {n for n in EXPORTERS if not get_exporter(n).capabilities().by_consumer}
    assert unverified == {"mixdq", "sdcpp", "comfyui"}
    for name in unverified:
        can = get_exporter(name).capabilities()
        assert can.notes[0] == "not verified by its consumer"
        assert "Not verified by its consumer" in (sys.modules[type(get_exporter(name)).__module__].__doc__ or "")


def test_every_consumer_has_a_tested_version_and_a_way_to_get_it() -> None:
    for name in EXPORTERS:
        can = get_exporter(name).capabilities()
        assert not can.requires or (can.tested and can.get), name


def test_rules_of_sdcpp_are_found_as_the_program_finds_them() -> None:
    """The first rule whose expression is found in the tensor's name, as `std::regex_search` does."""
    target: Any = get_exporter("sdcpp")
    plan = target.plan(job())
    rules = [r.split("=") for r in target.written(plan).strip().split(",")]
    for entry in plan:
        hits = [t for p, t in rules if re.search(p, f"{entry.layer}.weight")]
        assert hits == ([spelled(entry.choice)] if entry.choice else [])
    assert not any(re.search(p, "blocks.0.attn.to_out.01weight") for p, _ in rules), "dots stand for themselves"
    assert not target.choices(LayerSpec(name="time_embedding.linear_1", kind="Linear", weight_shape=(64, 32)))
    assert all(
        not target.choices(LayerSpec(name=f"a.{part}b", kind="Linear", weight_shape=(64, 32))) for part in SKIPPED
    )
    bad = LayerTable(digest="d", layers=(LayerSpec(name="a=b", kind="Linear", weight_shape=(64, 32)),))
    bit_map = BitMap(model_digest="d", weights={"a=b": np.array(8, dtype=np.uint8)})
    with pytest.raises(ConfigError, match="a=b"):
        target.written(target.plan(ExportJob(table=bad, bit_map=bit_map)))


@pytest.mark.parametrize(
    ("name", "layer", "choice", "total"),
    [
        ("mixdq", "blocks.0.attn.to_q", "int2", 64 * 256 * 4 + 64 * 64),
        ("sdcpp", "blocks.0.attn.to_q", "Q2_K", 64 * 84 * 8),
        ("comfyui", "blocks.0.attn.to_q", "nvfp4", 64 * 256 * 4 + 64 * 16 * 8 + 32),
        ("comfyui", "blocks.0.attn.to_q", "int8_tensorwise", 64 * 256 * 8 + 64 * 32),
        ("nncf", "blocks.0.attn.to_q", "int4_sym", 64 * 256 * 4 + 64 * 16),
        ("nncf", "conv_in", "int8_asym", 288 * 8 + 8 * 24),
        ("quark", "conv_in", "int3", 288 * 3 + 8 * 32),
        ("aimet", "conv_in", "int3", 288 * 3 + 8 * 64),
    ],
)
def test_stored_bits(name: str, layer: str, choice: str, total: int) -> None:
    target: Any = get_exporter(name)
    assert target.cost(TABLE[layer], target.choice_of(TABLE[layer], choice)).total == total


def test_encodings_of_aimet_decode_to_our_grid() -> None:
    entry = encodings([0.5], [3.0], 3)[0]
    grid = [0.5 * (code + entry["offset"]) for code in range(8)]
    assert grid == [0.5 * (code - 3) for code in range(8)]
    assert (entry["min"], entry["max"], entry["bitwidth"]) == (grid[0], grid[-1], 3)


def test_a_mixed_row_encoding_is_refused_by_name(tmp_path: Path) -> None:
    entries = [{"bitwidth": b, "scale": 1.0, "offset": 0} for b in (2, 4)]
    (tmp_path / "aimet_encodings.json").write_text(json.dumps({"param_encodings": {"a.weight": entries}}))
    with pytest.raises(ArtifactError, match=r"'a\.weight'.*\[2, 4\]"):
        get_exporter("aimet").read(tmp_path)  # type: ignore[attr-defined]


def test_resolve_names_what_is_wrong() -> None:
    with pytest.raises(LayerMismatchError, match=r"'conv_inn' \(did you mean 'conv_in'\?\) and 1 more"):
        resolve(Reading(layers={"conv_inn": 4, "other": 4}), TABLE, "x.json")
    with pytest.raises(LayerMismatchError, match=r"gives 'kept' 9 bits; widths are 1 to 8, or 16"):
        resolve(Reading(layers={"kept": 9}), TABLE, "x.json")
    with pytest.raises(LayerMismatchError, match="quantizes no layer"):
        resolve(Reading(layers={"elsewhere": 16}), TABLE, "x.json")


def test_a_consumer_of_another_version_than_the_tested_one_is_named() -> None:
    have = metadata.version("numpy")
    made = partial(Capabilities, widths=(4,), kinds=("Linear",), granularity="layer", payload=False, requires="numpy")
    assert made(tested=have).untested() == ""
    assert made(tested="0.0").untested() == have
    assert made(tested="0.0", by_consumer=False).untested() == ""  # it was never run: said elsewhere
    assert dataclasses.replace(made(tested="1"), requires="no-such-package").untested() == ""
