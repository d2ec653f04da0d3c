"""The application: exit codes, and the options that every verb of a study shares."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mpqsearch._version import __version__
from mpqsearch.errors import MpqsearchError
from mpqsearch.progress import keep_interrupts

if TYPE_CHECKING:
    from mpqsearch.stages import Run

app = typer.Typer(
    name="mpqsearch",
    help="Bit allocation for diffusion models: profile, allocate, search, train, evaluate, report, export.\n\n"
    "Every verb reads the same study (--config) and the same run folder (--run-dir); the same command again continues "
    "where it stopped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

BudgetOption = Annotated[
    list[str] | None,
    typer.Option("--budget", "-b", metavar="BUDGET", help="uniform:3, 3bit, 450kB, 2e9bops. May be repeated."),
]

_CONFIG = {
    "config": Annotated[
        Path | None, typer.Option("--config", "-c", help="A study in TOML; defaults apply without one.")
    ]
}
_STUDY = {"study": Annotated[Path, typer.Argument(help="A study in TOML, such as studies/quickstart.toml.")]}
_SHARED: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[
            str | None, typer.Option("--model", "-m", help="Embedded name, diffusers folder, or owner/name of a hub.")
        ],
        None,
    ),
    "set_": (
        Annotated[
            list[str] | None,
            typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override one key of the study. May be repeated."),
        ],
        None,
    ),
    "run_dir": (
        Annotated[
            Path | None,
            typer.Option("--run-dir", "-o", help="Where files go (default: runs/ and the name of the study)."),
        ],
        None,
    ),
    "dry_run": (
        Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what reused; write nothing.")],
        False,
    ),
    "overwrite": (
        Annotated[bool, typer.Option("--overwrite", help="Make outputs again that were made from other inputs.")],
        False,
    ),
    "as_json": (Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")], False),
    "verbose": (Annotated[int, typer.Option("-v", count=True, help="-v: logs of the libraries; -vv: tracebacks.")], 0),
}

Verb = Callable[..., None]


class State:
    """What outlives a verb: how much the user wants to hear."""

    verbose = 0


def study_verb(
    name: str | None = None,
    *,
    settings: Callable[[Mapping[str, Any]], list[str]] | None = None,
    positional: bool = False,
) -> Callable[[Verb], Verb]:
    """Register a verb ``function(run, *, as_json, <own options>)``; the options that all verbs share are added to its
    own.

    ``settings`` turns the verb's own options into ``table.key=value`` overrides of the study, before it is read.
    ``positional`` takes the study as an argument instead of the option ``--config``.
    """

    def decorate(function: Verb) -> Verb:
        # `Run` is known to the type checker only: the stages are imported when a verb runs.
        hints = typing.get_type_hints(function, localns={"Run": object}, include_extras=True)
        own = {
            key: (hints[key], parameter.default)
            for key, parameter in inspect.signature(function).parameters.items()
            if key not in ("run", "as_json")
        }
        first: dict[str, tuple[Any, Any]] = (
            {k: (v, inspect.Parameter.empty) for k, v in _STUDY.items()}
            if positional
            else {k: (v, None) for k, v in _CONFIG.items()}
        )
        shared = {k: v for k, v in _SHARED.items() if not (positional and k == "model")}
        options = {**first, **own, **shared}

        def command(**values: Any) -> None:
            mine = {key: values[key] for key in own}
            run = prepare(
                values.get("study") or values.get("config"),
                values.get("model"),
                [*(values["set_"] or []), *(settings(mine) if settings else [])],
                run_dir=values["run_dir"],
                dry_run=values["dry_run"],
                overwrite=values["overwrite"],
                verbose=values["verbose"],
            )
            function(run, as_json=values["as_json"], **mine)

        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=a)
                for k, (a, d) in options.items()
            ]
        )
        command.__annotations__ = {k: a for k, (a, _) in options.items()}
        app.command(name or function.__name__)(command)
        return function

    return decorate


def prepare(
    config: Path | None,
    model: str | None,
    overrides: list[str],
    *,
    run_dir: Path | None,
    dry_run: bool,
    overwrite: bool,
    verbose: int,
) -> Run:
    """The run folder of a command, with its configuration read and checked."""
    from mpqsearch.config import load_config
    from mpqsearch.stages import Run

    quiet(verbose)
    settings = [*overrides, *([f"model.source={json.dumps(model)}"] if model is not None else [])]
    loaded = load_config(config, settings)
    folder = run_dir or Path("runs") / (config.stem if config else Path(loaded.model.source).name)
    return Run(config=loaded, folder=folder, overwrite=overwrite, dry_run=dry_run, say=say)


def quiet(verbose: int) -> None:
    """Set how much the libraries may say."""
    State.verbose = verbose
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if not verbose:
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # its logger sets itself up anew when it is imported
        for noisy in ("diffusers", "huggingface_hub", "matplotlib", "torchao", "torch.utils._pytree"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


def say(text: str) -> None:
    """A line for people, beside progress bars."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)  # noqa: T201
        raise typer.Exit


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def _fail(text: str, code: int) -> NoReturn:
    print(f"mpqsearch: {text}", file=sys.stderr)  # noqa: T201
    raise SystemExit(code)


def main() -> None:
    """Entry point: exit codes 0 done, 2 usage or configuration, 3 infeasible budget, 4 stale artifact, 130
    interrupted."""
    keep_interrupts()
    try:
        app(standalone_mode=True)
    except MpqsearchError as error:
        if State.verbose >= 2:
            raise
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as error:
        # typer turns an interrupt inside a command into the exit code 130 without a word.
        if isinstance(error, KeyboardInterrupt) or error.code == INTERRUPTED:
            _fail("interrupted. What was finished is kept; the same command continues from there.", INTERRUPTED)
        raise
    except BrokenPipeError:
        raise SystemExit(0) from None
