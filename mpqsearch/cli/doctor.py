"""``mpqsearch doctor``."""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Annotated

import typer

from mpqsearch._version import __version__
from mpqsearch.cli.app import Tracebacks, app, quiet
from mpqsearch.cli.printing import print_json, print_table
from mpqsearch.errors import install

OPTIONAL = (
    ("transformers", "pipelines", "pipelines with text encoders, such as Stable Diffusion"),
    ("torch-fidelity", "fid", "the official Inception FID"),
    ("psycopg", "postgres", "a search on many machines through PostgreSQL"),
    ("cmaes", "search", "CMA-ES, one more sampler of the search"),
    ("optuna-dashboard", "", "a search in the browser"),
)
"""Distribution, the extra of mpqsearch that brings it (empty: by its own name), and what it is for."""

REQUIRED = (
    "torch",
    "diffusers",
    "safetensors",
    "numpy",
    "pandas",
    "matplotlib",
    "pulp",
    "highspy",
    "optuna",
    "jinja2",
    "tqdm",
)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    verbose: Tracebacks = 0,
) -> None:
    """Say what works on this machine, and how to get the rest.

    Example: `mpqsearch doctor`
    """
    quiet(verbose)
    rows = [*_libraries(), *_devices(), *_solvers(), *_extractors(), *_scorers(), *_targets()]
    if as_json:
        print_json(rows)
        return
    print(textwrap.fill(_verdict(rows), 80))
    print(
        f"mpqsearch {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores"
    )
    for what, group in itertools.groupby(rows, lambda row: row["what"]):
        shown = list(group)
        keys = ("name", "state", "note") if any(row["note"] for row in shown) else ("name", "state")
        print_table(what, [{key: row[key] for key in keys} for row in shown])


def _verdict(rows: Sequence[Mapping[str, str]]) -> str:
    """What can be done here, and what is missing, by the names in the tables below."""
    if broken := [row["name"] for row in rows if row["state"] == "MISSING"]:
        return f"not ready: {', '.join(broken)} must be installed"
    absent = [row for row in rows if row["state"] in ("absent", "broken")]

    def works(what: str) -> list[str]:
        return [row["name"] for row in rows if row["what"] == what and row not in absent]

    missing = [] if len(works("device")) > 1 else ["a GPU"]
    missing += [row["name"] for row in absent if row["what"] in ("optional", "extractor", "export")]
    ready = f"ready for work on {' and '.join(works('device'))}, and export to {', '.join(works('export'))}"
    return f"{ready}; missing: {', '.join(missing) or 'nothing'}"


def _row(what: str, name: str, state: str, note: str = "") -> dict[str, str]:
    return {"what": what, "name": name, "state": state, "note": note}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _get(distribution: str, extra: str) -> str:
    return install(extra) if extra else f"pip install {distribution}"


def _libraries() -> Iterator[dict[str, str]]:
    for name in REQUIRED:
        found = _version(name)
        yield _row("library", name, found or "MISSING", "" if found else f"pip install {name}")
    for name, extra, purpose in OPTIONAL:
        found = _version(name)
        yield _row("optional", name, found or "absent", purpose if found else f"{purpose}: {_get(name, extra)}")


def _devices() -> Iterator[dict[str, str]]:
    import torch

    threads = torch.get_num_threads()
    yield _row("device", "cpu", "works", f"{threads} thread{'' if threads == 1 else 's'}")
    cuda = torch.cuda.is_available()
    yield _row(
        "device",
        "cuda",
        "works" if cuda else "absent",
        torch.cuda.get_device_name() if cuda else "no CUDA device, or a CPU build",
    )
    mps = torch.backends.mps.is_available()
    yield _row("device", "mps", "works" if mps else "absent", "" if mps else "needs Apple silicon")


def _solvers() -> Iterator[dict[str, str]]:
    from mpqsearch.allocate.ilp import available_solvers

    yield _row("solver", "exact core", "works", "numpy")
    solvers = available_solvers()
    for name in (n for n, works in solvers.items() if works):
        yield _row("solver", name, "works", "through PuLP")
    others = sum(not works for works in solvers.values())
    yield _row("solver", "PuLP's others", "absent", f"{others} more, by PuLP's names, once installed")


def _extractors() -> Iterator[dict[str, str]]:
    from mpqsearch.errors import ModelError
    from mpqsearch.metrics import EXTRACTORS, load_extractor
    from mpqsearch.metrics.extractors import FOLDERS

    for name in EXTRACTORS:
        if name in FOLDERS:
            yield _row("extractor", name, "your folder", f"evaluate.extractor_weights = {FOLDERS[name]}")
            continue
        if name == "inception" and importlib.util.find_spec("torch_fidelity") is None:
            yield _row("extractor", name, "absent", f"the official FID: {_get('torch-fidelity', 'fid')}")
            continue
        if name == "inception":  # loading it may download its weights
            yield _row("extractor", name, "installed", "reads or downloads the weights of 2015 when it is first used")
            continue
        try:
            yield _row("extractor", name, "works", load_extractor(name).label)
        except ModelError as error:
            yield _row("extractor", name, "broken", str(error))


def _scorers() -> Iterator[dict[str, str]]:
    from mpqsearch.errors import ModelError
    from mpqsearch.metrics import SCORERS
    from mpqsearch.metrics.lpips import head_file

    for name, (needs, _) in SCORERS.items():
        note = f"evaluate.scorers = {name}:PATH, {needs}" if needs else f"evaluate.scorers = {name}"
        try:
            heads = head_file("alex") if name == "lpips" else None
        except ModelError as error:
            yield _row("scorer", name, "absent", str(error))
            continue
        yield _row("scorer", name, "your file" if needs else "works", note + (f"; heads: {heads}" if heads else ""))
    yield _row("scorer", "module:function", "your code", "ImageReward, HPS: maps (images, prompts, None) to [N]")


def _targets() -> Iterator[dict[str, str]]:
    from mpqsearch.export import SOURCES, TARGETS, get_exporter

    for name in TARGETS:
        target = get_exporter(name)
        reads = "; its files can be read" if name in SOURCES else ""
        if not target.requires:
            yield _row("export", name, "works", f"needs nothing{reads}")
        elif not target.by_consumer:
            note = (
                f"written as {target.requires} has it at {target.tested}, NOT verified by it{reads}; {target.install}"
            )
            yield _row("export", name, "not verified", note)
        else:
            version = _version(target.requires)
            absent = bool(target.missing()) or not version
            known = "NOT tested in this version, only in" if target.untested() else "tested against"
            tested = f"{known} {target.tested}{reads}"
            note = f"{tested}; {target.install}" if absent else f"{target.requires}, {tested}"
            yield _row("export", name, "absent" if absent else str(version), note)
