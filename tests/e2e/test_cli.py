"""Every verb on a small real model, as a user calls it; kill, resume, and every kind of mistake."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpqsearch import artifacts
from mpqsearch.export import TARGETS
from tests.e2e import forked
from tests.e2e.conftest import STUDY, Cli
from tests.support.shared import made_once


def one_layer_at_a_time(study: Path) -> None:
    """Let a study measure one layer at a time, too."""
    study.write_text(study.read_text().replace("final_widths = []", "final_widths = [3]"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with a study that nobody interrupted, its run ``r``, and what it said."""

    def make(folder: Path) -> None:
        (folder / "study.toml").write_text(STUDY.format(source=json.dumps(str(model_folder))))
        one_layer_at_a_time(folder / "study.toml")
        done = forked.run(["run", "study.toml", "--run-dir", "r"], folder, folder / "stdout", folder / "stderr")
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "straight", make)


def test_a_whole_study_and_its_second_run(cli: Cli, study: Path, tmp_path: Path, straight: Path) -> None:
    one_layer_at_a_time(study)
    plan = cli("run", study, "--run-dir", "r", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "would measure" in plan.stderr
    assert not (tmp_path / "r").exists(), "a dry run writes nothing"
    shutil.copytree(straight / "r", tmp_path / "r")
    with (tmp_path / "r/pareto.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert {r["method"] for r in rows} == {"full-precision", "uniform", "omq", "ilp-layer", "ilp-channel"}
    for column in (
        "model",
        "granularity",
        "budget",
        "average_bits",
        "size_bytes",
        "act_bits",
        "fd_data",
        "fd_data_low",
    ):
        assert column in rows[0]
    for column in ("fd_fp", "paired_psnr", "n_samples", "seeds", "seconds"):
        assert all(r[column] for r in rows if r["method"] != "full-precision")
    limits = {r["budget"]: int(r["size_bytes"]) for r in rows if r["method"] == "uniform"}
    assert all(int(r["size_bytes"]) <= limits[r["budget"]] for r in rows if r["method"].startswith("ilp"))
    page = (tmp_path / "r/report.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert list((tmp_path / "r/figures").glob("*.png"))
    assert "rank correlation" in (straight / "stderr").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*") if p.is_file()}
    second = cli("run", study, "--run-dir", "r")
    assert second.returncode == 0, second.stderr
    for stage in ("layers: reused", "profile: reused", "report: reused", "export: reused"):
        assert stage in second.stderr
    changed = [p.name for p, t in stamps.items() if p.stat().st_mtime_ns != t]
    assert set(changed) <= {"config.toml", "environment.json"}
    stale = cli("run", study, "--run-dir", "r", "--set", "calibration.samples=3")
    assert stale.returncode == 4
    assert "calibration (" in stale.stderr
    assert "--overwrite" in stale.stderr
    shown = cli("inspect", "r/allocations/ilp-channel@uniform-3/bitmap.json")
    assert "conv_in" in shown.stdout
    assert "mean bits over depth: " in shown.stdout
    whole = cli("inspect", "r").stdout
    assert "logarithmic bars" in whole
    assert re.search(r"allocations/\*/allocation.json\W+8\W+mpqsearch allocate", whole)
    assert re.search(r"distilled/\*/metrics.json\W+none\W+mpqsearch distill", whole)
    for file in (*(tmp_path / "r/metrics").glob("*.json"), *(tmp_path / "r/export").glob("*.json")):
        shown = cli("inspect", file)
        assert shown.returncode == 0, shown.stderr
        assert "{" not in shown.stdout, "records are shown as tables"
    assert json.loads(cli("inspect", "r/pareto.json", "--json").stdout)
    assert "logarithmic bars" in cli("inspect", "r/pareto.json").stdout
    assert "weights by role" in cli("inspect", "r/layers.json").stdout
    assert "most sensitive layers" in cli("inspect", "r/profile.json").stdout
    assert "optimal" in cli("inspect", "r/allocations/ilp-layer@uniform-3/allocation.json").stdout
    assert "python" in cli("inspect", "r/environment.json").stdout
    made = cli("quantize", "-c", study, "--run-dir", "r", "--budget", "uniform:3")
    assert made.returncode == 0, made.stderr
    from mpqsearch.sampling import load_model

    assert load_model(str(tmp_path / made.stdout.strip())).runner.n_classes == 5


def test_separate_verbs_agree_with_the_whole(cli: Cli, study: Path) -> None:
    assert "first" in cli("layers", "-c", study, "--run-dir", "r").stdout
    listed = json.loads(cli("layers", "-c", study, "--run-dir", "r", "--json").stdout)
    assert len(listed["layers"]) > 20
    assert cli("profile", "-c", study, "--run-dir", "r").returncode == 0
    solved = cli("allocate", "-c", study, "--run-dir", "r", "--budget", "3.9bit", "--json")
    assert solved.returncode == 0, solved.stderr
    for entry in json.loads(solved.stdout):
        if entry["method"]["allocator"].startswith("ilp"):
            assert entry["within_budget"]
            assert entry["result"]["status"] == "optimal"


def test_allocation_of_a_saved_profile_never_imports_torch(study: Path, profiled: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from mpqsearch.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "allocate", "-c", str(study), "--run-dir", "r"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("allocate", "--budget", "0.5bit"), 3, "smallest attainable is"),
        (("allocate", "--budget", "3 pounds"), 2, "cannot read the budget"),
        (("allocate", "--budget", "20bit"), 2, "above full precision"),
        (("layers", "--model", "nowhere", "--run-dir", "elsewhere"), 2, "unknown model 'nowhere'"),
        (("layers", "--set", "model.sauce=1"), 2, "did you mean 'source'"),
        (("layers", "--set", "policy.overrides={nolayer=4}", "--run-dir", "other"), 2, "unknown layer 'nolayer'"),
        (("export", "--target", "quantto"), 2, "did you mean 'quanto'"),
        (("export", "--method", "nope"), 2, "unknown method 'nope'"),
        (("quantize", "--method", "ilp-chanel"), 2, "did you mean 'ilp-channel'"),
        (("inspect", "nothing.json"), 2, "does not exist"),
        (("evaluate", "--map", "nothing.json"), 2, "nothing.json does not exist (allocate.maps.nothing"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_mistakes_end_with_one_clear_message(
    cli: Cli, study: Path, measured: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    takes_study = arguments[0] not in ("inspect", "frobnicate")
    extra = ("-c", study) if takes_study else ()
    extra += () if "--run-dir" in arguments or not takes_study else ("--run-dir", measured)
    out = cli(*arguments, *extra)
    assert out.returncode == code, out.stderr
    assert message in " ".join(out.stderr.split()), out.stderr
    assert "Traceback" not in out.stderr


EXTRACTOR = ("evaluate.extractor=fmnist-cn", 2, "did you mean 'fmnist-cnn'")
STATISTICS = ("evaluate.reference=nothing.safetensors", 2, "nothing.safetensors do not exist")


@pytest.mark.parametrize(
    ("verb", "setting", "code", "message"),
    [("evaluate", *EXTRACTOR), ("distill", *STATISTICS), ("search", *EXTRACTOR), ("run", *STATISTICS)],
)
def test_what_samples_are_measured_with_is_asked_for_before_the_profile(
    cli: Cli, study: Path, tmp_path: Path, verb: str, setting: str, code: int, message: str
) -> None:
    asked = (study,) if verb == "run" else ("-c", study)
    out = cli(verb, *asked, "--run-dir", "r", "--set", setting, *(("--trials", "2") if verb == "search" else ()))
    assert out.returncode == code, out.stderr
    assert message in out.stderr
    assert not (tmp_path / "r/profile.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "--trials", "0"), "no search is asked for"),
        (("search", "--trials", "2", "--workers", "0"), "Invalid value for '--workers'"),
        (("search", "--trials", "2", "--sampler", "grid"), "unknown sampler"),
        (("search", "--trials", "2", "--storage", "ftp://me:hunter2@host/x"), "ftp://me:***@host/x"),
        (("search", "--trials", "2", "--workers", "2", "--storage", "sqlite:///a.db"), "no row locks"),
        (("distill", "--method", "nope"), "unknown method 'nope'"),
        (("distill", "--set", "distill.steps=0"), "at least 1"),
        (("distill", "--set", 'budget.parts=["unet", "text_encoder"]'), "denoisers alone"),
        (("quantize", "--method", "nope"), "unknown method 'nope'"),
        (("export", "--target", "nope"), "unknown export target 'nope'"),
    ],
)
def test_mistakes_are_found_before_anything_long_begins(
    cli: Cli, study: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = cli(*arguments, "-c", study, "--run-dir", tmp_path / "run")
    assert out.returncode == 2, out.stderr
    assert message in " ".join(out.stderr.replace("│", " ").split()), out.stderr
    assert "hunter2" not in out.stderr
    assert not (tmp_path / "run").exists()


def numbers(run: Path) -> list[tuple[str, str, str]]:
    """What a study measured: method, distance and squared error of every point."""
    with (run / "pareto.csv").open() as handle:
        return [(r["method"], r["fd_fp"], r["paired_mse"]) for r in csv.DictReader(handle)]


def test_interrupted_the_same_command_continues(study: Path, tmp_path: Path, cli: Cli, straight: Path) -> None:
    """While it evaluates; `test_kill` interrupts a smaller study at random points."""
    one_layer_at_a_time(study)
    said = tmp_path / "err"
    started = forked.start(["run", str(study), "--run-dir", "r"], tmp_path, tmp_path / "out", said)
    deadline = time.monotonic() + 200
    metrics = tmp_path / "r/metrics"
    while not list(metrics.glob("[!.]*.json")) and started.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert forked.stop(started, signal.SIGINT) == 130, said.read_text()
    errors = said.read_text()
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "r/report.html").exists()
    kept = {p: p.stat().st_mtime_ns for p in metrics.glob("[!.]*.json")}
    resumed = cli("run", study, "--run-dir", "r")
    assert resumed.returncode == 0, resumed.stderr
    assert "profile: reused" in resumed.stderr
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), "finished evaluations are not repeated"
    assert numbers(tmp_path / "r") == numbers(straight / "r")


def test_a_profile_that_is_killed_continues_and_has_the_same_numbers(
    study: Path, tmp_path: Path, cli: Cli, measured: Path
) -> None:
    files = (tmp_path / "out", tmp_path / "err")
    process = forked.start(["profile", "-c", str(study), "--run-dir", "r"], tmp_path, *files)
    marker, deadline = tmp_path / "r/partial/base/00002.npz", time.monotonic() + 200
    while not marker.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert forked.stop(process, signal.SIGKILL) == -signal.SIGKILL
    resumed = cli("profile", "-c", study, "--run-dir", "r")
    assert resumed.returncode == 0, resumed.stderr
    assert "profile: continuing after the tables of" in resumed.stderr
    assert not (tmp_path / "r/partial").exists()
    found, expected = (artifacts.load_profile(folder / "profile.json") for folder in (tmp_path / "r", measured))
    assert found.arrays.keys() == expected.arrays.keys()
    for key, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], array, err_msg=key)


def test_a_changed_model_is_noticed(cli: Cli, study: Path, tmp_path: Path, model_folder: Path) -> None:
    from tests.support import tiny_unet

    own = tmp_path / "own"
    shutil.copytree(model_folder, own)
    text = study.read_text().replace(json.dumps(str(model_folder)), json.dumps(str(own)))
    study.write_text(text)
    assert cli("layers", "-c", study, "--run-dir", "r").returncode == 0
    tiny_unet(seed=1).save_pretrained(own, safe_serialization=True)  # type: ignore[operator]
    for verb in ("layers", "profile"):
        out = cli(verb, "-c", study, "--run-dir", "r")
        assert out.returncode == 4
        assert "layers.json was made from other inputs: model_files" in out.stderr
    out = cli("layers", "-c", study, "--run-dir", "r", "--overwrite")
    assert out.returncode == 0, out.stderr
    assert cli("layers", "-c", study, "--run-dir", "r").returncode == 0


COMPUTING = (
    "layers",
    "profile",
    "allocate",
    "search",
    "evaluate",
    "report",
    "quantize",
    "distill",
    "export",
    "card",
    "import",
    "run",
)
VERBS = (*COMPUTING, "record", "init", "inspect", "doctor")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_for_every_verb(cli: Cli, verb: str) -> None:
    out = cli(verb, "--help")
    assert out.returncode == 0
    assert re.search(rf"Examples?: (• )?mpqsearch {verb}", " ".join(out.stdout.split()))
    assert ("--device" in out.stdout) == (verb not in ("init", "inspect", "doctor"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_argument_gives_one_line(cli: Cli, study: Path, verb: str) -> None:
    out = cli(verb, "--nonsense")
    assert (out.returncode, out.stdout) == (2, "")
    assert re.fullmatch(rf"mpqsearch: No such option.*See `mpqsearch {verb} --help`\.\n", out.stderr)


@pytest.mark.parametrize("verb", COMPUTING)
def test_a_device_that_is_not_here_gives_one_line(cli: Cli, study: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "map.json").write_text("{}")
    given = {"run": (study,), "import": (tmp_path / "map.json", "-c", study)}.get(verb, ("-c", study))
    trials = ("--trials", "2") if verb == "search" else ()
    out = cli(verb, *given, *trials, "--device", "gpu", "--run-dir", "r")
    assert out.returncode == 2
    assert re.fullmatch(r"mpqsearch: unknown device 'gpu' .*Known: auto, cpu, cuda, mps\..*\n", out.stderr)


def test_doctor_says_what_works_and_how_to_get_the_rest(cli: Cli) -> None:
    first = " ".join(cli("doctor").stdout.split())
    assert re.match(r"ready for work on .*cpu.*, and export to neutral, packed, .*; missing: ", first)
    found = json.loads(cli("doctor", "--json").stdout)
    by_name = {(r["what"], r["name"]): r for r in found}
    assert by_name["solver", "highs"]["state"] == "works"
    assert by_name["library", "torch"]["state"] != "MISSING"
    assert by_name["extractor", "fmnist-cnn"]["state"] == "works"
    assert by_name["export", "neutral"]["state"] == "works"
    absent = [r for r in found if r["state"] == "absent" and r["what"] in ("optional", "export")]
    assert all("pip install" in r["note"] for r in absent)
    targets = [r for r in found if r["what"] == "export"]
    assert [r["name"] for r in targets] == list(TARGETS)
    assert all("tested" in r["note"] or "NOT verified" in r["note"] for r in targets if r["state"] != "works")
    assert {r["name"] for r in targets if r["state"] == "not verified"} == {"sdcpp", "cachedit"}
