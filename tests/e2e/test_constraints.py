"""What users say of widths and budgets, from the command line and from TOML; and the certificate of what comes out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqsearch import artifacts
from mpqsearch.core import BitMap, LayerTable, Policy, bops, size_bits, uniform_map
from mpqsearch.methods import channel_losses
from tests.e2e.conftest import Cli
from tests.support import tiny_profile, tiny_table
from tests.support.runs import saved_profile

WIDTHS = (2, 3, 4, 8)
BUDGET = "uniform:4"


def fused() -> LayerTable:
    table = tiny_table(n_layers=6, channels=3, fan_in=10)
    layers = tuple(replace(la, fuse="qkv" if i in (2, 3) else "") for i, la in enumerate(table))
    return replace(table, layers=layers)


TABLE = fused()
PROFILE = tiny_profile(TABLE, WIDTHS)
SEARCHED = [la.name for la in TABLE][1:-1]
LATENCY = {(la.name, b): round(0.3 + 0.1 * b + 0.2 * i, 3) for i, la in enumerate(TABLE) for b in WIDTHS}


def every_map() -> list[tuple[list[int], BitMap, float]]:
    base = uniform_map(TABLE, Policy(widths=WIDTHS), 2)
    losses = PROFILE.layer_sum(channel_losses(PROFILE, TABLE, "auto", "probe", bias_correction=True))
    maps = []
    for widths in itertools.product(WIDTHS, repeat=len(SEARCHED)):
        named = dict(zip(SEARCHED, widths, strict=True))
        bit_map = replace(base, weights={**base.weights, **{n: np.array(w) for n, w in named.items()}})
        loss = sum(float(losses[PROFILE.index[n], WIDTHS.index(w)]) for n, w in named.items())
        maps.append((list(widths), bit_map, loss))
    return maps


EVERY = every_map()


def latency(bit_map: BitMap) -> float:
    return sum(LATENCY[n, int(w)] for n, w in bit_map.weights.items())


OPERATIONS = sorted(bops(TABLE, m) for _, m, _ in EVERY)[100]
MILLISECONDS = round(sorted(latency(m) for _, m, _ in EVERY)[90], 3)
Rule = Callable[[list[int], BitMap], bool]

CASES: dict[str, tuple[list[str], str, Rule]] = {
    "two budgets": (
        ["--within", f"{OPERATIONS}bops"],
        f'[allocate]\nbudgets = ["{BUDGET}"]\nwithin = ["{OPERATIONS}bops"]',
        lambda _, m: bops(TABLE, m) <= OPERATIONS,
    ),
    "latency": (
        ["--latency", "latency.csv", "--within", f"{MILLISECONDS}ms"],
        f'[allocate]\nbudgets = ["{BUDGET}"]\nwithin = ["{MILLISECONDS}ms"]\ncosts = "latency.csv"',
        lambda _, m: latency(m) <= MILLISECONDS + 1e-9,
    ),
    "least width": (
        ["--min-bits", "block.[12].*=3"],
        '[policy]\nmin_bits = {"block.[12].*" = 3}',
        lambda w, _: min(w[:2]) >= 3,
    ),
    "largest width": (
        ["--max-bits", "block.3.*=3", "--max-bits", "block.4.*=4"],
        '[policy]\nmax_bits = {"block.3.*" = 3, "block.4.*" = 4}',
        lambda w, _: w[2] <= 3 and w[3] <= 4,
    ),
    "fixed width": (
        ["--fix", "block.1.*=3"],
        '[policy]\noverrides = {"block.1.*" = 3}',
        lambda w, _: w[0] == 3,
    ),
    "group of the user's": (
        ["--group", "block.1.*,block.4.*"],
        '[policy]\ngroups = {mine = ["block.1.*", "block.4.*"]}',
        lambda w, _: w[0] == w[3],
    ),
    "fused projections": (["--group", "qkv"], '[policy]\ngroups = {fused = ["qkv"]}', lambda w, _: w[1] == w[2]),
    "few formats": (["--max-formats", "2"], "[policy]\nmax_formats = 2", lambda w, _: len(set(w)) <= 2),
}


@pytest.fixture
def saved(tmp_path: Path, study: Path) -> Path:
    """A study of one method by layer, with a profile that was not measured."""
    text = study.read_text()
    methods = '[[methods]]\nname = "ours"\nallocator = "ilp-layer"\nscheme = "auto"\nbias_correction = true\n'
    text = text[: text.index("[[methods]]")] + methods + text[text.index("[evaluate]") :]
    study.write_text(text.replace('budgets = ["uniform:3", "uniform:4"]', f'budgets = ["{BUDGET}"]'))
    saved_profile(tmp_path / "r", study, TABLE, PROFILE)
    rows = "".join(f"{n},{b},{c}\n" for (n, b), c in LATENCY.items())
    (tmp_path / "latency.csv").write_text("layer,bits,cost\n" + rows)
    return study


def asked(cli: Cli, study: Path, *options: str) -> dict[str, Any]:
    out = cli("allocate", "-c", study, "--run-dir", "r", "--overwrite", "--json", *options)
    assert out.returncode == 0, out.stderr
    (data,) = json.loads(out.stdout)
    return dict(data)


@pytest.mark.parametrize("case", CASES)
def test_options_and_toml_give_the_best_of_all_maps_that_obey(cli: Cli, saved: Path, tmp_path: Path, case: str) -> None:
    options, toml, rule = CASES[case]
    data = asked(cli, saved, *options)
    bit_map = artifacts.load_bit_map(tmp_path / "r/allocations/ours@uniform-4/bitmap.json")
    limit = data["totals"][0]["limit"]
    obeying = [(loss, m) for w, m, loss in EVERY if rule(w, m) and size_bits(TABLE, m) <= limit]
    assert rule([int(bit_map.weights[n]) for n in SEARCHED], bit_map)
    assert size_bits(TABLE, bit_map) <= limit
    losses = {tuple(w): loss for w, _, loss in EVERY}
    assert losses[tuple(int(bit_map.weights[n]) for n in SEARCHED)] == pytest.approx(
        min(loss for loss, _ in obeying), rel=1e-9
    )
    table = toml.split("\n", 1)[0]
    text = saved.read_text()
    saved.write_text(
        text.replace(table, toml, 1)
        if table == "[policy]"
        else text.replace(f'[allocate]\nbudgets = ["{BUDGET}"]', toml, 1)
    )
    assert asked(cli, saved)["bit_map_digest"] == data["bit_map_digest"]
    path = "r/allocations/ours@uniform-4/allocation.json"
    checked = cli("inspect", path, "--check")
    assert checked.returncode == 0, checked.stderr
    assert "are those that were solved" in checked.stdout


def test_what_cannot_be_met_ends_with_code_3_and_the_smallest_value(cli: Cli, saved: Path) -> None:
    for options, words in (
        (["-b", "1bit"], ("the budget 1bit allows", "the smallest attainable is")),
        (["--within", "10bops"], ("the budget 10bops allows", f"{min(bops(TABLE, m) for _, m, _ in EVERY):,} BOPs")),
        (["--min-bits", "*=8", "-b", "uniform:3"], ("smallest attainable",)),
        (["--latency", "latency.csv", "--within", "0.5ms"], ("0.5ms", f"{min(latency(m) for _, m, _ in EVERY):g} ms")),
    ):
        out = cli("allocate", "-c", saved, "--run-dir", "r", "--overwrite", *options)
        if options[0] == "--min-bits":  # the uniform size has the same bound, so its own map fits
            assert out.returncode == 0, out.stderr
            continue
        assert out.returncode == 3, out.stderr
        assert all(word in out.stderr for word in words), out.stderr
        assert out.stderr.count("\n") <= 4
    wrong = cli("allocate", "-c", saved, "--run-dir", "r", "--min-bits", "block.1")
    assert wrong.returncode == 2
    assert "--min-bits takes PATTERN=BITS, got 'block.1'" in wrong.stderr
    short = cli("allocate", "-c", saved, "--run-dir", "r", "--within", "12ms")
    assert (short.returncode, "--latency FILE" in short.stderr) == (2, True)
    shown = cli("allocate", "--help")
    assert all(option in shown.stdout for option in ("--within", "--latency", "--max-formats", "--group"))
    assert "mpqsearch allocate -b 3bit --within 7e9bops" in shown.stdout


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "contradiction"),
    [
        (lambda d: d.update(size_bits=d["size_bits"] - 1), "the stored size in bits is"),
        (lambda d: d.update(bops=1), "the number of bit operations is"),
        (lambda d: d["totals"][0].update(limit=d["totals"][0]["limit"] + 8), "the limit of uniform:4 is"),
        (lambda d: d.update(predicted_loss=d["predicted_loss"] * 1.01), "the predicted loss is"),
        (lambda d: d.update(bit_map_digest="0" * 64), "the digest of bitmap.json is"),
        (lambda d: d["certificate"].update(loss=d["certificate"]["loss"] * 0.9), "the loss is"),
        (lambda d: d["certificate"].update(bound=d["certificate"]["loss"] * 1.001), "the multipliers prove"),
        (
            lambda d: d["certificate"].update(
                multipliers={k: 2 * v for k, v in d["certificate"]["multipliers"].items()}
            ),
            "the multipliers prove",
        ),
        (lambda d: d["certificate"]["digests"].update(loss="0" * 64), "the digests of the tables is"),
        (lambda d: d["result"].update(status="feasible"), "the status of the result is"),
    ],
)
def test_a_tampered_allocation_does_not_hold(
    cli: Cli, saved: Path, tmp_path: Path, change: Change, contradiction: str
) -> None:
    asked(cli, saved)
    path = tmp_path / "r/allocations/ours@uniform-4/allocation.json"
    content = json.loads(path.read_text())
    edited = json.dumps(content | {"data": {**content["data"], "size_bits": 1}})
    change(content["data"])
    files = [path.parent / name for name in content.get("files", ())]
    artifacts.write_json(path, content["schema"], content["data"], content["inputs"], files)
    out = cli("inspect", path, "--check")
    assert out.returncode == 4, out.stdout
    assert f"does not hold: {contradiction}" in out.stderr
    path.write_text(edited)
    assert "was changed after it was written" in cli("inspect", path, "--check").stderr


def test_the_check_looks_at_the_map_and_at_the_profile(cli: Cli, saved: Path, tmp_path: Path) -> None:
    asked(cli, saved)
    path = tmp_path / "r/allocations/ours@uniform-4/allocation.json"
    assert cli("inspect", path, "--check", "--json").returncode == 0
    profile = artifacts.load_profile(tmp_path / "r/profile.json")
    arrays = {k: a * 1.01 if k == "output_error_corrected/auto" else a for k, a in profile.arrays.items()}
    inputs = artifacts.read_json(tmp_path / "r/profile.json", "mpqsearch/profile").inputs
    artifacts.save_profile(tmp_path / "r/profile.json", replace(profile, arrays=arrays), inputs)
    out = cli("inspect", path, "--check")
    assert out.returncode == 4
    bit_map = tmp_path / "r/allocations/ours@uniform-4/bitmap.json"
    content = json.loads(bit_map.read_text())
    content["data"]["layers"][SEARCHED[0]]["bits"] = 8 if content["data"]["layers"][SEARCHED[0]]["bits"] != 8 else 2
    del content["digest"]  # as another program may write it
    bit_map.write_text(json.dumps(content))
    out = cli("inspect", path, "--check")
    assert out.returncode == 4
    assert "the digest of bitmap.json" in out.stderr
    other = cli("inspect", bit_map, "--check")
    assert other.returncode == 2
    assert "--check takes an allocation.json" in other.stderr


def test_a_map_by_channel_and_one_without_a_program_are_checked_too(cli: Cli, study: Path, tmp_path: Path) -> None:
    table = tiny_table(n_layers=8, channels=20, fan_in=40)
    saved_profile(tmp_path / "r", study, table, tiny_profile(table, WIDTHS))
    assert cli("allocate", "-c", study, "--run-dir", "r").returncode == 0
    by_channel = cli("inspect", "r/allocations/ilp-channel@uniform-3/allocation.json", "--check")
    assert by_channel.returncode == 0, by_channel.stderr
    assert "the tables of 120 channels are those that were solved" in by_channel.stdout
    assert "prove that no map loses less than" in by_channel.stdout
    for name in ("omq", "uniform"):
        out = cli("inspect", f"r/allocations/{name}@uniform-3/allocation.json", "--check")
        assert out.returncode == 0, out.stderr
        assert "no program was solved" in out.stdout
    assert (
        "it exceeds a budget, and says so"
        in cli("inspect", "r/allocations/omq@uniform-3/allocation.json", "--check").stdout
    )
