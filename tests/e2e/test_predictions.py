"""Profiles for predictions alone, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from mpqsearch import artifacts
from tests.e2e.conftest import Cli

SHORT = (
    "--set",
    "calibration.context_seeds=3",
)


def test_a_profile_for_predictions_predicts_and_does_not_choose(cli: Cli, study: Path, tmp_path: Path) -> None:
    only = ("-c", study, "--run-dir", "r", *SHORT)
    made = cli("profile", *only, "--prediction-only", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["calibration"]["spec"]["prediction_only"] is True
    shown = cli("inspect", "r/profile.json")
    assert shown.returncode == 0, shown.stderr
    assert "predicted loss (slope), format auto" in shown.stdout
    asked = ("allocate", *only, "--set", "calibration.prediction_only=true")
    refused = cli(*asked)
    assert refused.returncode == 2
    assert "made for predictions alone" in refused.stderr
    uniform = artifacts.read_json(
        tmp_path / "r/allocations/uniform@uniform-3/allocation.json", "mpqsearch/allocation"
    ).data
    assert uniform["predicted_loss"] != 0
    wrong = cli("profile", *only, "--prediction-only", "--weights-only")
    assert wrong.returncode == 2
    assert "set one of them" in wrong.stderr
