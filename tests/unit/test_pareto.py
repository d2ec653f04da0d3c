from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqsearch.core import MetricValue, StudyRecord
from mpqsearch.errors import ConfigError, NumericsError
from mpqsearch.pareto import ParetoFront, hypervolume_2d, main_metric, non_dominated, records_table

# few distinct values, so that ties and equal rows are common
coordinate = st.one_of(st.integers(-3, 3).map(float), st.just(float("nan")), st.just(float("inf")))
clouds = st.integers(1, 4).flatmap(
    lambda d: st.lists(st.lists(coordinate, min_size=d, max_size=d), min_size=1, max_size=12)
)
planes = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=10)


def record(
    method: str, bits: float, fd: float | None, *, granularity: str = "layer", metric: str = "fd_fp", **more: Any
) -> StudyRecord:
    metrics = {}
    if fd is not None:
        metrics[metric] = MetricValue(
            name=f"{metric} label",
            value=fd,
            n_samples=64,
            seeds="0..63",
            extractor="x",
            reference="y",
            low=fd * 0.9,
            high=fd * 1.1,
            spread="bootstrap",
            higher_is_better=metric == "paired_psnr",
        )
    values: dict[str, Any] = {
        "model": "m",
        "method": method,
        "granularity": granularity,
        "budget": f"uniform:{round(bits)}",
        "quantity": "uniform_bits",
        "average_bits": bits,
        "size_bytes": int(bits * 1000),
        "act_bits": 16.0,
        "bit_map_digest": f"{method}{bits}",
        "n_samples": 64,
        "seeds": "0..63",
        "seconds": 1.0,
        "predicted_loss": 0.5,
        "metrics": metrics,
    }
    return StudyRecord(**(values | more))


def test_points_are_judged_by_their_distance_and_without_pictures_by_their_error() -> None:
    sound = [record("uniform", 3, 0.2, metric="paired_mse"), record("ilp", 3, 0.1, metric="paired_mse")]
    assert main_metric(sound) == "paired_mse"
    assert main_metric([*sound, record("ilp", 4, 1.0)]) == "fd_fp"
    assert [r.method for r in ParetoFront.from_records(sound, main_metric(sound)).front] == ["ilp"]


def dominated_by_definition(points: np.ndarray, i: int) -> bool:
    return any(
        all(q <= p for q, p in zip(other, points[i], strict=True)) and tuple(other) != tuple(points[i])
        for other in points
    )


@given(clouds)
def test_front_is_the_definition(rows: list[list[float]]) -> None:
    points = np.array(rows)
    known = ~np.isnan(points).any(axis=1)
    expected = [
        bool(known[i]) and not dominated_by_definition(points[known], int(known[:i].sum())) for i in range(len(points))
    ]
    assert non_dominated(points).tolist() == expected


@given(clouds, st.randoms(use_true_random=False))
def test_front_does_not_depend_on_the_order(rows: list[list[float]], random: Any) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    assert non_dominated(np.array(rows)[order]).tolist() == non_dominated(np.array(rows))[order].tolist()


@given(clouds)
def test_rows_with_nan_are_never_on_the_front_and_change_nothing(rows: list[list[float]]) -> None:
    points = np.array(rows)
    known = ~np.isnan(points).any(axis=1)
    front = non_dominated(points)
    assert not front[~known].any()
    assert front[known].tolist() == non_dominated(points[known]).tolist()
    assert front.any() == known.any()


def test_no_points_no_front() -> None:
    assert non_dominated([]).shape == (0,)
    assert hypervolume_2d([], (1, 1)) == 0.0


def test_points_must_be_a_table() -> None:
    with pytest.raises(ConfigError, match=r"\[N, D\]"):
        non_dominated([1.0, 2.0])


@given(planes, st.tuples(st.integers(0, 12), st.integers(0, 12)))
def test_hypervolume_counts_dominated_cells(points: list[tuple[int, int]], reference: tuple[int, int]) -> None:
    cells = sum(any(x <= i and y <= j for x, y in points) for i in range(reference[0]) for j in range(reference[1]))
    assert hypervolume_2d(np.array(points, dtype=float).reshape(-1, 2), reference) == cells


@given(planes)
def test_hypervolume_of_the_front_is_that_of_all_points(points: list[tuple[int, int]]) -> None:
    array = np.array(points, dtype=float).reshape(-1, 2)
    assert hypervolume_2d(array[non_dominated(array)], (13, 13)) == hypervolume_2d(array, (13, 13))


def test_hypervolume_ignores_nan_and_refuses_the_infinite() -> None:
    assert hypervolume_2d([[0, np.nan], [1, 1]], (2, 3)) == 2.0
    with pytest.raises(NumericsError, match="infinite"):
        hypervolume_2d([[-np.inf, 0]], (1, 1))
    with pytest.raises(ConfigError, match="finite"):
        hypervolume_2d([[0, 0]], (1, np.inf))
    with pytest.raises(ConfigError, match=r"\[N, 2\]"):
        hypervolume_2d([[0, 0, 0]], (1, 1))


def test_front_of_records() -> None:
    study = [
        record("full-precision", 16, 0.1),
        record("uniform", 2, 100),
        record("uniform", 8, 1),
        record("ilp", 3, 10),
        record("ilp", 4, 20),
        record("ilp", 5, None),
    ]
    front = ParetoFront.from_records(study)
    assert front.full_precision is study[0]
    assert [r.average_bits for r in front.records] == [2, 3, 4, 8]
    assert [r.average_bits for r in front.front] == [2, 3, 8]
    assert {front.method_name(r) for r in front.records} == {"ilp", "uniform"}
    # box: bits 2..8, log values 1..100; ilp at (3, 10) dominates 5/6 of the bits and half of the decades
    np.testing.assert_allclose(front.hypervolume("ilp"), 5 / 6 * 0.5, rtol=1e-12)
    assert front.hypervolume("uniform") == 0.0
    np.testing.assert_allclose(front.hypervolume(), 5 / 6 * 0.5, rtol=1e-12)


def test_a_metric_where_more_is_better_is_turned_round() -> None:
    front = ParetoFront.from_records(
        [record(m, b, v, metric="paired_psnr") for m, b, v in [("a", 2, 20), ("a", 3, 15), ("a", 4, 30)]], "paired_psnr"
    )
    assert not front.log
    assert [r.average_bits for r in front.front] == [2, 4]


def test_the_same_method_at_two_granularities_is_two() -> None:
    front = ParetoFront.from_records(
        [record("ilp", 2, 3), record("ilp", 2, 2, granularity="channel"), record("omq", 2, 5)]
    )
    assert {front.method_name(r) for r in front.records} == {"ilp (channel)", "ilp (layer)", "omq"}
    assert len(front.of_method("ilp (channel)")) == 1


def test_values_that_are_not_positive_have_no_logarithm() -> None:
    assert not ParetoFront.from_records([record("a", 2, 0.0), record("a", 3, 1.0)]).log


def test_an_empty_front_has_no_hypervolume() -> None:
    with pytest.raises(ConfigError, match="no record has the metric"):
        ParetoFront.from_records([]).hypervolume()


METRIC_COLUMNS = [
    "fd_data",
    "fd_data_low",
    "fd_data_high",
    "fd_fp",
    "fd_fp_low",
    "fd_fp_high",
    "paired_psnr",
    "paired_mse",
    "kid_data",
]
SIZE_COLUMNS = ["budget", "quantity", "average_bits", "size_bytes", "act_bits"]
REQUIRED = ["model", "method", "granularity", *SIZE_COLUMNS, *METRIC_COLUMNS, "n_samples", "seeds", "seconds"]


def test_table_has_every_column_in_every_row() -> None:
    rows = records_table(
        [
            record("uniform", 2, 4.0),
            record("ilp", 2, None, predicted_loss=float("nan")),
            record("ilp", 3, 1, metric="fid"),
        ]
    )
    assert [c for c in rows[0] if c in REQUIRED] == REQUIRED
    assert all(list(r) == list(rows[0]) for r in rows)
    assert rows[0]["fd_fp"] == 4.0
    assert rows[0]["fd_fp_high"] == pytest.approx(4.4)
    assert rows[1]["fd_fp"] is None
    assert rows[1]["predicted_loss"] is None
    assert rows[2]["fid"] == 1.0
    assert [r["on_front"] for r in rows] == [True, False, False]
