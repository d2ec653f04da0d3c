"""One suite for every export target: what the contract in `mpqsearch.export.contract` promises, on an unconditional
U-Net, a class-conditional transformer and a text-conditional U-Net that is known from recorded calls.

A target whose library takes seconds for every file writes the transformer alone; with ``MPQSEARCH_TEST_ALL=1`` (``make
test-all``) all models, and a second time over the first."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from mpqsearch.artifacts import read_json
from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable
from mpqsearch.errors import ConfigError, LayerMismatchError, UnknownNameError
from mpqsearch.export import (
    SOURCES,
    TARGETS,
    ExportJob,
    Target,
    Verification,
    get_exporter,
    plan_table,
    read_map,
    register,
)
from mpqsearch.export.contract import MANIFEST, REASONS
from mpqsearch.export.target import SIZE_TOLERANCE, fresh_process
from mpqsearch.models.calls import capture
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.discover import discover
from mpqsearch.sampling import adapt
from tests.support.everything import ALL

NAMES = sorted(TARGETS)
SLOW = () if ALL else ("onnx",)


def tiny_unet() -> Denoiser:
    torch.manual_seed(0)
    module = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,  # one output channel: quanto stores such a layer with a single scale
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )
    return adapt(module, sample_shape=(1, 8, 8), name="tiny-unet")


def tiny_transformer() -> Denoiser:
    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=80,  # rows of 160, in groups of 32
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    return adapt(module, sample_shape=(1, 8, 8), name="tiny-dit", n_classes=4)


def tiny_text() -> Denoiser:
    """Known from calls of its pipeline only: a time without a batch axis, prompts, and a learned variance."""
    torch.manual_seed(0)
    module = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    with capture(module) as calls, torch.no_grad():
        for t in (500, 10):
            prompts = torch.randn(2, 5, 32)
            module(torch.randn(2, 2, 8, 8), torch.tensor(t), encoder_hidden_states=prompts, return_dict=False)
    return adapt(module, calls=calls, name="tiny-text")


MODELS = {"unet": tiny_unet, "transformer": tiny_transformer, "text": tiny_text}


@pytest.fixture(scope="module", params=["unet", "transformer"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def table(denoiser: Denoiser) -> LayerTable:
    return discover(denoiser)


@pytest.fixture(scope="module")
def small() -> tuple[Denoiser, LayerTable]:
    """For tests that write: one model. Each of the others is written and read by its consumer once, in `read_back`."""
    denoiser = tiny_transformer()
    return denoiser, discover(denoiser)


@pytest.fixture(params=NAMES)
def exporter(request: pytest.FixtureRequest) -> Target:
    made = get_exporter(request.param)
    missing = made.missing()
    if missing:
        pytest.skip(f"the consumer of {made.name} is not installed: {', '.join(missing)}")
    return made


def random_map(table: LayerTable, widths: tuple[int, ...], *, mixed: bool = False, seed: int = 0) -> BitMap:
    rng = np.random.default_rng(seed)
    weights = {
        la.name: np.asarray(rng.choice(widths, size=la.n_channels if mixed and i % 2 else ()), dtype=np.uint8)
        for i, la in enumerate(table)
    }
    return BitMap(model_digest=table.digest, weights=weights)


def test_it_keeps_the_contract(exporter: Target) -> None:
    assert list(exporter.widths) == sorted(set(exporter.widths))
    assert exporter.granularity in ("layer", "channel")


@pytest.mark.parametrize("mixed", [False, True])
def test_plan_covers_every_layer_with_a_reason(
    exporter: Target, denoiser: Denoiser, table: LayerTable, mixed: bool
) -> None:
    job = ExportJob(table=table, bit_map=random_map(table, (1, 3, 4, 6, 16), mixed=mixed), denoiser=denoiser)
    plan = exporter.plan(job)
    assert [e.layer for e in plan] == [la.name for la in table]
    assert {e.reason for e in plan} <= set(REASONS)
    for entry in plan:
        assert entry.will_get is None or entry.will_get in (*exporter.widths, FULL_PRECISION)
        assert (entry.will_get is None) <= (exporter.granularity == "channel")
        if entry.reason == "exact":
            assert entry.asked[0] <= (entry.will_get or entry.asked[0]) <= entry.asked[1]
        else:
            assert entry.detail


def test_widths_of_inputs_that_the_target_does_not_take_are_named(exporter: Target, table: LayerTable) -> None:
    first, second = (la.name for la in list(table)[:2])
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(4) for la in table},
        activations={first: 6, second: FULL_PRECISION},
    )
    lost = exporter.lost_inputs(bit_map)
    assert lost == ({} if exporter.name == "neutral" else {first: 6})
    plan = exporter.plan(ExportJob(table=table, bit_map=bit_map))
    said = {row["layer"] for row in plan_table(plan, lost) if "its input, at 6 bits in the map" in row["detail"]}
    assert said == set(lost)
    for row, entry in zip(plan_table(plan, lost), plan, strict=True):
        assert row["detail"].startswith(entry.detail), "what was said of the weights is still said"


def own_map(exporter: Target, table: LayerTable, seed: int = 0) -> tuple[BitMap, dict[str, str]]:
    """A random map over the target's own formats, and the names of those formats; one for layers that are tied."""
    rng = np.random.default_rng(seed)
    widths: dict[str, int] = {}
    names = {}
    tied = {name: group for group in exporter.tied(table) for name in group}
    for layer in table:
        if layer.name in widths:
            continue
        group = tied.get(layer.name, (layer.name,))
        common = set.intersection(*({c.name for c in exporter.choices(table[name])} for name in group))
        choices = [c for c in exporter.choices(layer) if c.name in common]
        pick = choices[int(rng.integers(len(choices)))] if choices else None
        widths |= dict.fromkeys(group, FULL_PRECISION if pick is None else pick.width)
        if pick is not None:
            names |= dict.fromkeys(group, pick.name)
    return BitMap(model_digest=table.digest, weights={n: np.array(w, dtype=np.uint8) for n, w in widths.items()}), names


def test_what_the_target_holds_is_planned_unchanged(exporter: Target, table: LayerTable) -> None:
    bit_map, names = own_map(exporter, table, seed=1)
    for choices in ({}, names):
        plan = exporter.plan(ExportJob(table=table, bit_map=bit_map, choices=choices))
        assert {e.layer: e.will_get for e in plan} == {n: int(w) for n, w in bit_map.weights.items()}
        assert {e.reason for e in plan} <= {"exact", "kept_full_precision"}
        if choices:
            assert {e.layer: e.choice for e in plan if e.choice} == names


def test_costs_are_counted_and_grow_with_the_width(exporter: Target, table: LayerTable) -> None:
    for layer in table:
        full = exporter.cost(layer, None)
        assert (full.payload, full.metadata) == (0, 0)
        assert full.unquantized in (16 * layer.n_weights, 32 * layer.n_weights)
        for choice in exporter.choices(layer):
            bits = exporter.cost(layer, choice)
            assert bits.payload >= choice.width * layer.n_weights, "no codes take less than their width"
            assert bits.unquantized == 0


def test_what_a_target_makes_of_a_weight_is_a_number(exporter: Target) -> None:
    """Of a parameter that could be trained, too: losses are made of it in numpy."""
    if not exporter.rounds:
        pytest.skip("it rounds as we do")
    layer = LayerSpec(name="layer", kind="Linear", weight_shape=(64, 256))
    weight = torch.nn.Parameter(torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(0)))
    for choice in exporter.choices(layer):
        decoded = exporter.round_trip(weight, layer, choice)
        assert not decoded.requires_grad
        assert decoded.shape == weight.shape
        error = float((decoded - weight.detach()).square().mean())
        ends = exporter.name == "sdnq" and choice.width == 1  # its two codes are minimum and maximum of a row
        assert error < (10 if ends else 0.5), choice


@dataclass(frozen=True)
class Written:
    """An export: its folder, what `Target.write` said of it, and what the consumer read back."""

    folder: Path
    paths: list[Path]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Written]:
    """Every target's export of each model in its own formats, read back by all consumers in one other process. No
    export changes the model."""
    made: dict[tuple[str, str], tuple[Path, list[Path]]] = {}
    for kind, model in MODELS.items():
        denoiser = model()
        table = discover(denoiser)
        before = {k: v.clone() for k, v in denoiser.module.state_dict().items()}
        for name in NAMES:
            exporter = get_exporter(name)
            if exporter.missing() or (name in SLOW and kind != "transformer"):
                continue
            bit_map, names = own_map(exporter, table, seed=2)
            folder = tmp_path_factory.mktemp(f"{kind}-{name}")
            job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, choices=names)
            made[kind, name] = folder, exporter.write(folder, job)
            after = denoiser.module.state_dict()
            assert all(torch.equal(before[k], after[k]) for k in before), f"{name} changed the model"
    reports = fresh_process([(name, folder) for (_, name), (folder, _) in made.items()])
    return {key: Written(*done, seen) for (key, done), seen in zip(made.items(), reports, strict=True)}


def written(read_back: dict[tuple[str, str], Written], kind: str, exporter: Target) -> Written:
    """One of the exports; the test is skipped where it was not made."""
    if (kind, exporter.name) not in read_back:
        pytest.skip(f"{exporter.name} takes long: of this model with MPQSEARCH_TEST_ALL=1")
    return read_back[kind, exporter.name]


@pytest.mark.parametrize("kind", MODELS)
def test_the_consumer_holds_the_targets_own_formats(
    exporter: Target, kind: str, read_back: dict[tuple[str, str], Written]
) -> None:
    folder, report = written(read_back, kind, exporter).folder, written(read_back, kind, exporter).report
    manifest = read_json(folder / MANIFEST, "mpqsearch/export").data
    seen = exporter.compare(manifest, report)
    assert seen.ok, seen.summary()
    assert seen.verified == exporter.by_consumer
    assert ("NOT verified" in seen.summary()) != exporter.by_consumer
    assert len(seen.entries) == len(manifest["plan"])
    assert {e.reason for e in seen.entries} <= {"exact", "kept_full_precision"}
    assert any(e.got != FULL_PRECISION for e in seen.entries)
    if exporter.payload:
        assert seen.forward_error is not None
        assert seen.stored_bytes is not None
        assert seen.promised_bytes is not None
        assert abs(seen.stored_bytes - seen.promised_bytes) <= SIZE_TOLERANCE * seen.promised_bytes
        assert seen.header_bytes is not None
        assert seen.header_bytes > 0


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_is_imported_at_the_same_widths(
    exporter: Target, kind: str, read_back: dict[tuple[str, str], Written]
) -> None:
    if exporter.name not in SOURCES or exporter.name == "neutral":
        pytest.skip("a map of this target is not read")
    folder = written(read_back, kind, exporter).folder
    table = discover(MODELS[kind]())
    imported = read_map(folder, table)
    assert imported.source == exporter.name
    plan = read_json(folder / MANIFEST, "mpqsearch/export").data["plan"]
    assert {n: int(w) for n, w in imported.bit_map.weights.items()} == {p["layer"]: p["will_get"] for p in plan}
    (tmp := folder / "elsewhere").mkdir()
    for file in (p for p in folder.iterdir() if p.is_file() and p.name not in (MANIFEST, "bitmap.json")):
        (tmp / file.name).symlink_to(file)
    assert read_map(tmp, table).bit_map.digest == imported.bit_map.digest, "found out from the file alone"


def test_all_files_are_named(exporter: Target, read_back: dict[tuple[str, str], Written]) -> None:
    done = read_back["transformer", exporter.name]
    files = (p for p in done.folder.rglob("*") if p.is_file() and "elsewhere" not in p.parts)
    assert sorted(done.paths) == sorted(files), "every file is named, no temporary one is left"


def verify_here(exporter: Target, folder: Path) -> Verification:
    """What `verify` does, in this process, which spares the seconds that a new one takes to import the libraries."""
    return exporter.compare(read_json(folder / MANIFEST, "mpqsearch/export").data, exporter.read_back(folder))


def test_a_map_made_for_something_else_is_rounded_and_held(
    tmp_path: Path, exporter: Target, small: tuple[Denoiser, LayerTable]
) -> None:
    denoiser, table = small
    bit_map = random_map(table, (1, 2, 3, 4, 6, 8, 16), mixed=True, seed=2)
    job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, inputs={"bitmap": bit_map.digest})
    exporter.write(tmp_path, job)
    seen = verify_here(exporter, tmp_path)
    assert seen.ok, seen.summary()
    assert [(e.layer, e.got, e.asked) for e in seen.entries] == [
        (e.layer, e.will_get, e.asked_text) for e in exporter.plan(job)
    ]


def test_writing_again_replaces_the_first(tmp_path: Path, exporter: Target, small: tuple[Denoiser, LayerTable]) -> None:
    if exporter.name in SLOW:
        pytest.skip(f"{exporter.name} takes long: with MPQSEARCH_TEST_ALL=1")
    denoiser, table = small
    for width in (exporter.widths[0], exporter.widths[-1]):
        bit_map = random_map(table, (width,))
        exporter.write(tmp_path, ExportJob(table=table, bit_map=bit_map, denoiser=denoiser))
    seen = verify_here(exporter, tmp_path)
    assert seen.ok, seen.summary()
    held = {e.got for e, layer in zip(seen.entries, table, strict=True) if exporter.choices(layer)}
    assert held == {exporter.widths[-1]} or not held


def test_any_damaged_file_is_reported(
    tmp_path: Path, exporter: Target, read_back: dict[tuple[str, str], Written]
) -> None:
    done = read_back["transformer", exporter.name]
    for path in (tmp_path / p.relative_to(done.folder) for p in done.paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(done.folder / path.relative_to(tmp_path), path)
    for path in (tmp_path / p.relative_to(done.folder) for p in done.paths):
        whole = path.read_bytes()
        assert whole
        path.write_bytes(whole[: len(whole) // 2])
        seen = exporter.verify(tmp_path)
        assert not seen.ok, path.name
        assert seen.problems
        path.unlink()
        assert not exporter.verify(tmp_path).ok, path.name
        path.write_bytes(whole)
    assert not exporter.verify(tmp_path / "nowhere").ok


def test_a_map_of_another_model_is_refused(table: LayerTable) -> None:
    bit_map = BitMap(model_digest="0" * 64, weights=random_map(table, (4,)).weights)
    with pytest.raises(LayerMismatchError, match="was made for the model"):
        ExportJob(table=table, bit_map=bit_map)


def test_names_that_are_not_known() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'quanto'.*Known: .*neutral, .*quanto"):
        get_exporter("quant")
    with pytest.raises(ConfigError, match="registered already"):
        register("neutral", TARGETS["neutral"])
    assert set(NAMES) >= {"neutral", "quanto"}
