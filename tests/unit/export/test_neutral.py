from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqsearch import artifacts
from mpqsearch.core import BitMap, KeptParameter, LayerSpec, LayerTable, QuantFormat, average_bits, size_bits
from mpqsearch.errors import ArtifactError, LayerMismatchError
from mpqsearch.export import ExportJob, bit_map_schema, get_exporter, load_neutral, neutral_extra, write_neutral
from mpqsearch.export.mapfile import structure_digest

TABLE = LayerTable(
    digest="d" * 64,
    model="tiny",
    layers=(
        LayerSpec(name="conv", kind="Conv2d", weight_shape=(6, 4, 3, 3)),
        LayerSpec(name="attn.q", kind="Linear", weight_shape=(8, 16)),
        LayerSpec(name="attn.k", kind="Linear", weight_shape=(8, 16)),
        LayerSpec(name="up", kind="ConvTranspose2d", weight_shape=(8, 3, 2, 2), channel_axis=1, groups=2),
        LayerSpec(name="out", kind="Linear", weight_shape=(4, 8)),
    ),
    kept=(KeptParameter(name="norm.weight", n_values=10, reason="a norm"),),
)


def example(**more: Any) -> BitMap:
    weights = {
        "conv": np.array([2, 2, 3, 4, 4, 16], dtype=np.uint8),
        "attn.q": np.array(3, dtype=np.uint8),
        "attn.k": np.array(3, dtype=np.uint8),
        "up": np.array([1, 1, 8, 8, 8, 5], dtype=np.uint8),
        "out": np.array(16, dtype=np.uint8),
    }
    return BitMap(
        model_digest=TABLE.digest,
        weights=weights,
        activations={"conv": 8},
        formats={"up": QuantFormat(scheme="auto", smooth=True)},
        **more,
    )


def written(tmp_path: Path) -> Path:
    path = tmp_path / "bitmap.json"
    write_neutral(path, TABLE, example(), {"layers": "abc"}, provenance={"command": "mpqsearch allocate", "seed": 0})
    return path


def test_round_trip(tmp_path: Path) -> None:
    read = load_neutral(written(tmp_path), TABLE)
    assert read.bit_map.digest == example().digest
    assert read.bit_map.activations == {"conv": 8}
    assert [(la.name, la.weight_shape, la.n_channels) for la in read.layers] == [
        (la.name, la.weight_shape, la.n_channels) for la in TABLE
    ]
    assert read.data["provenance"]["command"] == "mpqsearch allocate"


def test_it_is_the_file_that_artifacts_reads(tmp_path: Path) -> None:
    assert artifacts.load_bit_map(written(tmp_path)).digest == example().digest


def test_accounting_is_the_stored_size(tmp_path: Path) -> None:
    data = load_neutral(written(tmp_path)).data
    totals = data["accounting"]
    assert totals["total_bits"] == size_bits(TABLE, example())
    assert totals["payload_bits"] + totals["metadata_bits"] + totals["unquantized_bits"] == totals["total_bits"]
    assert totals["bits_per_weight"] == average_bits(TABLE, example())
    assert data["layers"]["attn.q"]["payload_bits"] == 3 * 128
    assert data["layers"]["attn.q"]["metadata_bits"] == 8 * (16 + 3) + 8
    assert data["layers"]["conv"]["payload_bits"] == (2 + 2 + 3 + 4 + 4 + 16) * 36
    assert {u["name"]: u["stored_bits"] for u in data["unquantized"]} == {"out": 16 * 32, "norm.weight": 160}


def test_many_channels_go_into_the_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "SIDECAR_CHANNELS", 4)
    path = written(tmp_path)
    data = json.loads(path.read_text())["data"]
    assert data["layers"]["conv"]["channel_bits"] == {"encoding": "safetensors", "tensor": "conv"}
    assert load_neutral(path, TABLE).bit_map.digest == example().digest
    (tmp_path / "bitmap.safetensors").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load_neutral(path)


def test_structure_digest_knows_names_kinds_and_shapes_only() -> None:
    same = LayerTable(digest="e" * 64, layers=TABLE.layers[::-1], model="other")
    assert structure_digest(same) == structure_digest(TABLE)
    assert structure_digest(LayerTable(digest="d" * 64, layers=TABLE.layers[:-1])) != structure_digest(TABLE)


Edit = Callable[[dict[str, Any]], None]


def edit(*path: str, value: Any) -> Edit:
    def apply(body: dict[str, Any]) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return apply


def drop(*path: str) -> Edit:
    def apply(body: dict[str, Any]) -> None:
        for key in path[:-1]:
            body = body[key]
        del body[path[-1]]

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("data", "layers", "attn.q", "bits", value=9), "attn.q"),
        (edit("data", "layers", "attn.q", "bits", value=4), "map_digest"),
        (edit("data", "layers", "attn.q", "channel_bits", value={"encoding": "rle", "data": [[3, 8]]}), "attn.q"),
        (edit("data", "layers", "attn.q", "colour", value="red"), "colour"),
        (edit("data", "layers", "attn.q", "shape", value=[8, 17]), "model.structure"),
        (edit("data", "layers", "attn.q", "groups", value=2), None),
        (edit("data", "layers", "up", "groups", value=1), "up"),
        (drop("data", "accounting"), "accounting"),
        (drop("data", "layers", "attn.q", "bits"), "attn.q"),
        (edit("data", "map_digest", value="0"), "map_digest"),
        (edit("data", "sidecar", value={"file": "../x.safetensors", "sha256": "0" * 64}), "sidecar"),
        (edit("version", value=2), "reads up to 1"),
        (edit("schema", value="mpqsearch/layers"), "mpqsearch/layers"),
    ],
)
def test_every_change_is_noticed(tmp_path: Path, change: Edit, message: str | None) -> None:
    path = written(tmp_path)
    body = json.loads(path.read_text())
    del body["digest"]  # which would notice it first, and which other programs need not give
    change(body)
    path.write_text(json.dumps(body))
    if message is None:  # groups of a Linear mean nothing
        load_neutral(path)
        return
    with pytest.raises((ArtifactError, LayerMismatchError), match=message):
        load_neutral(path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(LayerMismatchError, match="another structure"):
        load_neutral(path, LayerTable(digest="d" * 64, layers=TABLE.layers[:-1]))
    with pytest.raises(LayerMismatchError, match="was made for the model"):
        load_neutral(path, LayerTable(digest="f" * 64, layers=TABLE.layers, kept=TABLE.kept))
    with pytest.raises(LayerMismatchError):
        neutral_extra(LayerTable(digest="f" * 64, layers=TABLE.layers), example())


def test_verify_reports_instead_of_raising(tmp_path: Path) -> None:
    exporter = get_exporter("neutral")
    job = ExportJob(table=TABLE, bit_map=example())
    assert exporter.write(tmp_path, job) == [tmp_path / "bitmap.json", tmp_path / "export.json"]
    assert exporter.verify(tmp_path).ok
    text = (tmp_path / "bitmap.json").read_text()
    (tmp_path / "bitmap.json").write_text(text.replace('"bits": 3', '"bits": 4', 1))
    broken = exporter.verify(tmp_path)
    assert not broken.ok
    assert "bitmap.json is missing or was changed after the export" in broken.summary()


def test_plan_keeps_every_width() -> None:
    plan = {e.layer: e for e in get_exporter("neutral").plan(ExportJob(table=TABLE, bit_map=example()))}
    assert (plan["conv"].asked, plan["conv"].will_get, plan["conv"].asked_text) == ((2, 16), None, "2..16")
    assert (plan["attn.q"].will_get, plan["attn.q"].reason) == (3, "exact")


GOLDEN = Path(__file__).parent / "golden"
NEWEST = artifacts.VERSIONS["mpqsearch/bitmap"]
DIGEST = "d1ccc3a5cbbc664bb2c56645975bb418ae56c7783cb73ecfdcfbad37c2b8e909"
"""Of the map of every golden file: `example`, whatever version it was written in."""


@pytest.mark.parametrize("form", ["", "-sidecar"])
@pytest.mark.parametrize("version", range(max(1, NEWEST - 1), NEWEST + 1))
def test_files_of_this_and_the_previous_version_are_read(version: int, form: str) -> None:
    read = load_neutral(GOLDEN / f"bitmap-{version}{form}.json", TABLE)
    assert read.bit_map.digest == DIGEST == example().digest
    assert read.data["accounting"]["total_bits"] == size_bits(TABLE, read.bit_map)
    assert ("sidecar" in read.data) == bool(form)


def test_every_version_has_golden_files_and_a_schema() -> None:
    for version in range(1, NEWEST + 1):
        assert (GOLDEN / f"bitmap-{version}.json").is_file(), "write it with the version that is replaced, before it is"
        assert (GOLDEN / f"bitmap-{version}-sidecar.json").is_file()
        assert bit_map_schema(version)["properties"]["version"]["const"] == version


def test_a_golden_file_outlives_one_new_version_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    path = GOLDEN / f"bitmap-{NEWEST}.json"
    monkeypatch.setitem(artifacts.VERSIONS, "mpqsearch/bitmap", NEWEST + 1)
    assert load_neutral(path, TABLE).bit_map.digest == DIGEST
    monkeypatch.setitem(artifacts.VERSIONS, "mpqsearch/bitmap", NEWEST + 2)
    with pytest.raises(ArtifactError, match=rf"has version {NEWEST} .* reads {NEWEST + 1} and {NEWEST + 2}"):
        load_neutral(path, TABLE)
    monkeypatch.setitem(artifacts.VERSIONS, "mpqsearch/bitmap", NEWEST - 1)
    with pytest.raises(ArtifactError, match=rf"reads up to {NEWEST - 1}. Upgrade"):
        load_neutral(path, TABLE)


def test_what_is_written_today_is_the_golden_file(tmp_path: Path) -> None:
    """The format cannot drift unnoticed within a version: only who wrote it may differ."""
    for form in ("", "-sidecar"):
        body = json.loads((GOLDEN / f"bitmap-{NEWEST}{form}.json").read_text())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(artifacts, "SIDECAR_CHANNELS", 4 if form else 4096)
            (tmp_path / form.lstrip("-")).mkdir(exist_ok=True)
            now = json.loads(written(tmp_path / form.lstrip("-")).read_text())
        for each in (body, now):
            each.pop("created_by")
            each.pop("digest", None)
            if form:
                each["data"]["sidecar"].pop("file")
        assert now == body
