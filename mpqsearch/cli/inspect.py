"""``mpqsearch inspect``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mpqsearch.cli.app import Tracebacks, app, quiet
from mpqsearch.cli.printing import bar, print_fields, print_json, print_profile, print_records, print_table, spark
from mpqsearch.errors import ConfigError
from mpqsearch.untrusted import read_json


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A run folder, or any JSON artifact of one.")],
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Recompute all that an allocation.json claims; a contradiction ends with exit code 4."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content as JSON.")] = False,
    verbose: Tracebacks = 0,
) -> None:
    """Show what a run folder or an artifact holds, as tables and a small picture.

    With `--check` an `allocation.json` is checked: its tables are built again from the profile of its run, and size,
    costs, loss and lower bound are recomputed without the solver.

    Examples:

    - `mpqsearch inspect runs/quickstart`
    - `mpqsearch inspect runs/quickstart/allocations/measured@uniform-3/bitmap.json`
    - `mpqsearch inspect --check runs/quickstart/allocations/measured@uniform-3/allocation.json`
    """
    from mpqsearch import artifacts

    quiet(verbose)
    if file.is_dir():
        _show_run(file, as_json=as_json)
        return
    body = read_json(file, ConfigError)
    schema = body.get("schema") if isinstance(body, dict) else None
    if not isinstance(schema, str):
        raise ConfigError(f"{file} is not a file of mpqsearch: expected a run folder or a JSON file with a schema")
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
    widths = [bit_map.code_widths(name) for name in bit_map.weights]
    counts = Counter(bits for layer in widths for bits in layer.reshape(-1).tolist())
    unit = "channels, or whole layers" if bit_map.granularity == "channel" else "layers"
    rows = [{"bits": f"{bits:g}", unit: n, "": bar(n / counts.total())} for bits, n in sorted(counts.items())]
    print_table("widths", rows)
    means = [float(layer.mean()) for layer in widths]
    print(f"mean bits over depth: {spark(means, 1, 8)}")


def _show_profile(file: Path, _schema: str) -> None:
    from mpqsearch import artifacts

    layers = next((f for f in (file.with_name("layers.json"), file.parent.parent / "layers.json") if f.exists()), None)
    if layers is None:
        raise ConfigError(f"{file} needs the layers.json of its run folder, which is not there: `mpqsearch layers`")
    print_profile(artifacts.load_layers(layers), artifacts.load_profile(file))


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


def _show_metrics(file: Path, schema: str) -> None:
    from mpqsearch import artifacts

    data = artifacts.read_json(file, schema).data
    for title in ("metrics", "before", "after"):
        rows = [
            {"metric": m["name"], "value": _short(m["value"]), "95 %": f"{_short(m['low'])} to {_short(m['high'])}"}
            for m in data.get(title, {}).values()
        ]
        if rows:
            print_table(title, rows)


def _show_search(file: Path, schema: str) -> None:
    from mpqsearch import artifacts
    from mpqsearch.cli.search import print_search

    print_search(dict(artifacts.read_json(file, schema).data))


def _show_data(file: Path, schema: str) -> None:
    """Values in one table, then a table for each list of records."""
    from mpqsearch import artifacts

    found = artifacts.read_json(file, schema)
    data = found.data if isinstance(found.data, Mapping) else {"values": found.data}
    tables = {key: value for key, value in data.items() if _is_table(value)}
    inner = [(key, value) for key, value in data.items() if isinstance(value, Mapping)]
    tables |= {f"{key}, {name}": rows for key, value in inner for name, rows in value.items() if _is_table(rows)}
    print_fields(
        f"{schema} version {found.version}",
        {key: _short(value) for key, value in data.items() if key not in tables and value not in ("", None, [], {})},
    )
    for key, rows in tables.items():
        names = [name for name in rows[0] if any(row.get(name) not in ("", None) for row in rows)][:SHOWN_COLUMNS]
        print_table(key, [{name: _short(row.get(name)) for name in names} for row in rows])


SHOWN_COLUMNS = 5
"""Columns of a table of records; the file has all."""


def _is_table(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _short(value: Any, *, inner: bool = False) -> Any:
    """A value in a cell: four digits, digests at 12 characters, records as what they set; deeper ones are counted."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value[:12] if len(value) == 64 and value.isalnum() else value
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if inner or len(value) >= MANY:
        return f"{len(value)} entries"
    if isinstance(value, Mapping):
        return {key: _short(v, inner=True) for key, v in value.items() if v not in (None, "", [], {}, False)}
    return ", ".join(str(_short(v, inner=True)) for v in value)


MANY = 20
"""Entries that are counted instead of shown."""

PARTS = {
    "layers.json": "layers",
    "profile.json": "profile",
    "search/search.json": "search",
    "allocations/*/allocation.json": "allocate",
    "metrics/*.json": "evaluate",
    "distilled/*/metrics.json": "distill",
    "imports/*/bitmap.json": "import",
    "export/*.json": "export",
    "report.html": "report",
}
"""What a run folder may hold, and the verb that makes it."""


def _show_run(folder: Path, *, as_json: bool) -> None:
    """What a run folder holds, what it lacks, and its points."""
    counts = {pattern: len(list(folder.glob(pattern))) for pattern in PARTS}
    if not any(counts.values()):
        raise ConfigError(f"{folder} is no run folder of mpqsearch: it holds none of {', '.join(PARTS)}")
    if as_json:
        print_json(counts)
        return
    rows = [
        {"files": pattern, "found": count or "none", "made by": f"mpqsearch {PARTS[pattern]}"}
        for pattern, count in counts.items()
    ]
    print_table(str(folder), rows)
    if (folder / "pareto.json").exists():
        _show_front(folder / "pareto.json", "mpqsearch/pareto")


_VIEWS: dict[str, Callable[[Path, str], None]] = {
    "mpqsearch/bitmap": _show_bit_map,
    "mpqsearch/profile": _show_profile,
    "mpqsearch/layers": _show_layers,
    "mpqsearch/pareto": _show_front,
    "mpqsearch/metrics": _show_metrics,
    "mpqsearch/search": _show_search,
}
