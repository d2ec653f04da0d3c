"""``mpqsearch export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpqsearch.cli import completion, options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import number, print_json, print_lines, print_table
from mpqsearch.core import FULL_PRECISION
from mpqsearch.errors import ConfigError

if TYPE_CHECKING:
    from mpqsearch.stages import Exported, Run

DIFFERS = 1
"""Exit code when a consumer holds another thing than was planned (``--verify``), and for a file with faults
(`mpqsearch.stages.delivering.faults`), unless they are accepted."""

AUTO = "auto"
"""In place of a target: all that are installed."""

TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="TARGET",
        help="neutral, gguf ... May be repeated. auto: compare all that are installed, and write nothing.",
        autocompletion=completion.among(completion.targets),
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="Budget of the map to export.", autocompletion=completion.budget),
]
MethodOption = Annotated[
    str | None,
    typer.Option("--method", help="Method of the study (default: the best one).", autocompletion=completion.method),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify", help="Load the result with its consumer and compare, layer by layer; exit code 1 on a difference."
    ),
]

MeasureOption = Annotated[
    bool | None,
    typer.Option("--measure/--no-measure", help="Evaluate what the file delivers (default), or only write it."),
]
AcceptOption = Annotated[
    bool,
    typer.Option("--accept", help="Exit code 0 even if the file has a fault, which is still named."),
]


@app.command()
def export(
    config: options.Config = None,
    target: TargetOption = None,
    budget: BudgetOption = None,
    method: MethodOption = None,
    verify: VerifyOption = False,
    measure: MeasureOption = None,
    accept: AcceptOption = False,
    model: options.Model = None,
    prompts: options.Prompts = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    batch: options.Batch = None,
    call: options.Call = None,
    device: options.Device = None,
    set_: options.Set = None,
    run_dir: options.RunDir = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Write a map for another quantizer and evaluate the file; with `--verify` that quantizer reads it back, which
    alone shows that the file is as planned.

    A target that rounds by itself gets a map over its own formats at the budget, priced by its own rounding, unless
    `--method` names one.

    Exit code 1, and the fault comes first, if the file is worse than the target's best uniform file of its size, larger
    than the budget or the original model, or of a model that the target's readers refuse.

    `--target auto` writes nothing: it shows what every installed target would give at the budget, by size and predicted
    loss, and the command that writes the first of them.

    Example: `mpqsearch export -c studies/quickstart.toml --target quanto --budget uniform:4 --verify`

    Example: `mpqsearch export --model fmnist-dit --budget 4.5bit --target auto`
    """
    from mpqsearch import stages

    compared = AUTO in (target or ())
    if compared and len(target or ()) > 1:
        raise ConfigError(f"--target {AUTO} compares all targets: leave out the others")
    settings = {
        "model.source": model,
        "model.device": device,
        **options.drawing(prompts, steps, guidance, batch, call),
        "export.targets": None if compared else target,
        "export.budget": budget,
        "report.chosen": method,
        "export.measure": measure,
    }
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    if not stages.prepare(run, targets=() if compared else run.config.export.targets):
        return
    if compared:
        _show_offers(run, as_json=as_json)
        return
    exports = stages.export(run, [], verify="now" if verify else "no", own_maps=method is None)
    good = [one for one in exports if one.error is None]
    faults = [fault for one in good for fault in one.faults]
    for fault in faults:
        run.say(f"export: {fault}")
    if not verify:
        print_lines([path for one in good for path in one.paths], as_json=as_json)
    elif as_json:
        print_json([_plain(one) for one in good])
    else:
        for one in good:
            _print_verification(one)
    if all(one.error is None for one in exports) and any(one.differs for one in exports):
        raise typer.Exit(DIFFERS)
    stages.require_good(exports)
    if faults and not accept:
        run.say("export: exit code 1, as the first lines say; --accept takes the files as they are")
        raise typer.Exit(DIFFERS)


def _show_offers(run: Run, *, as_json: bool) -> None:
    from mpqsearch import stages

    budget = stages.export_budget(run)
    offers = stages.offers(run, budget)
    if as_json:
        print_json(offers)
        return
    rows = [
        {
            "target": row["target"],
            "bytes": row["bytes"] or "-",
            "predicted loss": number(row["predicted_loss"], ".4g"),
            "map": row["obstacle"] or row["map"],
        }
        for row in offers
    ]
    print_table(f"installed targets at {budget.label()}; bytes as in their files, headers apart", rows)
    best = next((row["target"] for row in offers if not row["obstacle"]), None)
    if best is not None:
        run.say(
            f"export: nothing is written; --target {best} --budget {budget.label()}, else as here, writes the first"
        )


def _plain(one: Exported) -> dict[str, Any]:
    keys = ("target", "map", "ideal_bits", "accounted_bits", "verification", "delivered")
    return {key: one.data[key] for key in keys}


def _print_verification(one: Exported) -> None:
    data, verification = one.data, one.data["verification"]
    entries = verification["entries"]
    rows = [
        {
            "layer": entry["layer"],
            "asked": entry["asked"],
            "planned": entry["planned_choice"] or _width(entry["planned"]),
            "got": entry["got_text"],
            "reason": entry["reason"].replace("_", " "),
            "": "" if entry["ok"] else "DIFFERS",
        }
        for entry in entries
    ]
    good = sum(entry["ok"] for entry in entries)
    print_table(f"{one.target}: {data['map']}: {good} of {len(rows)} layers as planned", rows)
    if data["accounted_bits"] is not None:
        _print_sizes(one)
    if verification["forward_error"] is not None:
        print(f"forward pass: differs by at most {verification['forward_error']:.2g} of the largest output")
    for problem in verification["problems"]:
        print(f"problem: {problem}")
    verdict = "read back by its consumer as planned"
    if not verification["verified"]:
        verdict = (
            "as planned in mpqsearch's own reading; NOT verified, its consumer was not run"
            if verification["ok"]
            else "NOT as planned"
        )
    print(f"{one.target}: {verdict}")


def _print_sizes(one: Exported) -> None:
    data, verification = one.data, one.data["verification"]
    sizes = {
        "the map, packed densely": data["ideal_bits"] / 8,
        f"in the format of {one.target}": data["accounted_bits"] / 8,
    }
    if verification["stored_bytes"] is not None:
        sizes["found in the file"] = verification["stored_bytes"]
        sizes["headers of the file, apart"] = verification["header_bytes"]
    rows = [
        {"what": what, "bytes": f"{size:.0f}", "bits a parameter": f"{8 * size / data['n_parameters']:.3f}"}
        for what, size in sizes.items()
    ]
    print_table("sizes", rows)


def _width(bits: int | None) -> str:
    return {None: "per channel", FULL_PRECISION: "full"}.get(bits, str(bits))
