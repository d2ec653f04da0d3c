"""One suite for every export target: what the contract in `mpqsearch.export.contract` promises, on a U-Net and a transformer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable
from mpqsearch.errors import ConfigError, LayerMismatchError, UnknownNameError
from mpqsearch.export import EXPORTERS, ROUNDINGS, Exporter, ExportJob, get_exporter, register
from mpqsearch.export.contract import REASONS
from mpqsearch.models.denoiser import Denoiser, adapt
from mpqsearch.models.discover import discover

TARGETS = sorted(EXPORTERS)


def tiny_unet() -> Denoiser:
    torch.manual_seed(0)
    module = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,  # one output channel: quanto stores such a layer with a single scale
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=5,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return adapt(module, sample_shape=(1, 8, 8), name="tiny-unet", n_classes=4)


def tiny_transformer() -> Denoiser:
    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=80,  # rows of 160, in groups of 32
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    return adapt(module, sample_shape=(1, 8, 8), name="tiny-dit", n_classes=4)


@pytest.fixture(scope="module", params=["unet", "transformer"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return tiny_unet() if request.param == "unet" else tiny_transformer()


@pytest.fixture(scope="module")
def table(denoiser: Denoiser) -> LayerTable:
    return discover(denoiser)


@pytest.fixture(params=TARGETS)
def exporter(request: pytest.FixtureRequest) -> Exporter:
    made = get_exporter(request.param)
    if made.capabilities().requires:
        pytest.importorskip("optimum.quanto" if request.param == "quanto" else made.capabilities().requires)
    return made


def random_map(table: LayerTable, widths: tuple[int, ...], *, mixed: bool = False, seed: int = 0) -> BitMap:
    rng = np.random.default_rng(seed)
    weights = {
        la.name: np.asarray(rng.choice(widths, size=la.n_channels if mixed and i % 2 else ()), dtype=np.uint8)
        for i, la in enumerate(table)
    }
    return BitMap(model_digest=table.digest, weights=weights)


def test_it_keeps_the_contract(exporter: Exporter) -> None:
    assert isinstance(exporter, Exporter)
    can = exporter.capabilities()
    assert list(can.widths) == sorted(set(can.widths))
    assert can.granularity in ("layer", "channel")


@pytest.mark.parametrize("rounding", ["resolve", "up", "down"])
@pytest.mark.parametrize("mixed", [False, True])
def test_plan_covers_every_layer_with_a_reason(
    exporter: Exporter, denoiser: Denoiser, table: LayerTable, rounding: str, mixed: bool
) -> None:
    job = ExportJob(table=table, bit_map=random_map(table, (1, 3, 4, 6, 16), mixed=mixed), denoiser=denoiser, rounding=rounding)
    plan = exporter.plan(job)
    can = exporter.capabilities()
    assert [e.layer for e in plan] == [la.name for la in table]
    assert {e.reason for e in plan} <= set(REASONS)
    for entry in plan:
        assert entry.will_get is None or entry.will_get in (*can.widths, FULL_PRECISION)
        assert (entry.will_get is None) <= (can.granularity == "channel")
        if entry.reason == "exact":
            assert entry.asked[0] <= (entry.will_get or entry.asked[0]) <= entry.asked[1]
        else:
            assert entry.detail


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_the_target_holds_is_planned_unchanged(exporter: Exporter, table: LayerTable, rounding: str) -> None:
    bit_map = random_map(table, exporter.capabilities().widths, seed=1)
    plan = exporter.plan(ExportJob(table=table, bit_map=bit_map, rounding=rounding))
    assert {e.layer: e.will_get for e in plan} == {n: int(w) for n, w in bit_map.weights.items()}
    assert {e.reason for e in plan} == {"exact"}


def test_the_consumer_holds_what_was_planned(tmp_path: Path, exporter: Exporter, denoiser: Denoiser, table: LayerTable) -> None:
    before = {k: v.clone() for k, v in denoiser.module.state_dict().items()}
    bit_map = random_map(table, (1, 2, 3, 4, 6, 8, 16), mixed=True, seed=2)
    job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, rounding="up", inputs={"bitmap": bit_map.digest})
    paths = exporter.write(tmp_path / "out", job)
    assert sorted(paths) == sorted((tmp_path / "out").iterdir()), "every file is named and no temporary one is left"
    seen = exporter.verify(tmp_path / "out")
    assert seen.ok, seen.summary()
    assert [(e.layer, e.got, e.asked) for e in seen.entries] == [(e.layer, e.will_get, e.asked_text) for e in exporter.plan(job)]
    after = denoiser.module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the model that was given stays as it is"


def test_writing_again_replaces_the_first(tmp_path: Path, exporter: Exporter, denoiser: Denoiser, table: LayerTable) -> None:
    can = exporter.capabilities()
    for width in (can.widths[0], can.widths[-1]):
        bit_map = random_map(table, (width,))
        exporter.write(tmp_path, ExportJob(table=table, bit_map=bit_map, denoiser=denoiser))
    seen = exporter.verify(tmp_path)
    assert seen.ok, seen.summary()
    assert {e.got for e in seen.entries} == {can.widths[-1]}


def test_any_damaged_file_is_reported(tmp_path: Path, exporter: Exporter, denoiser: Denoiser, table: LayerTable) -> None:
    paths = exporter.write(tmp_path, ExportJob(table=table, bit_map=random_map(table, (4,)), denoiser=denoiser))
    for path in paths:
        whole = path.read_bytes()
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
    with pytest.raises(UnknownNameError, match=r"did you mean 'quanto'.*Known: .*neutral, quanto"):
        get_exporter("quant")
    with pytest.raises(ConfigError, match="registered already"):
        register("neutral", EXPORTERS["neutral"])
    assert set(TARGETS) >= {"neutral", "quanto"}


def test_a_rounding_that_is_not_known(table: LayerTable) -> None:
    with pytest.raises(UnknownNameError, match="unknown rounding"):
        ExportJob(table=table, bit_map=random_map(table, (4,)), rounding="nearest")
