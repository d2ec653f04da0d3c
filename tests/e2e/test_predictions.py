"""Profiles for predictions alone, and gains measured again at a bit map, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from mpqsearch import artifacts
from tests.e2e.conftest import Cli
from tests.support import tiny_unet

SHORT = (
    "--set",
    "calibration.final_widths=[]",
    "--set",
    "calibration.sampler_seeds=1",
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
    assert "loss slope, scheme auto" in shown.stdout
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


def test_gains_are_measured_again_at_a_bit_map(cli: Cli, study: Path, tmp_path: Path) -> None:
    text = study.read_text()
    careful = '[[methods]]\nname = "careful"\nallocator = "ilp-layer"\nscheme = "auto"\nbias_correction = true\nloss = "operating"\n'
    first = ("-c", study, "--run-dir", "r", *SHORT)
    made = cli("allocate", *first, "--budget", "uniform:3")
    assert made.returncode == 0, made.stderr
    at = tmp_path / "r/allocations/ilp-layer@uniform-3/bitmap.json"
    before = (tmp_path / "r/profile.npz").read_bytes()
    found = cli("profile", *first, "--at", at)
    assert found.returncode == 0, found.stderr
    assert "loss operating, scheme auto" in found.stdout
    bit_map = artifacts.load_bit_map(at)
    path = tmp_path / f"r/profile-at-{bit_map.digest[:12]}.json"
    updated = artifacts.load_profile(path)
    assert updated.calibration["operating_points"] == [artifacts.load_bit_map(at).digest]
    assert updated.calibration["operating_mse"] > 0
    assert "layer_operating_error/auto" in updated.arrays
    assert (tmp_path / "r/profile.npz").read_bytes() == before, "the profile itself stays as it is"
    again = cli("profile", *first, "--at", at, "--json")
    assert f"profile: reused {path.relative_to(tmp_path)}" in again.stderr
    assert json.loads(again.stdout)["calibration"]["operating_points"] == [bit_map.digest]
    study.write_text(text.replace("[evaluate]", careful + "[evaluate]"))
    chosen = cli("allocate", *first, "--budget", "uniform:3", "--set", f"calibration.at={json.dumps(str(at))}")
    assert chosen.returncode == 0, chosen.stderr
    solved = artifacts.read_json(tmp_path / "r/allocations/careful@uniform-3/allocation.json", "mpqsearch/allocation")
    assert solved.inputs["at"] == bit_map.digest
    without = cli("allocate", *first, "--budget", "uniform:3")
    assert without.returncode == 4, "the map of the careful method was made at a bit map that is not named now"
    assert "at (" in without.stderr


def test_a_bit_map_of_another_model_is_refused_with_both_digests(cli: Cli, study: Path, tmp_path: Path) -> None:
    first = ("-c", study, "--run-dir", "r", *SHORT)
    made = cli("allocate", *first, "--budget", "uniform:3")
    assert made.returncode == 0, made.stderr
    at = tmp_path / "r/allocations/uniform@uniform-3/bitmap.json"
    tiny_unet(seed=5).save_pretrained(tmp_path / "other", safe_serialization=True)  # type: ignore[operator]
    refused = cli("profile", *first[:2], "--run-dir", "r2", *SHORT, "--model", tmp_path / "other", "--at", at)
    assert refused.returncode == 2
    mine, other = (artifacts.load_layers(tmp_path / f"{r}/layers.json").digest[:12] for r in ("r", "r2"))
    assert mine != other
    assert mine in refused.stderr
    assert other in refused.stderr
    assert not (tmp_path / "r2/profile.json").exists(), "found before anything long began"
    both = cli("profile", *first, "--at", at, "--weights-only")
    assert both.returncode == 2
    assert "set one of them" in " ".join(both.stderr.split())
