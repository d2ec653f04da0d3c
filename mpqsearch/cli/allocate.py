"""``mpqsearch allocate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from mpqsearch.errors import ConfigError

if TYPE_CHECKING:
    from mpqsearch.core import BitMap, Budget, LayerTable
    from mpqsearch.methods import MethodSpec

SHOWN_LAYERS = 20
"""Layers of an explanation that are printed; the files hold all."""

PATTERN = "PATTERN=BITS"

TargetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        help="Solve over the formats of an export target, at its true stored cost: gguf, sdnq, onnx ...",
    ),
]
WithinOption = Annotated[
    list[str] | None,
    typer.Option("--within", "-w", metavar="BUDGET", help="Another budget that holds as well: 2e9bops, 12ms, 450kB."),
]
LatencyOption = Annotated[
    Path | None,
    typer.Option(
        "--latency", help="CSV of measured latencies: layer, bits, cost in ms, and act_bits if that changes it."
    ),
]
MinBitsOption = Annotated[
    list[str] | None, typer.Option(metavar=PATTERN, help="Least width of the searched layers that match.")
]
MaxBitsOption = Annotated[
    list[str] | None, typer.Option(metavar=PATTERN, help="Largest width of the searched layers that match.")
]
FixOption = Annotated[list[str] | None, typer.Option(metavar=PATTERN, help="Width of the layers that match.")]
GroupOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN,PATTERN", help="Layers that share their widths; qkv: fused projections."),
]
MaxFormatsOption = Annotated[int | None, typer.Option(help="At most so many different widths in the model.")]
MaxFormatsPerLayerOption = Annotated[int | None, typer.Option(help="At most so many different widths in a layer.")]
PathOption = Annotated[
    bool, typer.Option("--path", help="Every budget at once: write and draw loss against size for each ilp method.")
]
ExplainOption = Annotated[bool, typer.Option("--explain", help="What the next bit would buy, and where.")]


@app.command()
def allocate(
    config: ConfigOption = None,
    budget: BudgetsOption = None,
    within: WithinOption = None,
    latency: LatencyOption = None,
    min_bits: MinBitsOption = None,
    max_bits: MaxBitsOption = None,
    fix: FixOption = None,
    group: GroupOption = None,
    max_formats: MaxFormatsOption = None,
    max_formats_per_layer: MaxFormatsPerLayerOption = None,
    target: TargetsOption = None,
    path: PathOption = False,
    explain: ExplainOption = False,
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
    formats, and a budget is the size of the target's file, headers apart. Options about widths take the place of what
    `[policy]` of the study says. Where no map fits, the exit code is 3 and the smallest attainable value is named.

    Examples:

    - `mpqsearch allocate --model fmnist-unet --budget 3bit --budget 450kB`: two maps a method
    - `mpqsearch allocate -b 3bit --within 7e9bops`: two budgets at once
    - `mpqsearch allocate -c by-layer.toml -b uniform:4 --latency phone.csv --within 12ms`: no slower, as measured
    - `mpqsearch allocate -b 3bit --min-bits "up_blocks.*=3" --max-bits "mid_block.*=4" --fix "conv_in=16"`
    - `mpqsearch allocate -b 3bit --group qkv --max-formats 2`: for engines with fused projections and two kernels
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
            "allocate.within": within or None,
            "allocate.costs": str(latency) if latency else None,
            **_policy(min_bits, max_bits, fix, group),
            "policy.max_formats": max_formats,
            "policy.max_formats_per_layer": max_formats_per_layer,
        },
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    table = stages.layers(run)
    if (measured := stages.profile(run, table)) is None:
        return
    for_targets = stages.target_allocations(run, table, measured)
    if target:
        _show_targets(table, for_targets, as_json=as_json)
        return
    made = stages.allocations(run, table, measured)
    paths = stages.paths(run, table, measured) if path else []
    explanations = stages.explanations(run, table, measured) if explain else []
    if as_json:
        allocations = [data for *_, data in (*made, *for_targets)]
        more = ({"paths": paths} if path else {}) | ({"explanations": explanations} if explain else {})
        print_json({"allocations": allocations, **more} if more else allocations)
        return
    _show_allocations(table, made)
    if for_targets:
        _show_targets(table, for_targets, as_json=False)
    for one in paths:
        _print_path(table, one)
    for one in explanations:
        _print_explanation(one)


def _policy(
    min_bits: Sequence[str] | None, max_bits: Sequence[str] | None, fix: Sequence[str] | None, group: list[str] | None
) -> dict[str, Any]:
    """Settings of the study from what the options say of widths."""
    return {
        "policy.min_bits": _widths("--min-bits", min_bits),
        "policy.max_bits": _widths("--max-bits", max_bits),
        "policy.overrides": _widths("--fix", fix),
        "policy.groups": {text: text.split(",") for text in group} if group else None,
    }


def _widths(option: str, texts: Sequence[str] | None) -> dict[str, int] | None:
    """What ``PATTERN=BITS`` says. Raises `ConfigError` for anything else."""
    widths = {}
    for text in texts or ():
        pattern, sign, bits = text.rpartition("=")
        if not sign or not pattern or not bits.isdecimal():
            raise ConfigError(f"{option} takes {PATTERN}, got {text!r}. Example: {option} 'up_blocks.*=4'")
        widths[pattern] = int(bits)
    return widths or None


def _show_allocations(table: LayerTable, made: Sequence[tuple[MethodSpec, Budget, BitMap, Mapping[str, Any]]]) -> None:
    rows = []
    for method, limit, bit_map, data in made:
        solved = data["result"] or {}
        loss, gap = data["predicted_loss"], solved.get("gap")
        rows.append(
            [
                limit.label(),
                method.name,
                bit_map.granularity,
                f"{data['size_bits'] / table.n_parameters:.4f}",
                -(-data["size_bits"] // 8),
                "-" if loss is None else f"{loss:.4g}",
                solved.get("status", "-"),
                "-" if gap is None else f"{gap:.1e}",
                _kept(data),
            ]
        )
    print_table(
        "allocations",
        ["budget", "method", "by", "bits a parameter", "bytes", "predicted loss", "status", "gap", "in budget"],
        rows,
    )


def _kept(data: Mapping[str, Any]) -> str:
    """``yes``, or by how much the budgets are exceeded; with several budgets, how much of each is used."""
    totals = data.get("totals", ())
    if len(totals) < 2:
        return "yes" if data["within_budget"] else "over"
    return ", ".join(f"{t['budget']} {t['cost'] / t['limit']:.1%}" for t in totals)


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
    size = data["unit"] == "bits stored"
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
            "bits a parameter" if size else data["unit"],
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
    return {"BOPs": "BOP", "bits stored": "bit"}.get(unit, unit)
