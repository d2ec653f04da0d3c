from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mpqsearch.core import BitMap, LayerTable, MetricValue, Policy, StudyRecord, size_bits, uniform_map
from mpqsearch.errors import ArtifactError, LayerMismatchError
from mpqsearch.report.breakdown import size_breakdown
from mpqsearch.report.tables import read_pareto_json, standings, tied, write_pareto_csv, write_pareto_json


def test_csv_holds_every_number_to_the_last_digit(tmp_path: Path, records: list[StudyRecord]) -> None:
    write_pareto_csv(tmp_path / "pareto.csv", records)
    frame = pd.read_csv(tmp_path / "pareto.csv", float_precision="round_trip")
    assert len(frame) == len(records)
    for column, values in (
        ("average_bits", [r.average_bits for r in records]),
        ("fd_data_high", [r.metrics["fd_data"].high for r in records]),
        ("predicted_loss", [r.predicted_loss for r in records]),
    ):
        np.testing.assert_array_equal(frame[column].to_numpy(), np.array(values))
    assert np.isnan(frame["fd_fp"][0])
    assert frame["paired_mse"].isna().all()


def test_json_gives_the_same_records_back(tmp_path: Path, records: list[StudyRecord]) -> None:
    path = tmp_path / "pareto.json"
    write_pareto_json(path, records, {"config": "abc"})
    assert "NaN" not in path.read_text()
    again = read_pareto_json(path)
    assert [repr(r) for r in again] == [repr(r) for r in records]  # repr, since NaN does not equal itself


def test_json_of_unknown_intervals_and_of_nothing(tmp_path: Path, records: list[StudyRecord]) -> None:
    value = dataclasses.replace(records[1].metrics["fd_fp"], low=float("nan"), high=float("nan"))
    write_pareto_json(tmp_path / "p.json", [dataclasses.replace(records[1], metrics={"fd_fp": value})])
    assert np.isnan(read_pareto_json(tmp_path / "p.json")[0].metrics["fd_fp"].low)
    write_pareto_json(tmp_path / "empty.json", [])
    assert read_pareto_json(tmp_path / "empty.json") == []


def test_damaged_json_is_refused(tmp_path: Path, records: list[StudyRecord]) -> None:
    path = tmp_path / "pareto.json"
    write_pareto_json(path, records)
    path.write_text(path.read_text().replace('"method"', '"methode"'))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        read_pareto_json(path)


def value(low: float, high: float) -> MetricValue:
    return MetricValue(
        name="n",
        value=(low + high) / 2,
        n_samples=1,
        seeds="0",
        extractor="e",
        reference="r",
        low=low,
        high=high,
        spread="seeds",
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1, 2), (3, 4), False),
        ((1, 3), (3, 4), True),
        ((1, 9), (3, 4), True),
        ((3, 4), (1, 2), False),
        ((np.nan, np.nan), (1, 2), True),
    ],
)
def test_ties_are_overlapping_intervals(
    first: tuple[float, float], second: tuple[float, float], expected: bool
) -> None:
    bounds = [dataclasses.replace(value(1, 2), low=low, high=high) for low, high in (first, second)]
    assert tied(*bounds) is expected
    assert tied(*reversed(bounds)) is expected


def test_standings_are_per_budget(records: list[StudyRecord]) -> None:
    marks = standings(records, "fd_fp")
    assert marks[0] == ""
    for bits in (2, 3, 4, 5, 6):
        group = [(r, m) for r, m in zip(records, marks, strict=True) if r.budget == f"uniform:{bits}"]
        best = min(group, key=lambda g: g[0].metrics["fd_fp"].value)
        assert [m for _, m in group].count("best") == 1
        assert best[1] == "best"
        for r, m in group:
            if m != "best":
                assert (m == "tie") == tied(r.metrics["fd_fp"], best[0].metrics["fd_fp"])


def test_standings_turn_round_where_more_is_better(records: list[StudyRecord]) -> None:
    marks = standings(records, "paired_psnr")
    group = [
        (r.metrics["paired_psnr"].value, m) for r, m in zip(records, marks, strict=True) if r.budget == "uniform:3"
    ]
    assert max(group)[1] == "best"


@pytest.mark.parametrize("mixed", [False, True])
def test_breakdown_is_the_whole_size(table: LayerTable, policy: Policy, mixed: bool) -> None:
    rng = np.random.default_rng(3)
    weights = {
        la.name: np.asarray(rng.choice([1, 2, 5, 8, 16], size=la.n_channels if mixed else ()), dtype=np.uint8)
        for la in table
    }
    for activations in ({}, dict.fromkeys(weights, 8)):
        bit_map = BitMap(model_digest=table.digest, weights=weights, activations=activations)
        parts = size_breakdown(table, bit_map, policy)
        assert sum(parts.values()) == size_bits(table, bit_map)
        assert (parts["tags"] > 0) == mixed


def test_breakdown_by_hand(table: LayerTable, policy: Policy) -> None:
    parts = size_breakdown(table, uniform_map(table, policy, 4), policy)
    inner = [la for la in table if policy.fixed_width(la) is None]
    assert parts["codes"] == 4 * sum(la.n_weights for la in inner)
    assert parts["scales"] == sum(la.n_channels * (16 + 4) + 8 for la in inner)
    assert parts["tags"] == 0
    assert parts["fixed"] == sum(
        8 * la.n_weights + la.n_channels * (16 + 8) + 8 for la in table if policy.fixed_width(la) == 8
    )
    assert parts["kept"] == 16 * (320 + 800)
    assert size_breakdown(table, uniform_map(table, policy, 4))["fixed"] == 0


def test_breakdown_refuses_another_model(table: LayerTable, policy: Policy) -> None:
    with pytest.raises(LayerMismatchError):
        size_breakdown(dataclasses.replace(table, digest="other"), uniform_map(table, policy, 4), policy)
