"""The application: exit codes, and the run folder that a verb of a study works on."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mpqsearch._version import __version__
from mpqsearch.errors import MpqsearchError, shown
from mpqsearch.progress import check_interrupt, interrupt_code, keep_interrupts, say
from mpqsearch.secrets import redact
from mpqsearch.sources import model_name

if TYPE_CHECKING:
    from mpqsearch.stages import Run

app = typer.Typer(
    name="mpqsearch",
    help="Bit allocation for diffusion models: profile, allocate, search, train, evaluate, report, export.\n\n"
    "Every verb reads the same study (--config) and the same run folder (--run-dir). The same command again continues "
    "where it stopped.\n\nExample: `mpqsearch allocate --model fmnist-unet --budget 3bit`\n\n"
    "A study for your pipeline: `mpqsearch init FOLDER`, then `mpqsearch run NAME.toml`",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class State:
    """What outlives a verb: how much the user wants to hear."""

    verbose = 0


def open_run(
    config: Path | None,
    overrides: Sequence[str] | None,
    settings: Mapping[str, Any],
    *,
    run_dir: Path | None,
    dry_run: bool,
    overwrite: bool,
    verbose: int,
) -> Run:
    """The run folder of a command, with its configuration read and checked.

    ``overrides`` are those of ``--set``; ``settings`` what other options say, by ``table.key``, where None or an empty
    list means that the option was not given.
    """
    from mpqsearch.artifacts import sweep
    from mpqsearch.config import load_config
    from mpqsearch.stages import Run

    quiet(verbose)
    given = {key: value for key, value in settings.items() if value is not None and value != []}
    study = load_config(config, overrides or (), given)
    folder = run_dir or Path("runs") / (config.stem if config else model_name(study.model.source))
    if not dry_run and (left := sweep(folder)):
        say(f"{folder}: deleted {len(left)} temporary files that a killed run left behind")
    return Run(config=study, folder=folder, overwrite=overwrite, dry_run=dry_run)


Tracebacks = Annotated[int, typer.Option("--verbose", "-v", count=True, show_default=False, help="-vv: tracebacks.")]
"""The ``--verbose`` of verbs that need no study."""


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


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


INTERRUPTED = 130
"""What typer returns for an interrupt inside a command."""

CRASHED = 70
"""Exit code of a mistake of ours: EX_SOFTWARE of sysexits.h."""

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""A wrong command line. Some versions of typer bring it along and some take it from click: this finds it in both."""


def main() -> None:
    """Entry point: exit codes 0 done, 1 an export that differs (``export --verify``), 2 usage, configuration or a file
    that is not as it should be, 3 infeasible budget, 4 stale artifact, 70 a mistake of mpqsearch, 130 interrupted, 143
    terminated. A mistake is one line on stderr."""
    keep_interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a pipe on Windows may know no block characters
    code: object = CRASHED
    try:
        code = app(prog_name="mpqsearch", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except MpqsearchError as error:
        if State.verbose >= 2:
            traceback.print_exc(file=_Redacted())
        _fail(str(error), error.exit_code)
    except UsageError as error:
        _fail(_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop_output()  # typer makes a SystemExit of it
        raise SystemExit(0) from None
    except Exception as error:  # noqa: BLE001 - the last place where anything can be said of it
        try:
            check_interrupt()  # what a library makes of an interrupt, such as an UnboundLocalError, is one
            _crash(error)
        except KeyboardInterrupt:
            code = INTERRUPTED
    if code == INTERRUPTED:
        _fail("interrupted. What was finished is kept; the same command continues from there.", interrupt_code())
    raise SystemExit(code if isinstance(code, int) else 0)


def _crash(error: Exception) -> NoReturn:
    """What nobody foresaw: a full disk behind stdout, a file that may not be read, or a mistake of ours."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO):
        _drop_output()
        _fail(f"the output cannot be written: {error.strerror}", 2)
    if State.verbose:
        traceback.print_exc(file=_Redacted())
    if isinstance(error, OSError) and error.filename is not None:
        _fail(f"{error.filename}: {error.strerror}. The file itself may be good: nothing was changed.", 2)
    _fail(
        f"this is a mistake of mpqsearch: {type(error).__name__}: {error}. What was finished is kept. The same command "
        "with -v shows where it is; please report that.",
        CRASHED,
    )


def _drop_output() -> None:
    """Nobody reads stdout: without this, Python would try again as it ends, and end with an error."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Redacted(io.StringIO):
    """stderr without secrets."""

    def write(self, text: str) -> int:
        return sys.stderr.write(redact(text))


def _usage(error: Any) -> str:
    """What is wrong with a command line, and where its options are listed."""
    if not error.format_message():  # a bare `mpqsearch`: its help is on stdout
        return ""
    verb = error.ctx.info_name if error.ctx is not None and error.ctx.parent is not None else ""
    return f"{error.format_message()} See `{' '.join(filter(None, ('mpqsearch', verb, '--help')))}`."


def _fail(text: str, code: int) -> NoReturn:
    if text:
        lines = (shown(line) for line in redact(text).splitlines())
        print("mpqsearch: " + "\n".join(lines), file=sys.stderr)
    raise SystemExit(code)
