"""Configurations against files that were compared with the consumer's own source by hand: what is written must not
drift.

For targets whose consumer was never run (`by_consumer` is False) this is all there is.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqsearch.core import BitMap, LayerSpec, LayerTable
from mpqsearch.errors import ConfigError, LayerMismatchError
from mpqsearch.export import TARGETS, ExportJob, Target, get_exporter, import_map
from mpqsearch.export.reading import Reading, resolve
from mpqsearch.export.sdcpp import FILE, SKIPPED, read, spelled

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
    return ExportJob(table=TABLE, bit_map=BitMap(model_digest="d", weights=weights), **more)


def rules(folder: Path, given: ExportJob) -> str:
    """What is written for stable-diffusion.cpp."""
    target = get_exporter("sdcpp")
    (path,) = target.write_files(folder, given, target.plan(given))
    return path.read_text()


def test_the_file_is_the_golden_one(tmp_path: Path) -> None:
    target = get_exporter("sdcpp")
    made = rules(tmp_path, job())
    assert made == (GOLDEN / FILE).read_text()
    reading = read(GOLDEN / FILE, TABLE)
    assert reading is not None
    assert resolve(reading, TABLE, "golden") == {e.layer: e.will_get for e in target.plan(job())}
    (tmp_path / FILE).rename(tmp_path / "other.dat")
    assert read(tmp_path, TABLE) is None
    assert read(tmp_path / "other.dat", TABLE) is None


def test_what_was_never_run_says_so() -> None:
    unverified = {n for n in TARGETS if not get_exporter(n).by_consumer}
    assert unverified == {"sdcpp", "cachedit"}
    for name in unverified:
        assert "Not verified by its consumer" in (sys.modules[type(get_exporter(name)).__module__].__doc__ or "")


def test_a_layer_has_one_type_in_all_blocks_for_cache_dit(tmp_path: Path) -> None:
    """As its source has it: names are looked for in those inside blocks, and what is excluded stays."""
    names = ("blocks.0.attn.to_q", "blocks.1.attn.to_q", "blocks.0.proj", "blocks.0.proj_out", "blocks.1.norm", "out")
    table = LayerTable(digest="d", layers=tuple(LayerSpec(name=n, kind="Linear", weight_shape=(64, 32)) for n in names))
    target = get_exporter("cachedit")
    assert target.tied(table) == [names[:2], names[2:4]]
    weights = {n: np.array(w, dtype=np.uint8) for n, w in zip(names, (4, 4, 8, 8, 16, 4), strict=True)}
    given = ExportJob(table=table, bit_map=BitMap(model_digest="d", weights=weights))
    (path,) = target.write_files(tmp_path, given, target.plan(given))
    values = json.loads(path.read_text())
    assert values["precision_plan"] == {
        "attn.to_q": "int4_weight_only",
        "proj": "int8_weight_only",
        "proj_out": "int8_weight_only",
    }
    assert values["exclude_layers"] == ["norm"]
    assert import_map(path, table).weights == {**weights, "out": 16}


def test_whole_names_that_end_like_one_another_are_told_apart_for_diffsynth(tmp_path: Path) -> None:
    names = ("proj", "blocks.0.proj", "blocks.1.proj")
    table = LayerTable(digest="d", layers=tuple(LayerSpec(name=n, kind="Linear", weight_shape=(64, 32)) for n in names))
    target = get_exporter("diffsynth")
    weights = {n: np.array(w, dtype=np.uint8) for n, w in zip(names, (4, 8, 16), strict=True)}
    given = ExportJob(table=table, bit_map=BitMap(model_digest="d", weights=weights))
    (path,) = target.write_files(tmp_path, given, target.plan(given))
    assert import_map(path, table).weights == weights


def test_every_consumer_has_a_tested_version_and_a_way_to_get_it() -> None:
    for name in TARGETS:
        can = get_exporter(name)
        assert not can.requires or (can.tested and can.install), name


def test_rules_of_sdcpp_are_found_as_the_program_finds_them(tmp_path: Path) -> None:
    """The first rule whose expression is found in the tensor's name, as `std::regex_search` does."""
    target: Any = get_exporter("sdcpp")
    written = [r.split("=") for r in rules(tmp_path, job()).strip().split(",")]
    for entry in target.plan(job()):
        hits = [t for p, t in written if re.search(p, f"{entry.layer}.weight")]
        assert hits == ([spelled(entry.choice)] if entry.choice else [])
    assert not any(re.search(p, "blocks.0.attn.to_out.01weight") for p, _ in written), "dots stand for themselves"
    assert not target.choices(LayerSpec(name="time_embedding.linear_1", kind="Linear", weight_shape=(64, 32)))
    assert all(
        not target.choices(LayerSpec(name=f"a.{part}b", kind="Linear", weight_shape=(64, 32))) for part in SKIPPED
    )
    bad = LayerTable(digest="d", layers=(LayerSpec(name="a=b", kind="Linear", weight_shape=(64, 32)),))
    bit_map = BitMap(model_digest="d", weights={"a=b": np.array(8, dtype=np.uint8)})
    with pytest.raises(ConfigError, match="a=b"):
        rules(tmp_path, ExportJob(table=bad, bit_map=bit_map))


@pytest.mark.parametrize(
    ("name", "layer", "choice", "total"),
    [
        ("sdcpp", "blocks.0.attn.to_q", "Q2_K", 64 * 84 * 8),
        ("coreml", "blocks.0.attn.to_q", "lut3", 64 * 256 * 3 + 16 * 8),
    ],
)
def test_stored_bits(name: str, layer: str, choice: str, total: int) -> None:
    target: Any = get_exporter(name)
    assert target.cost(TABLE[layer], target.choice_of(TABLE[layer], choice)).total == total


def test_resolve_names_what_is_wrong() -> None:
    with pytest.raises(LayerMismatchError, match=r"'conv_inn' \(did you mean 'conv_in'\?\) and 1 more"):
        resolve(Reading(names=("conv_inn", "other")), TABLE, "x.json")
    with pytest.raises(LayerMismatchError, match=r"gives 'kept' 9 bits; widths are 1 to 8, or 16"):
        resolve(Reading(widths={"kept": 9}), TABLE, "x.json")
    with pytest.raises(LayerMismatchError, match="quantizes no layer"):
        resolve(Reading(widths={"elsewhere": 16}), TABLE, "x.json")


def test_a_consumer_of_another_version_than_the_tested_one_is_named() -> None:
    have = metadata.version("numpy")

    def untested(**attributes: Any) -> str:
        return type("Some", (Target,), {"requires": "numpy", **attributes})().untested()  # type: ignore[no-any-return]

    assert untested(tested=have) == ""
    assert untested(tested="0.0") == have
    assert untested(tested="0.0", by_consumer=False) == ""  # it was never run: said elsewhere
    assert untested(tested="1", requires="no-such-package") == ""
