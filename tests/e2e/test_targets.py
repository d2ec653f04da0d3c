"""Maps for a target on the command line: allocated over its own formats, exported, and read back by its consumer."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mpqsearch.artifacts import digest_file, read_json
from mpqsearch.cli import app
from mpqsearch.config import config_from
from mpqsearch.core import Budget, LayerTable
from mpqsearch.errors import InfeasibleBudgetError, StaleArtifactError
from mpqsearch.export import ExportJob, get_exporter, load_neutral, target
from mpqsearch.export import __main__ as check
from mpqsearch.export.contract import Verification, VerifyEntry
from mpqsearch.export.gguf import FILE, GgufTarget
from mpqsearch.stages import Run, prepare
from mpqsearch.stages.delivering import faults
from mpqsearch.stages.exporting import size_note
from mpqsearch.stages.targeting import target_allocation
from mpqsearch.untrusted import build

pytest.importorskip("gguf")
pytest.importorskip("libgguf")

STUDY = """
[model]
source = {source}
[policy]
widths = [2, 4, 8]
[quantizer]
n_candidates = 8
[sampler]
steps = 2
batch = 4
[calibration]
samples = 2
probe_inputs = 2
probes = 1
sampler_seeds = 2
sampler_probes = 1
context_seeds = 0
schemes = ["asymmetric"]
[allocate]
budgets = ["6bit"]
select = "none"
[[methods]]
name = "ilp-layer"
allocator = "ilp-layer"
[evaluate]
samples = 4
extractor = "random-conv"
[export]
measure = false
"""


@pytest.fixture(scope="module", autouse=True)
def _read_here() -> Iterator[None]:
    """Files are read back in this process, which spares ten seconds of imports; tests/conformance takes another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "fresh_process", lambda exports: [check.report(name, path) for name, path in exports])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the profile of a small transformer, whose rows of 64 take GGUF blocks of 32."""
    import torch
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    where = tmp_path_factory.mktemp("targets")
    model.save_pretrained(where / "dit", safe_serialization=True)
    DDIMScheduler().save_pretrained(where / "dit")
    (where / "study.toml").write_text(STUDY.format(source=json.dumps(str(where / "dit"))))
    assert call(where, "profile").exit_code == 0
    return where


def call(folder: Path, verb: str, *arguments: str) -> Result:
    """A verb; exports are accepted, since GGUF's readers refuse the class of the model."""
    return plain_call(folder, verb, *arguments, *(("--accept",) if verb == "export" else ()))


def plain_call(folder: Path, verb: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [verb, "-c", str(folder / "study.toml"), "-o", str(folder / "r"), *arguments])


def test_a_map_allocated_for_a_target_is_exported_without_rounding(folder: Path) -> None:
    done = call(folder, "allocate", "--target", "gguf", "--budget", "6bit", "--budget", "8bit", "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert [m["budget"] for m in made] == ["6bit", "8bit"]
    assert not (folder / "r/allocations/ilp-layer@6bit").exists(), "only what --target names is solved"
    for data in made:
        where = folder / "r/allocations" / f"target-gguf@{data['budget']}"
        neutral = load_neutral(where / "bitmap.json")
        choices = neutral.data["provenance"]["choices"]
        assert choices == data["choices"]
        assert data["status"] == "optimal"
        assert data["size_bits"] + data["names_bits"] <= data["limit"]
        assert data["limit"] - data["size_bits"] - data["names_bits"] < 0.05 * data["limit"], "the budget is used"
        assert data["names_bits"] > 0, "the model is small"
        table = read_json(folder / "r/layers.json", "mpqsearch/layers")
        job = ExportJob(table=build(LayerTable, table.data), bit_map=neutral.bit_map, choices=choices)
        plan = GgufTarget().plan(job)
        assert {e.reason for e in plan} <= {"exact", "kept_full_precision"}
        assert GgufTarget().promise(job, plan).total == data["size_bits"]
    shown = call(folder, "allocate", "--target", "gguf")
    assert "layers by format" in shown.stdout
    assert "Q8_0" in shown.stdout


def test_all_installed_targets_are_compared_and_no_map_is_written(folder: Path) -> None:
    before = sorted((folder / "r").glob("[ae][lx]*/*"))
    done = [call(folder, "export", "--target", "auto", "-b", b, "--json") for b in ("6.5bit", "2.5bit")]
    assert [d.exit_code for d in done] == [0, 0], done[0].output
    assert sorted((folder / "r").glob("[ae][lx]*/*")) == before, "no allocation and no export"
    ample, small = ({row["target"]: row for row in json.loads(d.stdout)} for d in done)
    limit = 6.5 / 8
    assert {"packed", "gguf"} <= set(ample)
    assert "sdcpp" not in ample, "it holds no weights"
    table = build(LayerTable, read_json(folder / "r/layers.json", "mpqsearch/layers").data)
    for row in ample.values():
        assert row["obstacle"] or 0.7 * limit < row["bytes"] / table.n_parameters <= 1.01 * limit
    fitting = [row["predicted_loss"] for row in ample.values() if not row["obstacle"]]
    assert fitting == sorted(fitting)
    assert "smallest file of gguf takes" in small["gguf"]["obstacle"]
    shown = call(folder, "export", "--target", "auto", "-b", "6.5bit")
    assert f"--target {next(iter(ample))} --budget 6.5bit" in shown.stderr


def test_the_map_for_a_target_is_the_best_of_those_whose_files_were_measured(folder: Path) -> None:
    few = ("--select", "measured", "--set", "allocate.select_samples=4", "-o", str(folder / "measured"))
    done = call(folder, "allocate", "--target", "gguf", *few)
    assert done.exit_code == 0, done.output
    assert "what was tried for gguf at 6bit" in done.stdout
    made = read_json(folder / "measured/allocations/target-gguf@6bit/allocation.json", "mpqsearch/allocation").data
    rows = {row["candidate"]: row for row in made["selection"]["rows"]}
    uniform = [row for label, row in rows.items() if label.startswith("uniform")]
    (chosen,) = [row for row in rows.values() if row["verdict"] == "chosen"]
    assert uniform, "files of one type are tried too"
    assert {"k-quant", "by layer", "by layer, prices shrunk by 1", "by layer, interactions"} <= rows.keys()
    assert all(row["ratio"] > 1 for row in uniform if row["verdict"] == "worse")
    assert max(row["size_bytes"] for row in rows.values()) <= made["limit"] / 8 + 1
    assert chosen["size_bytes"] == -(-made["size_bits"] // 8)
    assert chosen["predicted"] == pytest.approx(made["predicted_loss"])
    assert not list((folder / "measured/export").iterdir()), "candidates leave no files"


def test_a_selection_for_a_target_runs_the_model_no_more_than_the_default_profile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in evaluations of one sample at one step, of which a backward pass is two."""
    from diffusers import DiTTransformer2DModel

    forward, evaluations = DiTTransformer2DModel.forward, [0]

    @functools.wraps(forward)
    def counted(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        def add(n: int) -> None:
            evaluations[0] += n * len(sample)

        made = forward(self, sample, *args, **kwargs)
        add(1)
        if made[0].requires_grad:
            made[0].register_hook(lambda _: add(2))
        return made

    monkeypatch.setattr(DiTTransformer2DModel, "forward", counted)
    data = {
        "model": {"source": str(folder / "dit"), "device": "cpu"},
        "sampler": {"steps": 4, "batch": 8},
        "policy": {"widths": [2, 3, 4, 8]},
        "quantizer": {"n_candidates": 4},
        "evaluate": {"extractor": "random-conv"},
    }
    run = Run(config=config_from(data), folder=tmp_path, say=lambda _: None)
    assert prepare(run)
    profile = evaluations[0]
    _, made = target_allocation(run, "gguf", Budget.parse("6bit"))
    assert len(made["selection"]["rows"]) >= 6, "it is the whole selection"
    assert 0 < evaluations[0] - profile <= profile


def test_only_verify_says_that_an_export_is_good(folder: Path) -> None:
    written = call(folder, "export", "--target", "gguf")
    assert written.exit_code == 0, written.output
    files = [Path(line) for line in written.stdout.split()]
    assert {f.name for f in files} >= {FILE, "export.json", "bitmap.json"}
    assert not any(word in written.output for word in ("as planned", "ok", "verified"))
    assert not (folder / "r/allocations/ilp-layer@6bit").exists(), "its own map needs no other"
    stamp = read_json(folder / "r/export/gguf@6bit.json", "mpqsearch/export").data
    assert stamp["verification"] is None
    assert stamp["rounded_layers"] == 0
    whole = stamp["delivered"]["stored_bytes"] + stamp["delivered"]["header_bytes"]
    assert abs(whole - stamp["promised_bytes"]) <= 0.01 * whole, "names and shapes are promised too"
    assert whole <= 1.01 * stamp["delivered"]["budget_bytes"]
    assert read_sizes(folder)["gguf"]["verified"] == "no"
    shown = call(folder, "export", "--target", "gguf", "--verify", "--json")
    assert shown.exit_code == 0, shown.output
    (one,) = json.loads(shown.stdout)
    found = one["verification"]
    assert found["ok"]
    assert all(e["ok"] and e["got_choice"] == e["planned_choice"] for e in found["entries"])
    assert {"layer", "asked", "got_text", "reason"} <= set(found["entries"][0])
    allocated = read_json(folder / "r/allocations/target-gguf@6bit/allocation.json", "mpqsearch/allocation").data
    row = read_sizes(folder)["gguf"]
    assert int(row["accounted_bytes"]) == -(-allocated["size_bits"] // 8) == int(row["stored_bytes"])
    assert int(row["ideal_bytes"]) < int(row["stored_bytes"])
    assert int(row["header_bytes"]) + int(row["stored_bytes"]) == (folder / "r/export/gguf@6bit" / FILE).stat().st_size
    assert row["verified"] == "yes"


def test_the_file_is_measured_as_maps_are(folder: Path) -> None:
    done = call(folder, "export", "--target", "gguf", "-b", "8bit", "--measure")
    assert done.exit_code == 0, done.output
    found = read_json(folder / "r/export/gguf@8bit.json", "mpqsearch/export").data["delivered"]
    whole = (folder / "r/export/gguf@8bit" / FILE).stat().st_size
    assert found["stored_bytes"] + found["header_bytes"] == whole
    assert found["uniform"]["choice"] == "Q5_1", "the largest that fits, Q8_0 does not"
    assert found["uniform"]["stored_bytes"] <= 1.001 * found["stored_bytes"]
    assert found["metrics"]["paired_mse"]["n_samples"] == 4
    shown = (folder / "r/export/gguf@8bit/README.md").read_text()
    assert f"| bytes of the file | {whole:,} (" in shown
    assert shown.startswith("---\nbase_model: dit\nbase_model_relation: quantized\n")
    assert f"| MSE vs FP, same noise |  | {found['metrics']['paired_mse']['value']:.4g} (" in shown
    assert "Q5_1 in every layer (" in shown
    assert f"| {FILE} | {digest_file(folder / 'r/export/gguf@8bit' / FILE)} |" in shown
    assert "--target gguf --budget 8bit" in shown
    for row in ("full-precision", "this"):
        picture = folder / f"r/export/gguf@8bit/samples-{row}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"]({picture.name})" in shown
    (folder / "r/export/gguf@8bit/README.md").unlink()
    written = call(folder, "card")
    assert written.exit_code == 0, written.output
    assert (folder / "r/export/gguf@8bit/README.md").read_text() == shown
    again = call(folder, "export", "--target", "gguf", "-b", "8bit", "--measure")
    assert "export: reused" in again.stderr
    for verb in ("evaluate", "report"):
        assert call(folder, verb).exit_code == 0
    with (folder / "r/pareto.csv").open() as handle:
        rows = {row["method"]: row for row in csv.DictReader(handle)}
    point = rows["gguf file"]
    assert (point["budget"], int(point["size_bytes"])) == ("8bit", whole)
    assert float(point["paired_mse"]) == found["metrics"]["paired_mse"]["value"]
    assert 0 < float(point["paired_mse"]) < float(rows["ilp-layer"]["paired_mse"]), "6 bits against 8"


def test_what_is_wrong_with_a_file_is_said_in_order() -> None:
    def error(value: float, low: float) -> dict[str, float]:
        return {"value": value, "low": low, "high": 2 * value - low}

    found = {
        "metrics": {"paired_mse": error(2.0, 1.9)},
        "uniform": {"choice": "Q4_0", "stored_bytes": 100, "error": error(1.8, 1.0)},
        "stored_bytes": 102,
        "header_bytes": 5,
        "counted_bytes": 102,
        "budget": "4bit",
        "budget_bytes": 100,
        "source_bytes": 106,
        "unread": "nobody reads it",
    }
    unread, worse, large, grown = faults("gguf", found)
    assert unread == "nobody reads it"
    assert worse.startswith("the file of gguf is WORSE than gguf with every layer in Q4_0: error 2 (1.9 to 2.1) at 102")
    assert "LARGER than the budget 4bit: 102 bytes, 100 are allowed" in large
    assert "LARGER than the model that it was made from: 107 bytes, that has 106" in grown
    good = {**found, "uniform": None, "budget_bytes": 101, "source_bytes": 107, "unread": ""}
    assert list(faults("gguf", good)) == []
    assert list(faults("gguf", {**good, "uniform": {**found["uniform"], "error": error(1.95, 1.0)}})) == []


def test_interactions_are_probed_when_asked(folder: Path) -> None:
    made = {}
    for probes in (0, 3):
        done = call(
            folder,
            "allocate",
            "--target",
            "gguf",
            "-b",
            "7bit",
            "--json",
            "--overwrite",
            "--set",
            f"allocate.target_probes={probes}",
        )
        assert done.exit_code == 0, done.output
        (made[probes],) = json.loads(done.stdout)
        assert made[probes]["size_bits"] <= made[probes]["limit"]
    assert made[0]["predicted_loss"] != made[3]["predicted_loss"]
    stale = call(folder, "allocate", "--target", "gguf", "-b", "7bit").exception
    assert isinstance(stale, StaleArtifactError)
    assert "probes (" in str(stale)
    refused = call(
        folder, "allocate", "--target", "gguf", "-b", "5.9bit", "--set", "allocate.target_probes=-1"
    ).exception
    assert "at least 0" in str(refused)


def read_sizes(folder: Path, budget: str = "6bit") -> dict[str, dict[str, str]]:
    with (folder / "r/export/sizes.csv").open() as handle:
        return {row["target"]: row for row in csv.DictReader(handle) if row["budget"] == budget}


def test_a_difference_ends_with_exit_code_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert call(folder, "export", "--target", "gguf").exit_code == 0
    entries = (
        VerifyEntry(
            layer="x", asked="4", planned=4, got=8, planned_choice="Q4_0", got_choice="Q8_0", reason="resolved"
        ),
    )
    monkeypatch.setattr(GgufTarget, "verify", lambda *_: Verification(target="gguf", entries=entries))
    shown = call(folder, "export", "--target", "gguf", "--verify")
    assert shown.exit_code == 1
    for text in ("0 of 1 layers as planned", "Q4_0", "Q8_0", "resolved", "DIFFERS", "NOT as planned"):
        assert text in " ".join(shown.stdout.split())
    assert read_sizes(folder)["gguf"]["verified"] == "DIFFERS"
    monkeypatch.undo()
    damaged = folder / "r/export/gguf@6bit" / FILE
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = call(folder, "export", "--target", "gguf", "--verify")
    assert again.exit_code == 0, again.output
    assert "is not the file that gguf@6bit.json was written with" in caplog.text
    assert read_sizes(folder)["gguf"]["verified"] == "yes", "what was found wanting is made anew"


def test_a_map_made_for_something_else_is_solved_again_at_its_size(folder: Path) -> None:
    assert call(folder, "export", "--target", "gguf", "--method", "ilp-layer").exit_code == 0
    resolved = read_json(folder / "r/export/gguf@6bit.json", "mpqsearch/export").data
    assert resolved["map"] == "ilp-layer at 6bit"
    assert "resolved" in {row["reason"] for row in resolved["plan"]}
    assert 0.95 * resolved["ideal_bits"] < resolved["accounted_bits"] <= resolved["ideal_bits"]
    small = ("export", "--target", "gguf", "--budget", "3bit")
    refused = plain_call(folder, *small)
    assert refused.exit_code == 1
    assert "holds a DiTTransformer2DModel under its names in diffusers, which ComfyUI-GGUF" in refused.stderr
    assert "LARGER than the budget 3bit" in refused.stderr
    assert "bytes when it is packed densely; the file of gguf takes" in refused.stderr
    assert call(folder, *small).exit_code == 0
    data = read_json(folder / "r/export/gguf@3bit.json", "mpqsearch/export").data
    assert data["accounted_bits"] > data["ideal_bits"]
    row = read_sizes(folder, "3bit")["gguf"]
    assert float(row["stored_bits_per_parameter"]) == pytest.approx(
        data["accounted_bits"] / data["n_parameters"], abs=1e-3
    )


def test_what_cannot_be_done_names_what_can(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = call(folder, "allocate", "--target", "ggfu").exception
    assert unknown.exit_code == 2
    assert "did you mean 'gguf'" in str(unknown)
    assert "onnx" in str(unknown)
    small = call(folder, "allocate", "--target", "gguf", "--budget", "3bit").exception
    assert isinstance(small, InfeasibleBudgetError)
    assert "smallest file of gguf takes" in str(small)
    assert "holds every map as it is" in str(call(folder, "allocate", "--target", "neutral").exception)
    assert "leave out the others" in str(call(folder, "export", "-t", "auto", "-t", "gguf").exception)
    monkeypatch.setattr(GgufTarget, "imports", ("gguf", "no_such_library"))
    for arguments in (
        ("allocate", "--target", "gguf", "-b", "7.5bit"),
        ("export", "--target", "gguf", "-b", "7.5bit", "--verify"),
    ):
        assert "no_such_library is not installed. Run: pip install gguf libgguf" in str(
            call(folder, *arguments).exception
        )


def test_a_target_that_fails_does_not_stop_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[Path]:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(GgufTarget, "write_files", broken)
    targets = ("--target", "gguf", "--target", "sdcpp", "-b", "7.2bit")
    done = call(folder, "export", *targets)
    assert done.exit_code != 0
    assert "gguf could not be written: RuntimeError: no kernel for this" in str(done.exception)
    assert "export: gguf FAILED" in done.stderr
    assert (folder / "r/export/sdcpp@7.2bit/sdcpp_rules.txt").is_file()
    assert "sdcpp_rules.txt" in done.stdout
    assert not (folder / "r/export/gguf@7.2bit.json").is_file(), "nothing says that it is whole"
    monkeypatch.setattr(GgufTarget, "imports", ("no_such_library",))
    absent = call(folder, "export", *targets)
    assert "no_such_library is not installed" in str(absent.exception)
    assert "sdcpp" in absent.stdout


def test_a_file_that_is_larger_than_the_map_is_said() -> None:
    assert "MORE than the model in half precision (" in size_note("torchao", 40, 8, 32)
    assert "MORE" not in size_note("torchao", 30, 8, 32)


def test_the_report_shows_ideal_and_stored_size_side_by_side(folder: Path) -> None:
    assert call(folder, "export", "--target", "gguf").exit_code == 0
    assert call(folder, "evaluate").exit_code == 0
    done = call(folder, "report")
    assert done.exit_code == 0, done.output
    page = (folder / "r/report.html").read_text()
    row = read_sizes(folder)["gguf"]
    assert "what the file of the target really takes" in page
    for key in ("ideal_bytes", "accounted_bytes"):
        assert f"{int(row[key]) / 1000:,.2f}" in page
    names = int(row["header_bytes"]) / int(row["stored_bytes"])
    assert np.isclose((1 + names) * float(row["stored_bits_per_parameter"]), 6, atol=0.05), "the whole file"
    assert get_exporter("gguf").payload
