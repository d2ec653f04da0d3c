"""The smallest map that passes: read, bracketed and said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqsearch import stages
from mpqsearch.core import BitMap, Budget, MetricValue, Policy, StudyRecord
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, UnknownNameError
from mpqsearch.stages import Quality, until
from tests.support.tiny import tiny_table

TABLE = tiny_table(channels=64, fan_in=1024)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fd_fp<=0.1", Quality("fd_fp", False, 0.1)),
        (" paired_psnr >= 4e1 ", Quality("paired_psnr", True, 40.0)),
        ("clip_score>=-2", Quality("clip_score", True, -2.0)),
        ("hps2_drop<=0.5", Quality("hps2_drop", False, 0.5)),
    ],
)
def test_a_quality_is_read(text: str, expected: Quality) -> None:
    assert Quality.parse(text) == expected
    assert Quality.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["fd_fp", "fd_fp<0.1", "<=0.1", "fd_fp<=", "fd_fp<=x", "fd_fp=0.1", "a<=1.2.3"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Write a metric, <= or >=, and a number"):
        Quality.parse(text)


def record(bits: float, value: float, half: float, *, higher: bool) -> StudyRecord:
    metric = MetricValue(
        name="m",
        value=value,
        n_samples=8,
        seeds="0..7",
        extractor="",
        reference="",
        low=value - half,
        high=value + half,
        spread="bootstrap",
        higher_is_better=higher,
    )
    return StudyRecord(
        model="m",
        method="x",
        granularity="layer",
        budget="",
        quantity="",
        average_bits=bits,
        size_bytes=round(bits * 1e6),
        act_bits=16.0,
        bit_map_digest="",
        n_samples=8,
        seeds="0..7",
        seconds=0.0,
        predicted_loss=0.0,
        metrics={"paired_psnr" if higher else "fd_fp": metric},
    )


def test_the_worse_end_of_the_interval_decides() -> None:
    at_most, at_least = Quality.parse("fd_fp<=1"), Quality.parse("paired_psnr>=30")
    assert at_most.passes(record(3, 0.9, 0.05, higher=False))
    assert not at_most.passes(record(3, 0.9, 0.2, higher=False))
    assert at_least.passes(record(3, 31, 0.5, higher=True))
    assert not at_least.passes(record(3, 31, 1.5, higher=True))
    with pytest.raises(UnknownNameError, match="unknown metric 'paired_psnr'"):
        at_least.passes(record(3, 0.9, 0.05, higher=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr>=40", r"unknown metric 'psnr' \(did you mean 'paired_psnr'\?\)"),
        ("lpips<=0.1", r"unknown metric 'lpips'.*Scores are named in evaluate\.scorers"),
        ("fd_data<=1", r"unknown metric 'fd_data'.*distances to data need evaluate\.reference"),
        ("fd_fp>=1", r"better when it is lower: write --until 'fd_fp<=\.\.\.'"),
        ("ssim>=1.01", "full precision itself does not reach ssim>=1.01: ssim lies in -1 to 1"),
        ("paired_psnr>=120", "paired_psnr lies in 0 to 100"),
        ("fd_fp<=-0.1", "fd_fp lies in 0 to inf"),
        ("ssim_drop<=0.1", "unknown metric 'ssim_drop'"),
    ],
)
def test_what_no_map_can_reach_is_said_before_anything_is_measured(text: str, message: str) -> None:
    from mpqsearch.metrics import SSIM, load_extractor, measures

    known = measures(load_extractor("fmnist-cnn"), [SSIM])
    with pytest.raises(ConfigError, match=message):
        Quality.parse(text).check(known)
    for good in ("ssim>=0.9", "paired_psnr>=40", "class_accuracy>=0.5", "class_accuracy_drop<=0.01", "kid_fp<=0"):
        Quality.parse(good).check(known)
    assert set(measures(None)) == {"paired_mse"}


@pytest.fixture
def bracket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., until._Bracket]:
    """A bracket over a table of two layers whose quality is a formula of the size."""

    def make(
        quality: Quality, formula: Callable[[float], float], *, higher: bool, step: float = 1e-9
    ) -> until._Bracket:
        from mpqsearch.config import Config, ModelConfig

        config = Config(model=ModelConfig(source="fmnist-unet"), policy=Policy(widths=tuple(range(1, 9)), roles={}))
        run = stages.Run(config=config, folder=tmp_path)
        run.table = TABLE

        def allocation(_: Any, __: Any, budget: Budget) -> tuple[BitMap, dict[str, Any]]:
            label = f"{budget.limit // step * step:.6f}"
            codes = np.frombuffer(label.encode(), dtype=np.uint8) % 8 + 1
            digest = BitMap(model_digest=label, weights={"a": codes})
            return digest, {"predicted_loss": 0.0}

        def measured(_: Any, __: Any, budget: Budget, *___: Any) -> StudyRecord:
            bits = budget.limit // step * step
            value = formula(bits)
            return record(bits, value, 0.02 * abs(value), higher=higher)

        monkeypatch.setattr(until, "allocation", allocation)
        monkeypatch.setattr(until, "measured_record", measured)
        return until._Bracket(run=run, quality=quality, method=run.config.methods[-1])

    return make


@pytest.mark.parametrize("bound", [3.0, 0.5, 0.02, 0.001])
@pytest.mark.parametrize("slope", [1.4, 2.0])
def test_it_ends_within_a_percent_of_the_smallest_on_a_fine_grid(
    bracket: Callable[..., until._Bracket], bound: float, slope: float
) -> None:
    def formula(bits: float) -> float:  # steeper at few bits, flat in between: as fronts are
        return 40 * math.exp(-slope * bits - 1.5 / bits + 0.3 * math.sin(bits))

    quality = Quality("fd_fp", False, bound)
    found = bracket(quality, formula, higher=False)
    smallest, largest = 1.2, 8.3
    grid = np.arange(smallest, largest, 0.001)
    passing = [b for b in grid if formula(b) * 1.02 <= bound]
    best = found.run_from(Budget.parse("8.3bit"))
    assert len(found.tried) <= until.MOST
    assert quality.passes(best.record)
    assert best.record.average_bits <= 1.012 * passing[0]
    assert found.run.path("until").is_dir()


def test_no_budget_below_one_that_failed_is_tried(bracket: Callable[..., until._Bracket]) -> None:
    """Maps that use less than they are allowed, here one every 0.02 bits, do not open the bracket again."""
    for bound in (3.0, 0.5, 0.02):
        found = bracket(
            quality := Quality("fd_fp", False, bound), lambda b: 40 * math.exp(-2 * b), higher=False, step=0.02
        )
        best, failed = found.run_from(Budget.parse("8.3bit")), 0.0
        for tried in found.tried:
            assert tried.budget.limit > failed
            failed = failed if quality.passes(tried.record) else max(failed, tried.budget.limit)
        smallest = math.ceil(math.log(40 * 1.02 / bound) / 2 / 0.02) * 0.02
        assert smallest - 1e-9 <= best.record.average_bits <= 1.012 * smallest


def test_a_quality_that_the_largest_map_misses_is_said(bracket: Callable[..., until._Bracket]) -> None:
    found = bracket(Quality("paired_psnr", True, 60.0), lambda bits: 6 * bits, higher=True)
    with pytest.raises(InfeasibleBudgetError, match=r"paired_psnr>=60 is not reached: the map of 4000000 bytes has 24"):
        found.run_from(Budget.parse("4bit"))
    assert found.run_from(Budget.parse("11bit")).record.average_bits <= 1.012 * 60 / (6 * 0.98)
