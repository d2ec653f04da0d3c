"""``mpqsearch init``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from mpqsearch.artifacts import write_text
from mpqsearch.cli import completion
from mpqsearch.cli.app import Tracebacks, app, quiet
from mpqsearch.errors import ConfigError
from mpqsearch.settings import settings
from mpqsearch.sources import local_folder, model_files, model_name, read_config
from mpqsearch.toml_text import toml_text
from mpqsearch.untrusted import read_toml

LARGE = 1_000_000_000
"""Bytes of weights from which on a pipeline is drawn one sample at a time, and fewer samples are drawn."""

PROMPTS = "prompts.txt"

Values = Mapping[str, Any]
"""The keys of a study that the file has, in order; those of None are shown as comments, with their example."""


@app.command()
def init(
    pipeline: Annotated[
        str,
        typer.Argument(
            help="Diffusers folder, owner/name of a hub, or embedded name.",
            autocompletion=completion.model,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file that is written (default: NAME.toml, here).")
    ] = None,
    verbose: Tracebacks = 0,
) -> None:
    """Write a study file for a pipeline, with a comment for each key, and example prompts where it needs some.

    Steps, guidance, size, layers at 16 bits and an export target come from the preset of its class, if there is one
    (studies/guides/presets.md). Nothing is overwritten.

    Example: `mpqsearch init fmnist-t2i`

    Then: `mpqsearch run fmnist-t2i.toml --dry-run`
    """
    quiet(verbose)
    path = output or Path(f"{model_name(pipeline)}.toml")
    if path.exists():
        raise ConfigError(f"{path} exists already, and is left as it is: name another file with --output")
    text = study_for(pipeline)
    write_text(path, text)
    if preset := preset_for(local_folder(pipeline)):
        print(f"Preset {preset['name']}:")
        print("\n".join(f"  {key} = {toml_text(value)}" for key, value in preset["study"].items()))
    if f'\nfile = "{PROMPTS}"\n' in text and not Path(PROMPTS).exists():
        write_text(Path(PROMPTS), "\n".join(presets()["prompts"]) + "\n")
        print(f"{PROMPTS} has {len(presets()['prompts'])} example prompts: put your own in their place")
    print(f"{path} is written. Look it through, then see what a run would do: mpqsearch run {path} --dry-run")


@cache
def presets() -> dict[str, Any]:
    """What presets.toml holds: ``preset`` and ``prompts``."""
    return read_toml(Path(__file__).with_name("presets.toml"))


def preset_for(folder: Path | None) -> Mapping[str, Any] | None:
    """The first preset of a folder's pipeline class whose ``when`` its configurations fulfil; none for a folder that
    says itself how it is meant to be drawn (`sampler.json`)."""
    if folder is None or (folder / "sampler.json").exists():
        return None
    index = _config_of(folder, "model_index")
    for preset in presets()["preset"]:
        asked = [(*key.split("."), value) for key, value in preset.get("when", {}).items()]
        if preset["pipeline"] == index.get("_class_name") and all(
            _config_of(folder, file).get(key) == value for file, key, value in asked
        ):
            return dict(preset)
    return None


def _config_of(folder: Path | None, name: str) -> dict[str, Any]:
    """``model_index.json`` of a pipeline, or the configuration of a component; empty when there is none."""
    inner = ("model_index.json",) if name == "model_index" else (f"{name}/config.json", f"{name}/{name}_config.json")
    files = [] if folder is None else [folder / file for file in inner if (folder / file).is_file()]
    return read_config(files[0]) if files else {}


def study_for(source: str) -> str:
    """A commented study for a pipeline, as TOML. Raises what `mpqsearch.sources.local_folder` raises."""
    folder = local_folder(source)
    index, preset = _config_of(folder, "model_index"), preset_for(folder)
    parts = [
        f"# A study of {source}{': ' + index['_class_name'] if index else ''}. Written by `mpqsearch init`.",
        "# A key behind a # is not set; its value is an example. All keys: studies/guides/reference.md.",
    ]
    if preset:
        parts += [f"# From the preset {preset['name']}: {', '.join(preset['study'])}."]
    table = ""
    for key, value in {**_values(source, index, folder), **(preset["study"] if preset else {})}.items():
        name = key.partition(".")[0]
        parts += [f"\n[{name}]"] if name != table else []
        parts += _lines(key, value)
        table = name
    return "\n".join(parts) + "\n"


def _values(source: str, index: Mapping[str, Any], folder: Path | None) -> Values:
    large = sum(file.stat().st_size for file in (model_files(source) or {}).values()) > LARGE
    prompted = "tokenizer" in index and folder is not None and not (folder / "prompts.txt").exists()
    return {
        "model.source": source,
        "model.dtype": "bfloat16" if large else None,
        "model.device": None,
        "model.memory_limit": None,
        "prompts.file": PROMPTS if prompted else None,
        "sampler.steps": None,
        "sampler.guidance": None,
        "sampler.batch": 1 if large else 8,
        "sampler.call": None,
        "policy.overrides": None,
        "policy.groups": None,
        "calibration.checkpoint": large,
        "allocate.budgets": ["3bit", "4bit"],
        "allocate.select_samples": 4 if large else 16,
        "evaluate.samples": 16 if large else 128,
        "evaluate.scorers": None,
        "export.targets": ["neutral"],
    }


def _lines(key: str, value: Any) -> Iterator[str]:
    """The comment of a key, and the key: set, or with its example behind a #."""
    setting = settings()[key]
    yield from textwrap.wrap(
        setting.meaning.replace("``", "`"), 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    yield f"# {setting.name} = {setting.example}" if value is None else f"{setting.name} = {toml_text(value)}"
