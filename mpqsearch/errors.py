"""The exception tree. Every message names what was asked, what was found, what is allowed and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from importlib import metadata


class MpqsearchError(Exception):
    """Base of every error that mpqsearch raises on purpose; ``exit_code`` is what the command line ends with. Its text
    may go to a terminal whatever names of files or layers it quotes."""

    exit_code = 2

    def __str__(self) -> str:
        text = "\n".join(map(shown, super().__str__().split("\n")))
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def shown(text: str) -> str:
    """Text for a terminal, a page or a table: control characters and halves of surrogate pairs are escaped."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Control characters, those that turn the direction of writing or take no room, and halves of surrogate pairs."""

MAX_MESSAGE = 2500
"""Characters of a message: names from files may have any length. The end of a worker's log goes into one as well."""


class ConfigError(MpqsearchError):
    """A configuration, an option or an argument is wrong."""


class UnknownNameError(ConfigError):
    """A name that is not in a registry, a model or a file format."""

    def __init__(self, what: str, asked: str, known: Iterable[str], hint: str = "") -> None:
        self.asked, self.known = asked, sorted(known)
        near = nearest(asked, self.known)
        listed = ", ".join(self.known[:20]) + (", ..." if len(self.known) > 20 else "")
        super().__init__(
            f"unknown {what} {asked!r}"
            + (f" (did you mean {near!r}?)" if near else "")
            + f". Known: {listed or 'none'}."
            + (f" {hint}" if hint else "")
        )


def install(extra: str) -> str:
    """The command that brings the packages of an extra, from the checkout that mpqsearch was installed from if it is
    one."""
    try:
        told = json.loads(metadata.distribution("mpqsearch").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        told = {}
    source = told["url"].removeprefix("file://") if "dir_info" in told else "mpqsearch"
    return f"pip install '{source}[{extra}]'"


class ModelError(MpqsearchError):
    """A model cannot be loaded, called or read."""


class LayerMismatchError(ModelError):
    """The layers of an artifact are not the layers of the model."""


class ArtifactError(MpqsearchError):
    """A file is missing, damaged, of a newer version or of another kind."""


class StaleArtifactError(ArtifactError):
    """A file on disk was made from other inputs than the present ones."""

    exit_code = 4


class NumericsError(MpqsearchError):
    """NaN or infinity where a finite number is needed."""


class InfeasibleBudgetError(MpqsearchError):
    """No assignment meets the budget; the message states the smallest attainable value."""

    exit_code = 3


class SolverError(MpqsearchError):
    """A solver failed, is missing, or answered with something that does not hold."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None
