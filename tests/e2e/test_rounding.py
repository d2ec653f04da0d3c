"""GPTQ rounding through the command line: evaluation, the model that is written, training, and what a search may
choose."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli

METHODS = """
[[methods]]
name = "plain"
allocator = "ilp-layer"
scheme = "auto"
bias_correction = true
[[methods]]
name = "gptq"
allocator = "ilp-layer"
scheme = "auto"
bias_correction = true
rounding = "gptq"
[search]
trials = 2
samples = 4
final_samples = 4
method = "plain"
[search.space]
rounding = ["base", "gptq"]
"""


@pytest.mark.slow
def test_a_study_with_gptq_rounding(cli: Cli, study: Path, profiled: Path) -> None:
    text = study.read_text()
    start, end = text.index("[[methods]]"), text.index("[evaluate]")
    study.write_text(text[:start] + METHODS + text[end:])
    options = ("--run-dir", "r", "--set", 'allocate.budgets=["uniform:2"]')
    first = cli("run", study, *options)
    assert first.returncode == 0, first.stderr
    with (profiled / "pareto.csv").open() as handle:
        rows = {r["method"]: r for r in csv.DictReader(handle)}
    assert rows["plain"]["size_bytes"] == rows["gptq"]["size_bytes"], "rounding takes no storage"
    # Which is better means nothing on four random layers of noise (tests/unit/quant has what it promises); that it is
    # done shows.
    assert abs(float(rows["gptq"]["paired_psnr"]) - float(rows["plain"]["paired_psnr"])) > 0.01
    maps = {
        m: json.loads((profiled / f"allocations/{m}@uniform-2/bitmap.json").read_text())["data"]
        for m in ("plain", "gptq")
    }
    assert maps["gptq"]["defaults"]["rounding"] == "gptq"
    assert "rounding" not in maps["plain"]["defaults"]
    found = json.loads((profiled / "search/search.json").read_text())["data"]
    assert {t["params"]["rounding"] for t in found["trials_table"]} == {"base", "gptq"}
    assert found["distinct_maps"] == 2, "one map a rounding"
    again = cli("run", study, *options)
    assert again.returncode == 0, again.stderr
    assert "search: reused" in again.stderr
    written = cli("quantize", "--config", study, *options, "--method", "gptq", "--budget", "uniform:2")
    assert written.returncode == 0, written.stderr
    trained = cli(
        "distill", "--config", study, *options, "--method", "gptq", "--budget", "uniform:2", "--set", "distill.steps=4"
    )
    assert trained.returncode == 0, trained.stderr
    before = json.loads((profiled / "distilled/gptq@uniform-2/metrics.json").read_text())["data"]["before"]
    assert before["paired_psnr"]["value"] == pytest.approx(float(rows["gptq"]["paired_psnr"]), abs=0.3)
