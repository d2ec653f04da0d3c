"""The outer search from the command line on a tiny model: run, continue, workers, watch, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import STUDY, Cli

SEARCH = """
[search]
trials = 6
samples = 4
chunk = 2
inputs = 4
top = 1
repeats = 1
refine = 1
refine_samples = 8
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


def results(folder: Path) -> dict[str, object]:
    return json.loads((folder / "search" / "search.json").read_text())["data"]


@pytest.mark.slow
def test_a_search_runs_goes_on_and_reaches_the_report(cli: Cli, study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = cli("search", "-c", str(study), "--run-dir", str(folder), "--trials", "4")
    assert first.returncode == 0, first.stderr
    assert results(folder)["trials"] == 4
    assert "plain" in first.stdout
    assert "uniform:3" in first.stdout

    done = cli(
        "run", str(study), "--run-dir", str(folder)
    )  # six trials are asked for: two more, then the rest of the study
    assert done.returncode == 0, done.stderr
    assert "continuing at 4 of 6" in done.stderr
    data = results(folder)
    assert data["trials"] == 6
    assert [b["budget"] for b in data["budgets"]] == ["uniform:3", "uniform:4"]
    for entry in data["budgets"]:
        arms = [r["arm"] for r in entry["rows"]]
        assert arms == ["uniform", "random", "shuffled", "kurtosis", "plain", "search"]
        assert all(r["size_bytes"] <= entry["rows"][0]["size_bytes"] + 1 for r in entry["rows"])
        assert entry["rows"][-1]["final"] > 0  # chosen among the best few on seeds of its own
        assert (
            entry["rows"][-1]["lead"] > 1 or entry["rows"][-1]["paired"] == entry["rows"][-2]["paired"]
        )  # or the plain map
        assert len(entry["refinement"]["rounds"]) == 1
        assert entry["refinement"]["rounds"][0]["tried"]
    page = (folder / "report.html").read_text()
    assert 'id="search"' in page
    assert "Progress against evaluation cost" in page
    rows = (folder / "pareto.csv").read_text()
    assert ",search," in rows
    assert ",search+trd," in rows
    for name in ("search_front.png", "search_history_forwards.svg", "search_parallel.png"):
        assert (folder / "search" / "figures" / name).stat().st_size > 1000
    assert len((folder / "search" / "trials.jsonl").read_text().splitlines()) == 6
    assert (folder / "search" / "arms.csv").read_text().startswith("budget,arm,average_bits,size_bytes")

    again = cli("report", "-c", str(study), "--run-dir", str(folder))
    assert again.returncode == 0, again.stderr
    assert "report: reused" in again.stderr

    other = cli("search", "-c", str(study), "--run-dir", str(folder), "--set", "search.samples=6")
    assert other.returncode == 4
    assert "search seeds" in other.stderr


@pytest.mark.slow
def test_workers_share_a_study_and_secrets_stay_secret(cli: Cli, study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = cli("search", "-c", str(study), "--run-dir", str(folder), "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["trials"] == 6
    logs = list((folder / "search" / "workers").glob("worker-*.log"))
    assert len(logs) == 2
    watched = cli("search", "-c", str(study), "--run-dir", str(folder), "--watch")
    assert watched.returncode == 0, watched.stderr

    refused = cli(
        "search",
        "-c",
        str(study),
        "--run-dir",
        str(tmp_path / "b"),
        "--workers",
        "2",
        "--storage",
        f"sqlite:///{tmp_path}/a.db",
    )
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
    assert "overlap" in overlap.stderr
    late = cli("search", "-c", str(study), "--run-dir", str(tmp_path / "r"), "--set", "evaluate.first_seed=2000060")
    assert late.returncode == 2  # among the seeds of the refinement
    assert "2000000..2000071" in late.stderr
    unknown = cli("search", "-c", str(study), "--run-dir", str(tmp_path / "r"), "--set", "search.space.exponet=[1,2]")
    assert unknown.returncode == 2
    assert "did you mean 'exponent'" in unknown.stderr
