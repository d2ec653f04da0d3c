"""``mpqsearch allocate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpqsearch.cli import completion, options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import number, print_json, print_table
from mpqsearch.errors import ConfigError

if TYPE_CHECKING:
    from mpqsearch.core import BitMap, Budget, LayerTable
    from mpqsearch.methods import MethodSpec
    from mpqsearch.stages import Quality, Run, Tried

    Maps = Sequence[tuple[MethodSpec, Budget, BitMap, Mapping[str, Any]]]
    TargetMaps = Sequence[tuple[str, Budget, BitMap, Mapping[str, Any]]]

SHOWN_LAYERS = 20
"""Layers of an explanation that are printed; the files hold all."""

PATTERN = "PATTERN=BITS"

TargetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="TARGET",
        help="Solve over the formats of an export target, at its true stored cost: gguf, sdnq, onnx ...",
        autocompletion=completion.among(completion.targets),
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
UntilOption = Annotated[
    str | None,
    typer.Option(
        metavar="METRIC<=VALUE",
        help="The smallest map whose measured quality passes: 'fd_fp<=0.1', 'lpips<=0.1'. --budget limits its size.",
    ),
]
ExplainOption = Annotated[bool, typer.Option("--explain", help="What the next bit would buy, and where.")]


@app.command()
def allocate(
    config: options.Config = None,
    budget: options.Budgets = None,
    within: WithinOption = None,
    latency: LatencyOption = None,
    min_bits: MinBitsOption = None,
    max_bits: MaxBitsOption = None,
    fix: FixOption = None,
    group: GroupOption = None,
    max_formats: MaxFormatsOption = None,
    max_formats_per_layer: MaxFormatsPerLayerOption = None,
    select: options.Select = None,
    until: UntilOption = None,
    method: options.Method = None,
    target: TargetsOption = None,
    path: PathOption = False,
    explain: ExplainOption = False,
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
    """Choose widths for every method of the study at every budget; needs a profile (measures one when there is none).

    By default several kinds of maps (uniform, by layer, by channel, each with several roundings) are solved, and
    measured on a few samples from the same noise. The best is returned, with the table of all of them.

    With `--until` the size is searched for one method (`--method`), with the samples of `evaluate`; the answer is the
    smallest map whose interval of 95 % keeps to the bound.

    With `--target` the maps of those export targets are made, and no others: each layer takes one of the target's own
    formats, and a budget is the size of the target's file, names and shapes included. Uniform types, the rule by which
    its users mix them and maps of several prices are measured as above, by what the consumer decodes from their files.
    `export --target auto` compares targets.

    Options about widths replace the keys of `[policy]` in the study. If no map fits, the exit code is 3 and the
    smallest attainable value is named.

    Examples:

    - `mpqsearch allocate --model fmnist-unet --budget 3bit --budget 450kB`: two maps for each method
    - `mpqsearch allocate -b 3bit --select none`: the plain integer program, nothing is sampled
    - `mpqsearch allocate -b 3bit --within 7e9bops`: two budgets at once
    - `mpqsearch allocate -c by-layer.toml -b uniform:4 --latency phone.csv --within 12ms`: no slower, as measured
    - `mpqsearch allocate -b 3bit --min-bits "up_blocks.*=3" --max-bits "mid_block.*=4" --fix "conv_in=16"`
    - `mpqsearch allocate --until "paired_psnr>=40"`: the smallest map that reaches it, measured at up to eight sizes
    - `mpqsearch allocate -b 3bit --group qkv --max-formats 2`: for engines with fused projections and two kernels
    """
    settings = {
        "model.source": model,
        "model.device": device,
        **options.drawing(prompts, steps, guidance, batch, call),
        "allocate.budgets": budget,
        "allocate.targets": target,
        "allocate.within": within,
        "allocate.select": select,
        "allocate.costs": str(latency) if latency else None,
        **_policy(min_bits, max_bits, fix, group),
        "policy.max_formats": max_formats,
        "policy.max_formats_per_layer": max_formats_per_layer,
    }
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    asked = _asked(run, until, method, budget, target)
    plain = [] if target else [name for name, wanted in (("paths", path), ("explanations", explain)) if wanted]
    _solve(run, asked, targets_only=bool(target), more=plain, as_json=as_json)


def _solve(
    run: Run,
    asked: tuple[Quality, MethodSpec, Budget | None] | None,
    *,
    targets_only: bool,
    more: Sequence[str],
    as_json: bool,
) -> None:
    """Solve and print; ``more``: what is asked for beside the maps, ``paths`` and ``explanations``."""
    from mpqsearch import stages

    if more:
        stages.program_methods(run)  # there must be one, which is known before anything is measured
    if asked:
        stages.require_reachable(run, asked[0])
    if not stages.prepare(run):
        return
    if asked:
        _show_until(*asked, *stages.smallest(run, *asked), as_json=as_json)
        return
    for_targets = stages.target_allocations(run)
    maps = [] if targets_only else stages.allocations(run)
    made = {"paths": stages.paths, "explanations": stages.explanations}
    found = {name: made[name](run) for name in more}
    if as_json:
        allocations = [data for *_, data in (*maps, *for_targets)]
        print_json({"allocations": allocations, **found} if found else allocations)
    else:
        _show(run.table, maps, for_targets, found)


def _show(
    table: LayerTable, maps: Maps, for_targets: TargetMaps, more: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    if maps:
        _show_allocations(table, maps)
    if for_targets:
        _show_targets(table, for_targets)
    for path in more.get("paths", ()):
        _show_path(table, path)
    for explanation in more.get("explanations", ()):
        _show_explanation(explanation)


def _asked(
    run: Run, until: str | None, method: str | None, budgets: Sequence[str] | None, targets: Sequence[str] | None
) -> tuple[Quality, MethodSpec, Budget | None] | None:
    """What `--until` asks for. Raises `ConfigError` for options that do not go with it."""
    from mpqsearch.stages import Quality

    if until is None:
        if method is not None:
            raise ConfigError("--method of allocate goes with --until; without it every method of the study is solved")
        return None
    if targets or len(budgets or ()) > 1:
        raise ConfigError("--until goes with at most one --budget, the largest size, and without --target")
    limit = run.config.allocate.parsed()[0] if budgets else None
    return Quality.parse(until), run.config.method(run.config.chosen_method(method)), limit


def _show_until(
    quality: Quality, method: MethodSpec, _: Budget | None, best: Tried, tried: Sequence[Tried], *, as_json: bool
) -> None:
    rows = [t.row(quality) for t in tried]
    if as_json:
        print_json({"until": str(quality), "method": method.name, "best": best.row(quality), "tried": rows})
        return
    shown = [{k: number(v, ".4g") if k in ("value", "low", "high") else v for k, v in row.items()} for row in rows]
    size = f"{best.record.size_bytes} bytes, {best.record.average_bits:.4f} bits a parameter"
    print_table(f"{method.name} until {quality}: {size} ({best.budget.label()})", shown)


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


def _show_allocations(table: LayerTable, maps: Maps) -> None:
    rows = []
    for method, budget, bit_map, data in maps:
        solved = data["result"] or {}
        row = {"budget": budget.label(), "method": method.name, "by": bit_map.granularity} | _size(table, data)
        row |= {"status": solved.get("status", "-"), "gap": number(solved.get("gap"), ".1e")}
        rows.append(row | {"in budget": _in_budget(data)})
    print_table("allocations", rows)
    for method, budget, _, data in maps:
        if "selection" in data:
            _show_selection(f"{method.name} at {budget.label()}", data["selection"])


def _show_selection(name: str, selection: Mapping[str, Any]) -> None:
    rows = [
        {
            "candidate": row["candidate"],
            "bytes": row["size_bytes"],
            "predicted loss": number(row["predicted"], ".3g"),
            "measured error": number(row["error"], ".3g"),
            "times the chosen": number(row["ratio"], ".3g"),
            "samples": row["samples"],
            "": row["verdict"],
        }
        for row in selection["rows"]
    ]
    rank = number(selection["spearman"], ".2f")
    print_table(
        f"what was tried for {name}, by the squared error of samples; rank correlation with predictions {rank}", rows
    )


def _size(table: LayerTable, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a map stores, everything counted, and its loss."""
    return {
        "bits a parameter": f"{data['size_bits'] / table.n_parameters:.4f}",
        "bytes": -(-data["size_bits"] // 8),
        "predicted loss": number(data["predicted_loss"], ".4g"),
    }


def _in_budget(data: Mapping[str, Any]) -> str:
    """``yes``, or by how much the budgets are exceeded; with several budgets, how much of each is used."""
    totals = data.get("totals", ())
    if len(totals) < 2:
        return "yes" if data["within_budget"] else "over"
    return ", ".join(f"{t['budget']} {t['cost'] / t['limit']:.1%}" for t in totals)


def _show_targets(table: LayerTable, maps: TargetMaps) -> None:
    rows = []
    for name, budget, _, data in maps:
        used = Counter(data["choices"].values())
        formats = [f"{n} {fmt}" for fmt, n in used.most_common()]
        if full := len(table) - sum(used.values()):
            formats.append(f"{full} at full precision")
        row = {"budget": budget.label(), "target": name} | _size(table, data) | {"names": data["names_bits"] // 8}
        rows.append(row | {"status": data["status"], "layers by format": ", ".join(formats)})
    print_table(
        "maps for targets, in their own formats; tensors and names as in their files",
        rows,
    )
    for name, budget, _, data in maps:
        if "selection" in data:
            _show_selection(f"{name} at {budget.label()}", data["selection"])


def _show_path(table: LayerTable, data: Mapping[str, Any]) -> None:
    size, unit = data["unit"] == "bits stored", data["unit"]
    rows = []
    for answer in data["budgets"]:
        cost = f"infeasible: at least {answer['smallest']} {unit}" if "smallest" in answer else f"{answer['cost']:.4g}"
        if size and "cost" in answer:
            cost = f"{answer['cost'] / table.n_parameters:.4f}"
        rows.append(
            {
                "budget": answer["budget"],
                "bits a parameter" if size else unit: cost,
                "loss": number(answer.get("loss"), ".4g"),
                "lower bound": number(answer.get("lower_bound"), ".4g"),
                f"loss saved per {_one(unit)}": number(answer.get("rate"), ".3g"),
            }
        )
    name = data["method"]["name"]
    print_table(
        f"path of {name}: {data['vertices']} maps of {data['items']} items, answered without solving again", rows
    )


def _show_explanation(data: Mapping[str, Any]) -> None:
    unit, layers = _one(data["unit"]), data["layers"]
    rows = [
        {
            "layer": layer["layer"],
            "bits": f"{layer['bits']:.4g}",
            "channels": layer["channels"],
            "loss": f"{layer['loss']:.3g}",
            "next": layer["next"] or "-",
            "saves": f"{layer['saved']:.3g}",
            "costs": layer["extra_cost"],
            f"saved per {unit}": f"{layer['rate']:.3g}",
        }
        for layer in layers[:SHOWN_LAYERS]
    ]
    title = (
        f"{data['method']} at {data['budget']} ({data['status']}): one more {unit} saves {data['shadow_price']:.4g} "
        f"of a loss of {data['loss']:.4g}; {data['slack']} left over"
    )
    if len(layers) > SHOWN_LAYERS:
        title += f"; the best {SHOWN_LAYERS} of {len(layers)} layers, all in explanation.csv"
    print_table(title, rows)


def _one(unit: str) -> str:
    return {"BOPs": "BOP", "bits stored": "bit"}.get(unit, unit)
