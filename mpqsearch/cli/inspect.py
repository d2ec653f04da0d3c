"""``mpqsearch inspect``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli.app import app, quiet
from mpqsearch.cli.printing import bar, print_fields, print_json, print_profile, print_records, print_table, spark
from mpqsearch.errors import ConfigError
from mpqsearch.untrusted import read_json


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Any JSON artifact of a run.")],
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Recompute all that an allocation.json claims; exit code 4 and the contradiction."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content as JSON.")] = False,
    verbose: Annotated[int, typer.Option("-v", count=True, help="-vv: tracebacks.")] = 0,
) -> None:
    """Show what an artifact holds, as a table and a small picture.

    With `--check` an `allocation.json` is checked: its tables are built again from the profile of its run, and size,
    costs, loss and lower bound are recomputed by arithmetic that shares nothing with the solver.

    Examples:

    - `mpqsearch inspect runs/quickstart/allocations/measured@uniform-3/bitmap.json`
    - `mpqsearch inspect --check runs/quickstart/allocations/measured@uniform-3/allocation.json`
    """
    from mpqsearch import artifacts

    quiet(verbose)
    body = read_json(file, ConfigError)
    schema = body.get("schema") if isinstance(body, dict) else None
    if not isinstance(schema, str):
        raise ConfigError(f"{file} is no artifact of mpqsearch: it should be a JSON file with a schema")
    if schema not in artifacts.VERSIONS:
        raise ConfigError(f"{file} has the unknown schema {schema!r}. Known: {', '.join(sorted(artifacts.VERSIONS))}.")
    if check:
        _check(file, schema, as_json=as_json)
    elif as_json:
        print_json(artifacts.read_json(file, schema).data)
    else:
        _VIEWS.get(schema, _show_data)(file, schema)


def _check(file: Path, schema: str, *, as_json: bool) -> None:
    from mpqsearch.stages import check_allocation

    if schema != "mpqsearch/allocation":
        raise ConfigError(f"--check takes an allocation.json, and {file} is {schema}")
    lines = check_allocation(file)
    if as_json:
        print_json({"file": str(file), "checked": lines})
        return
    print(f"{file} holds:")
    for line in lines:
        print(f"- {line}")


def _show_bit_map(file: Path, _schema: str) -> None:
    from mpqsearch import artifacts

    bit_map = artifacts.load_bit_map(file)
    print(f"bit map {bit_map.digest[:12]} for the model {bit_map.model_digest[:12]}, widths by {bit_map.granularity}")
    print(bit_map.summary())
    # A layer of one width counts as one entry of the map, as it is written.
    counts = Counter(bits for widths in bit_map.weights.values() for bits in widths.reshape(-1).tolist())
    unit = "channels" if bit_map.granularity == "channel" else "layers"
    rows = [{"bits": bits, "entries": n, "": bar(n / counts.total())} for bits, n in sorted(counts.items())]
    print_table(f"entries of the map by width ({unit}, or whole layers)", rows)
    means = [float(w.mean()) for w in bit_map.weights.values()]
    print(f"mean bits over depth: {spark(means, 1, 8)}")


def _show_profile(file: Path, _schema: str) -> None:
    from mpqsearch import artifacts

    print_profile(artifacts.load_layers(file.with_name("layers.json")), artifacts.load_profile(file))


def _show_layers(file: Path, _schema: str) -> None:
    from mpqsearch import artifacts

    table = artifacts.load_layers(file)
    print_table(
        table.model,
        [
            {"layer": la.name, "kind": la.kind, "shape": "x".join(map(str, la.weight_shape)), "role": la.role}
            for la in table
        ],
    )
    weights: Counter[str] = Counter()
    for layer in table:
        weights[layer.role] += layer.n_weights
    rows = []
    for role, n in weights.most_common():
        share = n / table.n_weights
        rows.append({"role": role, "weights": n, "share": f"{share:.1%}", "": bar(share)})
    print_table("weights by role", rows)


def _show_front(file: Path, _schema: str) -> None:
    from mpqsearch.pareto import main_metric
    from mpqsearch.report.tables import read_pareto_json

    records = read_pareto_json(file)
    print_records(records, as_json=False)
    metric = main_metric(records)
    shown = [r for r in records if metric in r.metrics and r.metrics[metric].value > 0]
    if len(shown) < 2:
        return
    logs = [math.log10(r.metrics[metric].value) for r in shown]
    low, span = min(logs), max(logs) - min(logs) or 1.0
    rows = []
    for r, log in zip(shown, logs, strict=True):
        value = f"{r.metrics[metric].value:.3g}"
        rows.append({"method": r.method, "bits": f"{r.average_bits:.2f}", "value": value, "": bar((log - low) / span)})
    print_table(f"{shown[0].metrics[metric].name}, logarithmic bars (shorter is better)", rows)


def _show_data(file: Path, schema: str) -> None:
    from mpqsearch import artifacts

    found = artifacts.read_json(file, schema)
    if isinstance(found.data, Mapping) and all(
        not isinstance(v, (list, tuple)) or len(v) < 8 for v in found.data.values()
    ):
        print_fields(f"{schema} version {found.version}", found.data)
    else:
        print_json(found.data)


_VIEWS: dict[str, Callable[[Path, str], None]] = {
    "mpqsearch/bitmap": _show_bit_map,
    "mpqsearch/profile": _show_profile,
    "mpqsearch/layers": _show_layers,
    "mpqsearch/pareto": _show_front,
}
