"""The outer search from the command line on a tiny model: run, interrupt, continue, workers, report."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import forked
from tests.e2e.conftest import STUDY, Cli

SEARCH = """
[search]
trials = 4
samples = 4
chunk = 2
final_samples = 4
[search.space]
exponent = [0.5, 2.0]
low_bits = [-1.0, 1.0]
granularity = ["channel", "layer"]
"""
TRAINING = '[distill]\nmethods = ["search"]\nbudgets = ["uniform:3"]\nsteps = 2\nbatch = 2\nrelation.window = 1\n'
METHOD = '[[methods]]\nname = "search"\nallocator = "search"\nscheme = "auto"\nbias_correction = true\n'


@pytest.fixture
def study(model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(
        STUDY.format(source=json.dumps(str(model_folder))).replace("[evaluate]", METHOD + "[evaluate]")
        + SEARCH
        + TRAINING
    )
    return path


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "search" / "search.json").read_text())["data"]


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "search" / "trials.csv").open() as handle:
        return list(csv.DictReader(handle))


@pytest.mark.slow
def test_a_search_runs_goes_on_and_reaches_the_report(cli: Cli, study: Path, profiled: Path) -> None:
    folder = profiled
    first = cli("search", "-c", str(study), "--run-dir", str(folder), "--trials", "2")
    assert first.returncode == 0, first.stderr
    assert results(folder)["trials"] == 2
    assert "plain" in first.stdout
    assert "uniform:3" in first.stdout

    done = cli("run", str(study), "--run-dir", str(folder))  # four trials: two more, then the rest of the study
    assert done.returncode == 0, done.stderr
    assert "continuing at 2 of 4" in done.stderr
    data = results(folder)
    assert data["trials"] == 4
    assert [b["budget"] for b in data["budgets"]] == ["uniform:3", "uniform:4"]
    for entry in data["budgets"]:
        *_, plain, chosen = entry["rows"]
        assert [r["arm"] for r in entry["rows"]] == ["uniform", "plain", "search"]
        assert all(r["size_bytes"] <= entry["rows"][0]["size_bytes"] + 1 for r in entry["rows"])
        assert chosen["final"] > 0  # chosen among the best few on seeds of its own
        assert chosen["lead"] > 1 or chosen["bit_map"] == plain["bit_map"]
    page = (folder / "report.html").read_text()
    assert 'id="search"' in page
    assert "on fresh ones." in page
    assert 'data-row="search+trd"' in page, "a trained map shows its samples"
    rows = (folder / "pareto.csv").read_text()
    assert ",search," in rows
    assert ",search+trd," in rows
    for name in ("search_front.png", "search_front.svg"):
        assert (folder / "figures" / name).stat().st_size > 1000
    assert [t["number"] for t in trials(folder)] == list("0123")

    again = cli("report", "-c", str(study), "--run-dir", str(folder))
    assert again.returncode == 0, again.stderr
    assert "report: reused" in again.stderr

    other = cli("search", "-c", str(study), "--run-dir", str(folder), "--set", "search.samples=6")
    assert other.returncode == 4
    assert "search seeds" in other.stderr


@pytest.mark.slow
def test_one_worker_and_a_seed_give_the_same_maps_and_an_interrupted_search_goes_on(
    cli: Cli, study: Path, measured: Path, tmp_path: Path
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        shutil.copytree(measured, folder)
    for folder in (a, b):
        done = cli("search", "-c", str(study), "--run-dir", str(folder), "--trials", "3")
        assert done.returncode == 0, done.stderr
    maps = [sorted(p.read_bytes() for p in (f / "search" / "maps").iterdir()) for f in (a, b)]
    assert maps[0] == maps[1]
    points = [[(p["digest"], p["error"]) for p in results(f)["points"]] for f in (a, b)]
    assert points[0] == points[1]

    command = ["search", "-c", str(study), "--run-dir", str(b), "--trials", "12"]
    process = forked.start(command, tmp_path, tmp_path / "out", tmp_path / "err")
    journal, end = b / "search" / "study.journal", time.monotonic() + 60
    before = journal.stat().st_size
    while journal.stat().st_size < before + 3000 and time.monotonic() < end:  # some trials further
        time.sleep(0.02)
    code, said = forked.stop(process, signal.SIGINT), (tmp_path / "err").read_text()
    assert code == 130, said
    assert "the same command continues" in said
    done = cli("search", "-c", str(study), "--run-dir", str(b), "--trials", "12")
    assert done.returncode == 0, done.stderr
    assert "continuing at " in done.stderr
    assert sum(t["state"] in ("COMPLETE", "PRUNED") for t in trials(b)) == results(b)["trials"] == 12


@pytest.mark.slow
def test_workers_share_a_study_and_secrets_stay_secret(cli: Cli, study: Path, profiled: Path, tmp_path: Path) -> None:
    folder = profiled
    done = cli("search", "-c", str(study), "--run-dir", str(folder), "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert 4 <= data["trials"] <= 5  # each worker ends the trial that it is at
    assert len(list((folder / "search" / "workers").glob("worker-*.log"))) == 2
    assert {t["worker"] for t in trials(folder)} <= {"0", "1"}

    sqlite = f"sqlite:///{tmp_path}/a.db"
    refused = cli("search", "-c", study, "--run-dir", tmp_path / "b", "--workers", "2", "--storage", sqlite)
    assert refused.returncode == 2
    assert "no row locks" in refused.stderr
    url = "postgresql://me:hunter2@127.0.0.1:9/x"
    unreachable = cli("search", "-c", str(study), "--run-dir", str(tmp_path / "b"), "--storage", url)
    assert unreachable.returncode == 2
    assert not (tmp_path / "b" / "profile.json").exists()  # told before anything long
    assert "hunter2" not in unreachable.stderr + unreachable.stdout
    for file in (tmp_path / "b").rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes()


def test_a_search_is_planned_and_checked_without_running(cli: Cli, study: Path, tmp_path: Path) -> None:
    overlap = cli("search", "-c", str(study), "--run-dir", str(tmp_path / "r"), "--set", "search.first_seed=4")
    assert overlap.returncode == 2
    assert "Move search.first_seed" in overlap.stderr
    unknown = cli("search", "-c", str(study), "--run-dir", str(tmp_path / "r"), "--set", "search.space.exponet=[1,2]")
    assert unknown.returncode == 2
    assert "did you mean 'exponent'" in unknown.stderr
