"""The options that the verbs of a study share, each written out once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mpqsearch.cli import completion
from mpqsearch.errors import ConfigError
from mpqsearch.toml_text import toml_value

Config = Annotated[Path | None, typer.Option("--config", "-c", help="A study in TOML; defaults apply without one.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Diffusers folder, owner/name of a hub, embedded name, or package.module:function.",
        autocompletion=completion.model,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="auto, cpu, cuda or mps (model.device; default: auto, the fastest here).",
        autocompletion=completion.among(lambda: ("auto", "cpu", "cuda", "mps")),
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Override one key of the study. May be repeated.",
        autocompletion=completion.setting,
    ),
]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", "-o", help="Where files go (default: runs/ and the name of the study).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and reused; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Make outputs again that were made from other inputs.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Verbose = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, show_default=False, help="-v: logs of the libraries; -vv: tracebacks."),
]
_SAMPLES = "How samples are drawn"
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help="File of prompts: txt, csv, jsonl, json or yaml (prompts.file).", rich_help_panel=_SAMPLES
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Denoising steps (sampler.steps; default: the pipeline's).", rich_help_panel=_SAMPLES),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", help="Guidance scale (sampler.guidance; default: the pipeline's).", rich_help_panel=_SAMPLES
    ),
]
Batch = Annotated[
    int | None, typer.Option("--batch", help="Samples at a time (sampler.batch).", rich_help_panel=_SAMPLES)
]
Call = Annotated[
    list[str] | None,
    typer.Option(
        "--call",
        metavar="KEY=VALUE",
        help="Further argument of the pipeline's call, such as height=512 (sampler.call). May be repeated.",
        rich_help_panel=_SAMPLES,
    ),
]

Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="BUDGET",
        help="uniform:3, 3bit, 450kB, 2e9bops. May be repeated.",
        autocompletion=completion.budget,
    ),
]
Select = Annotated[
    str | None,
    typer.Option(
        help="How a map is chosen among maps that differ in kind: measured, by a few samples of each, or none "
        "(allocate.select; default: measured).",
        autocompletion=completion.among(lambda: ("measured", "none")),
    ),
]
Budget = Annotated[str, typer.Option("--budget", "-b", help="Budget of the map.", autocompletion=completion.budget)]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Method of the study (default: report.chosen, else the last one).",
        autocompletion=completion.method,
    ),
]


def drawing(
    prompts: Path | None, steps: int | None, guidance: float | None, batch: int | None, call: Sequence[str] | None
) -> dict[str, Any]:
    """Settings of the study from what the options say of samples. Raises `ConfigError` for a malformed ``--call``."""
    return {
        "prompts.file": None if prompts is None else str(prompts),
        "sampler.steps": steps,
        "sampler.guidance": guidance,
        "sampler.batch": batch,
        **dict(map(_argument, call or ())),
    }


def _argument(text: str) -> tuple[str, Any]:
    key, sign, raw = text.partition("=")
    if not sign or not key.strip().isidentifier():
        raise ConfigError(f"--call takes KEY=VALUE, got {text!r}. Example: --call height=512")
    return f"sampler.call.{key.strip()}", toml_value(raw)
