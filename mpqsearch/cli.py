"""The command line: parse, call one stage, print. Results go to stdout, logs and progress to stderr."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mpqsearch import __version__
from mpqsearch.errors import ConfigError, MpqsearchError

if TYPE_CHECKING:
    from mpqsearch.config import Config
    from mpqsearch.core import LayerTable
    from mpqsearch.stages import Run

app = typer.Typer(
    name="mpqsearch",
    help="Bit allocation for diffusion models: profile, allocate, evaluate, report, export.\n\n"
    "Every verb reads the same study (--config) and the same run folder (--run-dir); the same command again continues where it stopped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A study in TOML; defaults apply without one.")]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="Embedded name, diffusers folder, or owner/name of a hub.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override one key: table.key=value. May be repeated.")]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", "-o", help="Where files go (default: runs/<name of the study>).")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what reused; write nothing.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Make outputs again that were made from other inputs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
VerboseOption = Annotated[int, typer.Option("-v", count=True, help="-v: logs of the libraries; -vv: tracebacks.")]
BudgetOption = Annotated[list[str] | None, typer.Option("--budget", "-b", help="uniform:3, 3bit, 450kB, 2e9bops. May be repeated.")]


def _prepare(
    config: Path | None,
    model: str | None,
    overrides: list[str] | None,
    run_dir: Path | None,
    dry_run: bool,
    overwrite: bool,
    verbose: int,
    budgets: list[str] | None = None,
) -> Run:
    from mpqsearch.config import load_config
    from mpqsearch.stages import Run

    _State.verbose = verbose
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if not verbose:
        for noisy in ("diffusers", "huggingface_hub", "matplotlib"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
    settings = list(overrides or [])
    if model is not None:
        settings.append(f"model.source={json.dumps(model)}")
    if budgets:
        settings.append(f"allocate.budgets={json.dumps(budgets)}")
    loaded: Config = load_config(config, settings)
    folder = run_dir or Path("runs") / (config.stem if config else Path(loaded.model.source).name)
    return Run(config=loaded, folder=folder, overwrite=overwrite, dry_run=dry_run, say=_say)


class _State:
    verbose = 0


def _say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


@app.command()
def layers(
    config: ConfigOption = None,
    model: ModelOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """List the weight layers of a model, their roles and MACs, and what stays at full precision.

    Example: `mpqsearch layers --model fmnist-unet`
    """
    from mpqsearch import stages

    run = _prepare(config, model, set_, run_dir, dry_run, overwrite, verbose)
    table = stages.layers(run)
    if as_json:
        _print_json(table.to_data())
        return
    _print_table(
        f"{table.model}: {table.n_parameters} parameters",
        ["layer", "kind", "shape", "role", "channels", "MACs", "width"],
        [[la.name, la.kind, "x".join(map(str, la.weight_shape)), la.role, la.n_channels, la.macs, _fixed(run, la)] for la in table],
    )
    reasons: dict[str, int] = {}
    for k in table.kept:
        reasons[k.reason] = reasons.get(k.reason, 0) + k.n_values
    _print_table("kept at full precision", ["what", "values"], [[r, n] for r, n in sorted(reasons.items())])


@app.command()
def profile(
    config: ConfigOption = None,
    model: ModelOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure kurtosis, exact output errors and gains of every channel at every width.

    Example: `mpqsearch profile --model fmnist-unet --set calibration.samples=16`
    """
    from mpqsearch import stages

    run = _prepare(config, model, set_, run_dir, dry_run, overwrite, verbose)
    stages.start(run)
    measured = stages.profile(run, stages.layers(run))
    if measured is None:
        return
    if as_json:
        _print_json(measured.header())
        return
    _print_profile(stages.layers(run), measured)


@app.command()
def allocate(
    config: ConfigOption = None,
    model: ModelOption = None,
    budget: BudgetOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Choose widths for every method of the study at every budget; needs a profile (measures one when there is none).

    Example: `mpqsearch allocate --model fmnist-unet --budget 3bit --budget 450kB`
    """
    from mpqsearch import stages

    run = _prepare(config, model, set_, run_dir, dry_run, overwrite, verbose, budget)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is None:
        return
    made = stages.allocations(run, table, measured)
    if as_json:
        _print_json([data for _, _, _, data in made])
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
    _print_table(
        "allocations", ["budget", "method", "by", "bits a parameter", "bytes", "predicted loss", "status", "gap", "in budget"], rows
    )


@app.command()
def evaluate(
    config: ConfigOption = None,
    model: ModelOption = None,
    budget: BudgetOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Sample from every allocated map and measure it against full precision and data.

    Example: `mpqsearch evaluate -c studies/quickstart.toml --set evaluate.samples=64`
    """
    from mpqsearch import stages

    run = _prepare(config, model, set_, run_dir, dry_run, overwrite, verbose, budget)
    stages.start(run)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is not None:
        _print_records(stages.evaluate(run, table, measured), as_json)


@app.command()
def report(
    config: ConfigOption = None,
    model: ModelOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Draw the front, tables, heat maps and sample grids into one report.html.

    Example: `mpqsearch report -c studies/quickstart.toml`
    """
    from mpqsearch import stages

    run = _prepare(config, model, set_, run_dir, dry_run, overwrite, verbose)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is None:
        return
    records = stages.evaluate(run, table, measured)
    print(stages.report(run, table, measured, records))  # noqa: T201


@app.command()
def quantize(
    config: ConfigOption = None,
    model: ModelOption = None,
    budget: Annotated[str, typer.Option("--budget", "-b", help="Budget of the map.")] = "uniform:3",
    method: Annotated[str, typer.Option("--method", help="Method of the study.")] = "ilp-channel",
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Write the fake-quantized model of one map as a diffusers folder (safetensors) with its bit map.

    Example: `mpqsearch quantize --model fmnist-unet --method ilp-channel --budget uniform:3`
    """
    from mpqsearch import stages
    from mpqsearch.core import Budget

    run = _prepare(config, model, set_, run_dir, dry_run, overwrite, verbose)
    limit = Budget.parse(budget)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is not None:
        print(stages.quantize(run, table, measured, method, limit))  # noqa: T201


@app.command()
def export(
    config: ConfigOption = None,
    model: ModelOption = None,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="neutral, quanto. May be repeated.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", "-b", help="Budget of the map to export.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Method of the study (default: the best one).")] = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Write a map for another quantizer and let that quantizer read it back.

    Example: `mpqsearch export -c studies/quickstart.toml --target quanto --budget uniform:4`
    """
    from mpqsearch import stages

    settings = list(set_ or [])
    if target:
        settings.append(f"export.targets={json.dumps(target)}")
    if budget:
        settings.append(f"export.budget={json.dumps(budget)}")
    if method:
        settings.append(f"report.chosen={json.dumps(method)}")
    run = _prepare(config, model, settings, run_dir, dry_run, overwrite, verbose)
    table = stages.layers(run)
    measured = stages.profile(run, table)
    if measured is not None:
        for path in stages.export(run, table, measured, []):
            print(path)  # noqa: T201


@app.command(name="run")
def run_(
    study: Annotated[Path, typer.Argument(help="A study in TOML, such as studies/quickstart.toml.")],
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Run a whole study: layers, profile, allocate, evaluate, report, export. Run it again to continue or to reuse.

    Example: `mpqsearch run studies/quickstart.toml`
    """
    from mpqsearch import stages

    run = _prepare(study, None, set_, run_dir, dry_run, overwrite, verbose)
    _print_records(stages.everything(run), as_json)
    if not dry_run:
        print(run.path("report.html"))  # noqa: T201


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Any JSON artifact of a run.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Show what an artifact holds.

    Example: `mpqsearch inspect runs/quickstart/allocations/ilp-channel@uniform-3/bitmap.json`
    """
    from mpqsearch import artifacts

    _State.verbose = verbose
    try:
        schema = json.loads(file.read_bytes())["schema"]
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{file} is no artifact of mpqsearch: it should be a JSON file with a schema") from error
    if schema not in artifacts.VERSIONS:
        raise ConfigError(f"{file} has the unknown schema {schema!r}. Known: {', '.join(sorted(artifacts.VERSIONS))}.")
    found = artifacts.read_json(file, schema)
    if as_json:
        _print_json(found.data)
    elif schema == "mpqsearch/bitmap":
        bit_map = artifacts.load_bit_map(file)
        print(f"bit map {bit_map.digest[:12]} for the model {bit_map.model_digest[:12]}, widths by {bit_map.granularity}")  # noqa: T201
        print(bit_map.summary())  # noqa: T201
    elif schema == "mpqsearch/profile":
        _print_profile(artifacts.load_layers(file.with_name("layers.json")), artifacts.load_profile(file))
    elif schema == "mpqsearch/layers":
        table = artifacts.load_layers(file)
        _print_table(
            table.model,
            ["layer", "kind", "shape", "role"],
            [[la.name, la.kind, "x".join(map(str, la.weight_shape)), la.role] for la in table],
        )
    else:
        _print_json(found.data)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)  # noqa: T201
        raise typer.Exit


def _fixed(run: Run, layer: Any) -> str:
    width = run.config.policy.fixed_width(layer)
    return "searched" if width is None else f"{width} bits"


def _print_profile(table: LayerTable, measured: Any) -> None:
    from mpqsearch.methods import channel_losses

    variant = "auto" if "auto" in measured.variants else measured.variants[0]
    totals = measured.layer_sum(channel_losses(measured, table, variant, "probe", bias_correction=True))
    worst = sorted(range(len(measured.names)), key=lambda i: -float(totals[i].max()))[:15]
    rows = [
        [
            measured.names[i],
            f"{float(measured.arrays['kurtosis'][measured.rows(measured.names[i])].max()):.1f}",
            *(f"{totals[i, j]:.3g}" for j in range(len(measured.widths))),
        ]
        for i in worst
    ]
    _print_table(
        f"most sensitive layers (predicted loss, codebook {variant})",
        ["layer", "max kurtosis", *(f"{b} bit" for b in measured.widths)],
        rows,
    )


def _print_records(records: list[Any], as_json: bool) -> None:
    if as_json:
        _print_json([r.to_data() for r in records])
        return
    if not records:
        return
    keys = [k for k in ("fd_fp", "fd_data", "paired_psnr", "class_accuracy") if any(k in r.metrics for r in records)]
    rows = [
        [
            f"{r.target_bits:g}",
            r.method,
            f"{r.average_bits:.3f}",
            f"{r.size_bytes / 1000:.1f}",
            *(f"{r.metrics[k].value:.3f} ± {r.metrics[k].high - r.metrics[k].value:.3f}" if k in r.metrics else "" for k in keys),
        ]
        for r in records
    ]
    _print_table(
        f"{records[0].model}: {records[0].n_samples} samples, seeds {records[0].seeds}",
        ["budget", "method", "bits", "kB", *keys],
        rows,
    )


def _print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console()
    # A pipe has no width of its own: wide enough that no cell is folded, so that other programs can read it.
    (console if console.is_terminal else Console(width=200)).print(table)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, default=str))  # noqa: T201


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def _fail(text: str, code: int) -> NoReturn:
    print(f"mpqsearch: {text}", file=sys.stderr)  # noqa: T201
    raise SystemExit(code)


def main() -> None:
    """Entry point: exit codes 0 done, 2 usage or configuration, 3 infeasible budget, 4 stale artifact, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except MpqsearchError as error:
        if _State.verbose >= 2:
            raise
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as error:
        # typer turns an interrupt inside a command into the exit code 130 without a word.
        if isinstance(error, KeyboardInterrupt) or error.code == INTERRUPTED:
            _fail("interrupted. What was finished is kept; the same command continues from there.", INTERRUPTED)
        raise
    except BrokenPipeError:
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
