"""The options that the verbs of a study share, each written out once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path | None, typer.Option("--config", "-c", help="A study in TOML; defaults apply without one.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Embedded name, diffusers folder, or owner/name of a hub.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or mps (model.device; default: auto, the fastest here).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override one key of the study. May be repeated."),
]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", "-o", help="Where files go (default: runs/ and the name of the study).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what reused; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Make outputs again that were made from other inputs.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Verbose = Annotated[int, typer.Option("-v", count=True, help="-v: logs of the libraries; -vv: tracebacks.")]

Budgets = Annotated[
    list[str] | None,
    typer.Option("--budget", "-b", metavar="BUDGET", help="uniform:3, 3bit, 450kB, 2e9bops. May be repeated."),
]
Budget = Annotated[str, typer.Option("--budget", "-b", help="Budget of the map.")]
Method = Annotated[str, typer.Option("--method", help="Method of the study.")]
