"""``allocate --path`` and ``--explain`` as a user calls them: files, numbers that agree with each other, no torch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import Cli
from tests.support import tiny_profile, tiny_table
from tests.support.runs import saved_profile


def test_the_path_and_the_explanation_of_a_study(cli: Cli, study: Path, tmp_path: Path) -> None:
    table = tiny_table(n_layers=12, channels=20, fan_in=40)
    saved_profile(tmp_path / "r", study, table, tiny_profile(table, (2, 3, 4, 8)))
    code = (
        "import sys; from mpqsearch.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    overrides = 'policy.overrides={"block.0.linear" = 8}'
    asked = ["allocate", "-c", str(study), "--run-dir", "r", "--set", overrides, "--path", "--explain", "--json"]
    out = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert out.returncode == 0, out.stderr
    told = json.loads(out.stdout)
    solved = {(a["method"]["name"], a["budget"]): a for a in told["allocations"]}

    assert [path["method"]["name"] for path in told["paths"]] == ["ilp-layer", "ilp-channel"]
    for path in told["paths"]:
        name = path["method"]["name"]
        assert json.loads((tmp_path / f"r/paths/{name}.json").read_text())["data"] == path
        with (tmp_path / f"r/paths/{name}.csv").open() as handle:
            rows = list(csv.DictReader(handle))
        assert [int(row["cost"]) for row in rows] == [point["cost"] for point in path["points"]]
        losses, costs = ([point[key] for point in path["points"]] for key in ("loss", "cost"))
        assert losses == sorted(losses, reverse=True)
        assert costs == sorted(set(costs))
        assert 2 < len(rows) <= path["vertices"]
        for answer in path["budgets"]:
            exact = solved[name, answer["budget"]]
            assert answer["cost"] <= exact["limit"]
            if exact["notes"] == []:  # the map is the program's own
                assert answer["lower_bound"] * (1 - 1e-9) <= exact["result"]["loss"] <= answer["loss"] * (1 + 1e-9)
    for kind in ("png", "svg"):
        assert (tmp_path / f"r/paths/path.{kind}").stat().st_size > 1000

    assert len(told["explanations"]) == 4
    for one in told["explanations"]:
        saved = solved[one["method"], one["budget"]]
        folder = tmp_path / "r/allocations" / f"{one['method']}@{one['budget'].replace(':', '-')}"
        assert json.loads((folder / "explanation.json").read_text())["data"] == one
        with (folder / "explanation.csv").open() as handle:
            assert [row["layer"] for row in csv.DictReader(handle)] == [row["layer"] for row in one["layers"]]
        assert one["slack"] == saved["limit"] - saved["size_bits"]
        assert {key: one[key] for key in ("status", "loss", "gap")}.items() <= saved["result"].items()
        assert one["shadow_prices"] == saved["certificate"]["multipliers"]
        rates = [row["rate"] for row in one["layers"]]
        assert rates == sorted(rates, reverse=True)
        assert sum(row["loss"] for row in one["layers"]) > 0

    shown = cli("allocate", "-c", study, "--run-dir", "r", "--set", overrides, "--path", "--explain")
    assert shown.returncode == 0, shown.stderr
    assert "answered without solving again" in shown.stdout
    assert "one more bit saves" in shown.stdout
    assert cli("inspect", "r/paths/ilp-layer.json", "--json").returncode == 0


def test_a_study_without_a_program_has_no_path(cli: Cli, study: Path) -> None:
    text = study.read_text()
    start = text.index('[[methods]]\nname = "ilp-layer"')
    study.write_text(text[:start] + text[text.index("[evaluate]") :])
    out = cli("allocate", "-c", study, "--run-dir", "r", "--path")
    assert out.returncode == 2
    assert "solves an integer program" in out.stderr


def test_layers_of_a_group_move_together(cli: Cli, study: Path, tmp_path: Path) -> None:
    table = tiny_table(n_layers=8, channels=20, fan_in=40)
    study.write_text(
        study.read_text().replace("[quantizer]", '[policy.groups]\npair = ["block.2.*", "block.3.*"]\n[quantizer]')
    )
    saved_profile(tmp_path / "r", study, table, tiny_profile(table, (2, 3, 4, 8)))
    asked = ("allocate", "-c", study, "--run-dir", "r", "--path", "--explain", "--json")
    out = cli(*asked)
    assert out.returncode == 0, out.stderr
    told = json.loads(out.stdout)
    for one in told["explanations"]:
        names = ", ".join(row["layer"] for row in one["layers"])
        assert "block.2.linear" in names
