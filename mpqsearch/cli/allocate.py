"""``mpqsearch allocate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpqsearch.cli.app import (
    BudgetsOption,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    RunDirOption,
    SetOption,
    VerboseOption,
    app,
    open_run,
)
from mpqsearch.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from mpqsearch.core import BitMap, Budget, LayerTable

SHOWN_LAYERS = 20
"""Layers of an explanation that are printed; the files hold all."""


@app.command()
def allocate(
    config: ConfigOption = None,
    budget: BudgetsOption = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="Solve over the formats of an export target, at its true stored cost: gguf, sdnq, onnx ...",
        ),
    ] = None,
    path: Annotated[
        bool, typer.Option("--path", help="Every budget at once: write and draw loss against size for each ilp method.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="What the next bit would buy, and where.",
        ),
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Choose widths for every method of the study at every budget; needs a profile (measures one when there is none).

    With `--target` the maps of those export targets are made, and no others: each layer takes one of the target's own
    formats, and a budget is the size of the target's file, headers apart.

    Example: `mpqsearch allocate --model fmnist-unet --budget 3bit --budget 450kB`
    """
    from mpqsearch import stages

    run = open_run(
        config,
        set_,
        settings={
            "model.source": model,
            "model.device": device,
            "allocate.budgets": budget or None,
            "allocate.targets": target or None,
        },
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is None:
        return
    for_targets = stages.target_allocations(run, table, measured)
    if target:
        _show_targets(table, for_targets, as_json=as_json)
        return
    made = stages.allocations(run, table, measured)
    paths = stages.paths(run, table, measured) if path else []
    explanations = stages.explanations(run, table, measured) if explain else []
    allocations = [data for *_, data in (*made, *for_targets)]
    if as_json:
        wanted = {"paths": paths} if path else {}
        wanted |= {"explanations": explanations} if explain else {}
        print_json({"allocations": allocations, **wanted} if wanted else allocations)
        return
    rows = []
    for method, limit, bit_map, data in made:
        solved = data["result"] or {}
        rows.append(
            [
                limit.label(),
                method.name,
                bit_map.granularity,
                f"{data['size_bits'] / table.n_parameters:.4f}",
                -(-data["size_bits"] // 8),
                f"{data['predicted_loss']:.4g}",
                solved.get("status", "-"),
                f"{solved['gap']:.1e}" if "gap" in solved else "-",
                "yes" if data["within_budget"] else "over",
            ]
        )
    print_table(
        "allocations",
        ["budget", "method", "by", "bits a parameter", "bytes", "predicted loss", "status", "gap", "in budget"],
        rows,
    )
    if for_targets:
        _show_targets(table, for_targets, as_json=False)
    for one in paths:
        _print_path(table, one)
    for one in explanations:
        _print_explanation(one)


def _show_targets(
    table: LayerTable, made: Sequence[tuple[str, Budget, BitMap, Mapping[str, Any]]], *, as_json: bool
) -> None:
    if as_json:
        print_json([data for *_, data in made])
        return
    rows = []
    for name, limit, _, data in made:
        used = Counter(data["choices"].values())
        full = len(table) - sum(used.values())
        rows.append(
            [
                limit.label(),
                name,
                f"{data['size_bits'] / table.n_parameters:.4f}",
                -(-data["size_bits"] // 8),
                f"{data['predicted_loss']:.4g}",
                data["status"],
                ", ".join(f"{n} {fmt}" for fmt, n in used.most_common())
                + (f", {full} at full precision" if full else ""),
            ]
        )
    print_table(
        "maps for targets, in their own formats; bytes as in their files, headers apart",
        ["budget", "target", "bits a parameter", "bytes", "predicted loss", "status", "layers by format"],
        rows,
    )


def _print_path(table: LayerTable, data: Mapping[str, Any]) -> None:
    size = data["unit"] != "BOPs"
    rows = []
    for answer in data["budgets"]:
        if "loss" not in answer:
            rows.append(
                [answer["budget"], f"infeasible: at least {answer['smallest']} {data['unit']}", "-", "-", "-", "-"]
            )
            continue
        cost = f"{answer['cost'] / table.n_parameters:.4f}" if size else f"{answer['cost']:.4g}"
        gap = "-" if answer["gap"] is None else f"{answer['gap']:.1e}"
        rows.append(
            [
                answer["budget"],
                cost,
                f"{answer['loss']:.4g}",
                f"{answer['lower_bound']:.4g}",
                gap,
                f"{answer['rate']:.3g}",
            ]
        )
    print_table(
        f"path of {data['method']['name']}: {data['vertices']} maps of {data['items']} items, answered without "
        "solving again",
        [
            "budget",
            "bits a parameter" if size else "BOPs",
            "loss",
            "lower bound",
            "gap",
            f"loss saved per {_one(data['unit'])}",
        ],
        rows,
    )


def _print_explanation(data: Mapping[str, Any]) -> None:
    unit = _one(data["unit"])
    rows = [
        [
            row["layer"],
            f"{row['bits']:.4g}",
            row["channels"],
            f"{row['loss']:.3g}",
            row["next"] or "-",
            f"{row['gain']:.3g}",
            row["extra_cost"],
            f"{row['rate_up']:.3g}",
            "-" if row["rate_down"] is None else f"{row['rate_down']:.3g}",
            row["holds"],
        ]
        for row in data["layers"][:SHOWN_LAYERS]
    ]
    more = (
        f"; the best {SHOWN_LAYERS} of {len(data['layers'])} layers, all in explanation.csv"
        if len(data["layers"]) > SHOWN_LAYERS
        else ""
    )
    print_table(
        f"{data['method']} at {data['budget']} ({data['status']}): one more {unit} saves {data['shadow_price']:.4g} "
        "of a loss of "
        f"{data['loss']:.4g}; {data['slack']} left over{more}",
        [
            "layer",
            "bits",
            "channels",
            "loss",
            "next",
            "saves",
            "costs",
            f"saved per {unit}",
            f"lost per {unit} less",
            "held",
        ],
        rows,
    )


def _one(unit: str) -> str:
    return "BOP" if unit == "BOPs" else "bit"
