"""``mpqsearch inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli.app import app, quiet
from mpqsearch.cli.printing import print_json, print_profile, print_table
from mpqsearch.errors import ConfigError


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Any JSON artifact of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the content as JSON.")] = False,
    verbose: Annotated[int, typer.Option("-v", count=True, help="-vv: tracebacks.")] = 0,
) -> None:
    """Show what an artifact holds.

    Example: `mpqsearch inspect runs/quickstart/allocations/ilp-channel@uniform-3/bitmap.json`
    """
    from mpqsearch import artifacts

    quiet(verbose)
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
        print_json(found.data)
    elif schema == "mpqsearch/bitmap":
        bit_map = artifacts.load_bit_map(file)
        print(f"bit map {bit_map.digest[:12]} for the model {bit_map.model_digest[:12]}, widths by {bit_map.granularity}")  # noqa: T201
        print(bit_map.summary())  # noqa: T201
    elif schema == "mpqsearch/profile":
        print_profile(artifacts.load_layers(file.with_name("layers.json")), artifacts.load_profile(file))
    elif schema == "mpqsearch/layers":
        table = artifacts.load_layers(file)
        print_table(
            table.model,
            ["layer", "kind", "shape", "role"],
            [[la.name, la.kind, "x".join(map(str, la.weight_shape)), la.role] for la in table],
        )
    else:
        print_json(found.data)
