"""The study of MPQ-DM: order of rows, resuming from results.csv alone, and its report. Rows themselves are replaced by
numbers."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

STUDY = Path(__file__).resolve().parents[3] / "studies" / "mpq_dm"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDY))
    for name in ("study", "report"):
        sys.modules.pop(name, None)
    import study as loaded

    return loaded


class Recorder:
    """Stands for the model and the rows: remembers what was asked."""

    def __init__(self, study: ModuleType, monkeypatch: pytest.MonkeyPatch, stop_after: int = 10**6) -> None:
        self.asked: list[tuple[str, str, str, int]] = []
        self.stop_after = stop_after

        class Model:
            def __init__(self, name: str, schedule: Any, work: Path) -> None:
                self.name, self.schedule = name, schedule

        def row(model: Any, setting: str, method: str, seed: int) -> dict[str, Any]:
            if len(self.asked) == self.stop_after:
                raise SystemExit("interrupted")
            self.asked.append((model.name, setting, method, seed))
            value = 1.0 + len(method) / 10 + seed
            made = {
                "model": model.name, "setting": setting, "method": method, "seed": seed, "average_bits": 2.5,
                "size_bytes": 1000, "n_samples": 8, "train_steps": 5, "seconds": 1.0, "commit": "abc",
                "schedule": study.digest_of_row(method, setting, model.schedule),
            }  # fmt: skip
            if method == "uniform+trd":  # diverged: no metrics
                return made
            metrics = {"fd_data": value + 1, "fd_data_spread": 0.1, "class_accuracy": 0.9}
            if method != "full-precision":
                metrics |= {"fd_fp": value, "fd_fp_spread": 0.1, "paired_psnr": 20.0, "paired_psnr_spread": 0.5}
            return made | metrics

        monkeypatch.setattr(study, "Model", Model)
        monkeypatch.setattr(study, "run_row", row)
        monkeypatch.setattr(study, "full_precision_row", lambda model, seed: row(model, "full", "full-precision", seed))


def call(study: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    monkeypatch.setattr(
        sys, "argv", ["study.py", "--results", str(folder / "results.csv"), "--work", str(folder / "work"), *arguments]
    )
    study.main()


def test_telling_rows_come_first_and_all_come_once(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder(study, monkeypatch)
    call(study, monkeypatch, tmp_path)
    # Four names are those of other rows below W4A4.
    assert len(set(recorder.asked)) == len(recorder.asked) == 2 * 2 * (1 + 5 * len(study.METHODS) - 4 * 4)
    rows = [r for r in recorder.asked if r[1] != "full"]
    assert [r[:3] for r in rows[:3]] == [("fmnist-unet", "W2A4", m) for m in ("ours", "ours+lora", "mpq-dm")]
    assert {r[0] for r in rows[:12]} == {"fmnist-unet", "fmnist-dit"}
    assert all(r[3] == 0 for r in rows[:90])


def test_rules_go_by_whether_weights_have_fewer_bits_than_inputs(study: ModuleType) -> None:
    schedule = study.Schedule()
    for setting, (weight_bits, act_bits) in study.SETTINGS.items():
        fewer = weight_bits < act_bits
        made = study.recipe_of("ours", setting)
        assert (made.both_roundings, bool(made.check_every)) == (not fewer, not fewer)
        assert study.is_own("ours-gptq", setting) != fewer
        assert study.is_own("ours-nearest", setting)
        if fewer:
            assert study.digest_of_row("ours", setting, schedule) == study.METHODS["ours-gptq"].digest(schedule)
        checked = study.recipe_of("mpq-dm+checked", setting)
        assert checked == (study.METHODS["mpq-dm"] if fewer else replace(study.METHODS["mpq-dm"], **study.CHECKED))
        for method, plain in (("ours+gentle", "ours-gptq"), ("mpq-dm+gentle", "mpq-dm")):
            assert study.recipe_of(method, setting) == replace(study.METHODS[plain], **({} if fewer else study.GENTLE))
            assert study.is_own(method, setting) != fewer


def test_an_interrupted_study_continues_from_the_results_alone(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = ("--seeds", "1", "--models", "fmnist-dit")
    first = Recorder(study, monkeypatch, stop_after=9)
    with pytest.raises(SystemExit, match="interrupted"):
        call(study, monkeypatch, tmp_path, *small)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 10
    second = Recorder(study, monkeypatch)
    call(study, monkeypatch, tmp_path, *small, "--work", str(tmp_path / "another"))
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == 65
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 65
    third = Recorder(study, monkeypatch)
    call(study, monkeypatch, tmp_path, *small)
    assert third.asked == []


def test_rows_of_another_schedule_are_refused_or_dropped(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Recorder(study, monkeypatch)
    small = ("--seeds", "1", "--settings", "W2A4", "--models", "fmnist-dit")
    call(study, monkeypatch, tmp_path, *small)
    with pytest.raises(SystemExit, match=r"holds 13 rows of another schedule, the first full-precision"):
        call(study, monkeypatch, tmp_path, *small, "--steps", "10")
    again = Recorder(study, monkeypatch)
    call(study, monkeypatch, tmp_path, *small, "--steps", "10", "--overwrite")
    assert len(again.asked) == 13


def test_report_tells_what_is_there_and_keeps_the_text_around_it(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(
        "before\n<!-- results: written by study.py -->\nold\n<!-- end of results -->\nafter\n"
    )
    Recorder(study, monkeypatch)
    call(study, monkeypatch, tmp_path, "--seeds", "1", "--settings", "W2A4", "W4A4", "--models", "fmnist-dit")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "29 of 29 rows are there" in text
    assert "abc (29 rows)" in text
    assert "| W2A4 | uniform+trd | 1 | 1000 | 2.500 | diverged | diverged | diverged |" in text
    # ours: FD 1.4 and 2.4; mpq-dm: 1.6 and 2.6; full precision: 3.4 (its name is longer), so excesses are -1.0 and -0.8
    assert "| fmnist-dit | W2A4 | 0.87 | 1.25 | 0.67 | 0.76 |" in text
    assert (tmp_path / "results.png").stat().st_size > 10_000
    call(
        study,
        monkeypatch,
        tmp_path,
        "--seeds",
        "1",
        "--settings",
        "W2A4",
        "W4A4",
        "--models",
        "fmnist-dit",
        "--report-only",
    )
    assert (tmp_path / "README.md").read_text() == text


def test_the_rows_that_are_there_are_of_todays_recipes(study: ModuleType) -> None:
    rows = study.read_results(STUDY / "results.csv", study.Schedule(), overwrite=False)
    assert len(rows) > 200
    assert all(row["commit"] for row in rows.values())


def test_a_digest_is_of_what_a_row_depends_on(study: ModuleType) -> None:
    schedule, recipe = study.Schedule(), study.METHODS["ours"]
    changes = [
        replace(schedule, steps=7),
        replace(schedule, sampler=replace(schedule.sampler, guidance=1.0)),
        replace(schedule, relation=replace(schedule.relation, weight=1.0)),
        replace(schedule, calibration=replace(schedule.calibration, samples=3)),
    ]
    digests = {recipe.digest(s) for s in [schedule, *changes]}
    digests |= {replace(recipe, spec=replace(recipe.spec, scheme="symmetric")).digest(schedule)}
    digests |= {replace(recipe, gptq=False).digest(schedule)}
    assert len(digests) == 7


def test_trials_are_of_the_recipes_that_repeat_them(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.modules.pop("trials", None)
    import trials

    rows = list(csv.DictReader((STUDY / "trials.csv").open()))
    assert rows
    for row in rows:
        assert row["digest"] == trials.RECIPES[row["recipe"]].digest(study.Schedule())
    # No row of the study trains or measures on the noise of trials.
    assert int(min(r["training_seed"] for r in rows)) > 100
    chosen = trials.RECIPES["weighted-slower"]
    assert chosen == study.recipe_of("ours+gentle", "W4A4")


def test_latent_rows_are_of_todays_schedule_and_the_main_methods_come_first(study: ModuleType) -> None:
    sys.modules.pop("latent", None)
    import latent

    rows = latent.read(STUDY / "latent.csv")
    planned = list(latent.plan(latent.MODELS, 3))
    assert rows
    assert set(rows) <= set(planned)
    assert len(set(planned)) == len(planned) == 3 * 2 * (1 + 5 * 7 + 2 * 3) + 2 * 2 + 2 * 3
    main = [key for key in planned if key[2] in (*latent.MAIN, "full-precision")]
    assert planned[: len(main)] == main
    assert [key[3] for key in main] == sorted(key[3] for key in main)
    # At the bytes of mpq-dm, and the same training for all that train.
    for (model, setting, method, seed), row in rows.items():
        if method in ("ours", "ours-untrained", latent.TOKEN, latent.MIXED, latent.EQUAL):
            assert int(row["size_bytes"]) <= int(rows[model, setting, "mpq-dm", seed]["size_bytes"])
        trains = method != "full-precision" and latent.RECIPES[method].trainable
        assert int(row["train_steps"]) == (latent.SCHEDULE.steps if trains else 0)
    assert study.METHODS["ours"] == latent.RECIPES["ours"]
