"""Every verb on every kind of model, through the command line, in one run folder that the verbs fill in turn.

A verb that comes to an empty folder measures what it needs, so that each test also runs alone; a report only reads.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mpqsearch import artifacts
from mpqsearch.core import BitMap, LayerTable, size_bits
from mpqsearch.export import load_neutral, read_map
from mpqsearch.export.packed import load_quantized
from mpqsearch.models import Parts, load_calls
from mpqsearch.models.loader import load_part
from mpqsearch.sampling import load_model
from tests.e2e import forked
from tests.support.everything import ALL
from tests.support.roads import KINDS, SAMPLING, Road, new_road

SOME = KINDS if ALL else ("text-to-image", "two-denoiser", "recorded")
"""Kinds that every verb is tried on by itself; on the others `run` walks all stages."""

SAMPLED = tuple(kind for kind in SOME if kind != "recorded")
FIRST = {
    "unconditional": {"conv_in"},
    "text-to-image": {"conv_in"},
    "recorded": {"conv_in"},
    "flow-matching": {"x_embedder"},
    "two-denoiser": {"transformer.patch_embedding", "transformer_2.patch_embedding"},
}
"""Layers that take the sample in; of the others it is ``pos_embed.proj``."""

HALVES = ("bfloat16", "float16") if ALL else ("bfloat16",)
"""numpy has no bfloat16, so that this type finds more."""

METHODS = {"uniform", "ilp-layer", "ilp-channel"}
MAP = "ilp-channel@uniform-4"

Call = Callable[..., subprocess.CompletedProcess[str]]


class Roads(dict[str, Road]):
    """The studies by kind, or by type of half precision, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, kind: str) -> Road:
        half = kind in HALVES
        self[kind] = new_road(self.folder / kind, "class-conditional" if half else kind, kind if half else "float32")
        return self[kind]


def each(kinds: Sequence[str]) -> pytest.MarkDecorator:
    """A test for each of these kinds, kind by kind: a worker takes all verbs of one before it begins the next."""
    return pytest.mark.parametrize("kind", kinds, scope="module")


@pytest.fixture(scope="session")
def roads(tmp_path_factory: pytest.TempPathFactory) -> Roads:
    """The studies."""
    return Roads(tmp_path_factory.mktemp("roads"))


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Run a verb of a road in a process of its own; it must end with ``code`` and without a traceback."""

    def run(road: Road, verb: str, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = forked.run(road.command(verb, *more), road.folder, tmp_path / "out", tmp_path / "err")
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def table_of(road: Road) -> LayerTable:
    return artifacts.load_layers(road.run / "layers.json")


@each([*KINDS, *HALVES])
def test_layers(kind: str, roads: Roads, call: Call) -> None:
    listed = json.loads(call(roads[kind], "layers").stdout)
    table = table_of(roads[kind])
    assert [la["name"] for la in listed["layers"]] == [la.name for la in table]
    assert {la.name for la in table if la.role == "first"} == FIRST.get(kind, {"pos_embed.proj"})
    assert {la.role for la in table} >= {"first", "last", "attention"}


@each([*SOME, *HALVES])
def test_profile(kind: str, roads: Roads, call: Call) -> None:
    call(roads[kind], "profile")
    table, measured = table_of(roads[kind]), artifacts.load_profile(roads[kind].run / "profile.json")
    assert measured.widths == (2, 4, 8)
    assert measured.names == tuple(la.name for la in table)
    errors = measured.arrays["output_error/auto"]
    assert errors.shape == (table.n_channels, 3)
    assert np.isfinite(errors).all()
    assert (errors.sum(0)[:-1] > 2 * errors.sum(0)[1:]).all(), "twice the bits have far less error"


@each([*SOME, *HALVES])
def test_allocate(kind: str, roads: Roads, call: Call) -> None:
    made = json.loads(call(roads[kind], "allocate").stdout)
    table = table_of(roads[kind])
    by_method = {entry["method"]["name"]: entry for entry in made["allocations"]}
    assert set(by_method) == METHODS
    for name, entry in by_method.items():
        saved = artifacts.load_bit_map(roads[kind].run / "allocations" / f"{name}@uniform-4" / "bitmap.json")
        assert size_bits(table, saved) == entry["size_bits"] <= by_method["uniform"]["size_bits"]
        assert entry["within_budget"]
    losses = [by_method[m]["predicted_loss"] for m in ("uniform", "ilp-layer", "ilp-channel")]
    assert losses == sorted(losses, reverse=True)
    assert {p["method"]["name"] for p in made["paths"]} == METHODS - {"uniform"}
    assert made["explanations"][0]["layers"]


@each([*SOME, *HALVES])
def test_quantize(kind: str, roads: Roads, call: Call) -> None:
    (folder,) = json.loads(call(roads[kind], "quantize").stdout)
    bit_map = artifacts.load_bit_map(roads[kind].run / "allocations" / MAP / "bitmap.json")
    assert artifacts.load_bit_map(Path(folder) / "bitmap.json").digest == bit_map.digest
    assert_on_levels(roads[kind], model_of(roads[kind], folder), bit_map)


def model_of(road: Road, source: str) -> torch.nn.Module:
    """The model of a folder, in the type of its file; of several denoisers a folder each."""
    parts = sorted(Path(source).glob("transformer*"))
    if len(parts) > 1 and not (Path(source) / "model_index.json").is_file():
        return Parts({part.name: model_of(road, str(part)) for part in parts})
    if (Path(source) / "config.json").is_file():  # a denoiser by itself, which its pipeline would run
        return load_part(Path(source), dtype="stored", device=torch.device("cpu"))
    file = road.folder / "calls.safetensors"
    return load_model(source, dtype="stored", calls=load_calls(file) if file.is_file() else None).module


def assert_on_levels(road: Road, module: torch.nn.Module, bit_map: BitMap) -> None:
    """Every output channel has at most as many values as its width has levels."""
    for layer in table_of(road):
        rows = module.get_submodule(layer.name).weight.flatten(1)  # type: ignore[operator, union-attr]
        for row, bits in zip(rows, bit_map.channel_widths(layer.name, layer.n_channels), strict=True):
            assert len(row.unique()) <= 2 ** int(bits), layer.name


@each([*SOME, *HALVES])
def test_export(kind: str, roads: Roads, call: Call) -> None:
    written = [Path(file) for file in json.loads(call(roads[kind], "export").stdout)]
    assert all(file.is_file() for file in written)
    table = table_of(roads[kind])
    bit_map = artifacts.load_bit_map(roads[kind].run / "allocations" / MAP / "bitmap.json")
    exported = roads[kind].run / "export"
    assert load_neutral(exported / "neutral@uniform-4" / "bitmap.json", table).bit_map.digest == bit_map.digest
    packed = load_quantized(exported / "packed@uniform-4")
    full = model_of(roads[kind], str(roads[kind].folder / "model"))
    assert {n: p.shape for n, p in packed.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
    assert_on_levels(roads[kind], packed, bit_map)
    promised = json.loads((exported / "packed@uniform-4.json").read_text())["data"]["accounted_bits"] / 8
    assert promised < sum(p.nbytes for p in full.parameters())


@each(["unconditional", "bfloat16"])
def test_a_consumer_reads_the_export(kind: str, roads: Roads, call: Call) -> None:
    entries = json.loads(call(roads[kind], "export", "--verify", "--target", "gguf", "--accept").stdout)
    assert [entry["target"] for entry in entries] == ["neutral", "packed", "gguf"]
    for entry in entries:
        verification = entry["verification"]
        assert verification["ok"]
        assert verification["verified"]
        if entry["target"] != "neutral":
            assert verification["forward_error"] < 0.01
            saved = entry["accounted_bits"] / 8 - verification["stored_bytes"]
            # A layer whose rows all took the symmetric scheme is packed without the zero points that were counted.
            assert 0 <= saved <= (0.01 * entry["accounted_bits"] / 8 if entry["target"] == "packed" else 0)
    table = table_of(roads[kind])
    imported = read_map(roads[kind].run / "export/gguf@uniform-4/diffusion_model.gguf", table, "gguf").bit_map
    assert min(int(widths.min()) for widths in imported.weights.values()) < 16


@each(SOME)
def test_import(kind: str, roads: Roads, call: Call) -> None:
    call(roads[kind], "allocate")
    read = json.loads(call(roads[kind], "import").stdout)
    table = table_of(roads[kind])
    theirs = artifacts.load_bit_map(roads[kind].run / "imports" / "theirs" / "bitmap.json")
    ours = artifacts.load_bit_map(roads[kind].run / "allocations" / "uniform@uniform-4" / "bitmap.json")
    assert read["digest"] == theirs.digest == ours.digest
    assert read["quantized_layers"] == len(table)


@each(SOME)
def test_inspect(kind: str, roads: Roads, call: Call) -> None:
    call(roads[kind], "profile")
    shown = call(roads[kind], "inspect").stdout
    assert "most sensitive layers" in shown
    assert any(la.name in shown for la in table_of(roads[kind]))


@each(SAMPLED)
def test_search(kind: str, roads: Roads, call: Call) -> None:
    data = json.loads(call(roads[kind], "search").stdout)
    assert data["trials"] == 2
    (entry,) = data["budgets"]
    rows = {row["arm"]: row for row in entry["rows"]}
    assert {"uniform", "plain", "search"} <= set(rows)
    assert all(np.isfinite(row["error"]) and row["error"] > 0 for row in rows.values())
    assert all(row["size_bytes"] <= rows["uniform"]["size_bytes"] + 1 for row in rows.values())
    assert len(artifacts.read_json(roads[kind].run / "search/search.json", "mpqsearch/search").data["points"]) >= 1


@each([*SAMPLED, *HALVES])
def test_evaluate(kind: str, roads: Roads, call: Call) -> None:
    records = json.loads(call(roads[kind], "evaluate").stdout)
    assert [r["method"] for r in records] == ["full-precision", "uniform", "ilp-layer", "ilp-channel"]
    for record in records[1:]:
        assert record["size_bytes"] <= records[1]["size_bytes"]
        assert record["n_samples"] == 4
        assert {"fd_fp", "kid_fp", "paired_mse", "paired_psnr"} <= set(record["metrics"])
        assert record["metrics"]["paired_mse"]["value"] > 0


@each([*SAMPLED, *HALVES])
def test_distill(kind: str, roads: Roads, call: Call) -> None:
    data = json.loads(call(roads[kind], "distill").stdout)
    assert data["before"]["paired_mse"]["value"] != data["after"]["paired_mse"]["value"]
    folder = roads[kind].run / "distilled" / MAP
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["relation"] > 0 for line in lines)
    trained = model_of(roads[kind], str(folder))
    assert all(bool(torch.isfinite(p).all()) for p in trained.parameters())


@each(SAMPLED)
def test_report(kind: str, roads: Roads, call: Call) -> None:
    missing = call(roads[kind], "report", "--set", "evaluate.first_seed=9", code=2)
    assert re.search(r"does not exist\. `mpqsearch \w+` writes it", missing.stderr)
    for verb in ("evaluate", "distill"):
        call(roads[kind], verb)
    (page,) = json.loads(call(roads[kind], "report").stdout)
    text = Path(page).read_text()
    assert all(f"{name}<" in text for name in ("full-precision", *METHODS, "ilp-channel+trd"))
    assert list((roads[kind].run / "figures").glob("*.png"))
    if kind == "text-to-image":  # prompts of the report's own split below their pictures
        assert len([n for n in range(2, 22) if f"<span>a lighthouse beside {n} boats</span>" in text]) == 4
        kept = (p for p in roads[kind].run.glob("stats/*.npz") if not p.name.startswith("full"))
        images = artifacts.read_arrays(next(kept))["images"]
        assert (images.shape, images.dtype) == ((4, 3, 16, 16), np.uint8)


def test_what_cannot_be_finished_is_not_begun(roads: Roads, call: Call, tmp_path: Path) -> None:
    refused = call(
        roads["text-to-image"],
        "run",
        "--run-dir",
        str(tmp_path / "new"),
        "--set",
        "evaluate.extractor=fmnist-cnn",
        code=2,
    )
    assert "the extractor fmnist-cnn reads pictures (1, 28, 28)" in refused.stderr
    assert not (tmp_path / "new" / "profile.json").exists()


@each([kind for kind in KINDS if kind != "recorded"])
def test_run(kind: str, roads: Roads, call: Call) -> None:
    done = call(roads[kind], "run")
    methods = [r["method"] for r in json.loads(done.stdout)]
    files = [m for m in methods if m.endswith(" file")]
    assert "packed file" in files
    assert methods == ["full-precision", "uniform", "ilp-layer", "ilp-channel", "ilp-channel+trd", *files]
    with (roads[kind].run / "pareto.csv").open() as handle:
        assert [row["method"] for row in csv.DictReader(handle)] == methods
    assert load_quantized(roads[kind].run / "export/packed@uniform-4")


def test_record(roads: Roads, call: Call) -> None:
    road = roads["text-to-image"]
    said = json.loads(call(road, "record").stdout)
    calls = load_calls(road.run / "calls.safetensors")
    assert (said["calls"], said["of"]) == (len(calls), calls.seen) == (4, 12)  # four prompts of three steps
    with torch.no_grad():
        assert torch.isfinite(calls[0].replay(model_of(road, str(road.folder / "model")))).all()


@pytest.mark.parametrize("verb", SAMPLING)
def test_a_verb_that_samples_refuses_recorded_calls_before_anything_long_begins(
    verb: str, roads: Roads, call: Call, tmp_path: Path
) -> None:
    refused = call(roads["recorded"], verb, "--run-dir", str(tmp_path / "new"), code=2)
    lines = [line for line in refused.stderr.splitlines() if line.startswith("mpqsearch: ")]
    assert len(lines) == 1
    assert f"({verb}) was asked for" in lines[0]
    assert "4 recorded calls" in lines[0]
    assert not (tmp_path / "new" / "profile.json").exists()


def test_doctor(roads: Roads, call: Call) -> None:
    rows = json.loads(call(roads["unconditional"], "doctor").stdout)
    assert next(r for r in rows if r["name"] == "cpu")["state"] == "works"
    assert not [r for r in rows if r["state"] == "MISSING"]
