"""A map that another tool chose, from its file to a measurement and an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli


@pytest.mark.slow
def test_a_map_of_another_tool_is_measured_and_exported(cli: Cli, study: Path, profiled: Path, tmp_path: Path) -> None:
    layers = json.loads(cli("layers", "-c", study, "--run-dir", "r", "--json").stdout)["layers"]
    theirs = {
        la["name"]: {"weights": "qint8" if i % 3 else "qint4", "activations": "none"} for i, la in enumerate(layers)
    }
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(theirs))
    found = cli("import", "quanto_qmap.json", "-c", study, "--run-dir", "r", "--name", "theirs", "--json")
    assert found.returncode == 0, found.stderr
    data = json.loads(found.stdout)
    assert (data["source"], data["quantized_layers"], data["file"]) == (
        "quanto",
        len(layers),
        "r/imports/theirs/bitmap.json",
    )
    assert "reused" in cli("import", "quanto_qmap.json", "-c", study, "--run-dir", "r", "--name", "theirs").stderr
    assert "4 bits" in cli("inspect", data["file"]).stdout

    small = ["--set", 'allocate.budgets=["uniform:5"]', "--set", "evaluate.samples=4"]
    measured = cli("evaluate", "-c", study, "--run-dir", "r", "--map", data["file"], *small, "--json")
    assert measured.returncode == 0, measured.stderr
    rows = {r["method"]: r for r in json.loads(measured.stdout)}
    assert rows["theirs"]["bit_map_digest"] == data["digest"]
    assert rows["theirs"]["size_bytes"] == data["size_bytes"]
    assert rows["theirs"]["metrics"]["paired_psnr"]["value"] > 0

    named = ["--set", f"allocate.maps.theirs={data['file']}"]
    out = cli(
        "export", "-c", study, "--run-dir", "r", *named, *small, "--method", "theirs", "--target", "sdcpp", "--verify"
    )
    assert out.returncode == 0, out.stderr
    assert "NOT verified by its consumer" in out.stderr
    plan = json.loads((tmp_path / "r/export/sdcpp@uniform-5.json").read_text())["data"]["plan"]
    asked = {row["layer"]: row["asked"] for row in plan}
    assert asked == {n: entry["weights"].removeprefix("qint") for n, entry in theirs.items()}


def test_mistakes_are_named(cli: Cli, study: Path, tmp_path: Path) -> None:
    (tmp_path / "quanto_qmap.json").write_text(json.dumps({"conv_inn": {"weights": "qint4"}}))
    wrong = cli("import", "quanto_qmap.json", "-c", study, "--run-dir", "r")
    assert wrong.returncode != 0
    assert "'conv_inn' (did you mean 'conv_in'?)" in wrong.stderr
    assert not (tmp_path / "r/imports").exists()
    unknown = cli("import", "quanto_qmap.json", "-c", study, "--run-dir", "r", "--from", "quant")
    assert "did you mean 'quanto'" in unknown.stderr
    lost = cli("evaluate", "-c", study, "--run-dir", "r", "--set", "allocate.maps.uniform=x.json")
    assert lost.returncode == 2
    assert "'uniform' needs the allocator 'map'" in lost.stderr
