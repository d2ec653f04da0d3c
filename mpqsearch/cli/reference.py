"""The page of all keys of a study and all options of the command line: ``python -m mpqsearch.cli.reference``.

The keys come from `mpqsearch.settings`, the options from the verbs themselves.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

import typer

from mpqsearch.cli import app
from mpqsearch.settings import Setting, default_methods, tables

_HEAD = """# Reference of the study file and the command line

`make reference` writes this page from the docstrings of the package. Change them, not the page.

A study is a TOML file. Every key has a default, so that two lines are enough, and `mpqsearch init FOLDER` writes one
with comments. `--set TABLE.KEY=VALUE` overrides one key on the command line: `--set evaluate.samples=64`. An unknown
key is an error that names the nearest known one."""

_SHARED = 4
"""Options of at least so many verbs are described once."""


def page() -> str:
    """The page in Markdown."""
    return "\n\n".join([_HEAD, "## The study file", *_study(), "## The command line", *_command_line()]) + "\n"


def _study() -> Iterator[str]:
    for table in tables():
        yield f"### [{table.name}]" if table.name != "methods" else "### [[methods]]"
        yield from map(_wrapped, table.about.split("\n\n"))
        yield "\n".join(_key(s) for s in table.settings)
        if table.name == "methods":
            yield "A study without methods has these:"
            yield f"```toml\n{default_methods()}\n```"


def _key(setting: Setting) -> str:
    kind = f"{setting.type} ({setting.unit})" if setting.unit else setting.type
    value = {"": "not set by default", "required": "required"}.get(setting.default, f"default `{setting.default}`")
    shown = f" Example: `{setting.name} = {setting.example}`." if setting.example != setting.default else ""
    return _wrapped(f"- **`{setting.name}`**: {kind}, {value}. {setting.meaning}{shown}", "  ")


def _command_line() -> Iterator[str]:
    verbs = all_verbs()
    uses = Counter(_option(p) for verb in verbs.values() for p in verb.params)
    shared = [option for option, n in uses.items() if n >= _SHARED]
    yield _wrapped("`mpqsearch VERB --help` says the same. Most verbs take these options:")
    yield "\n".join(shared)
    for name, verb in verbs.items():
        yield f"### mpqsearch {name}"
        yield from (_wrapped(part) if part[:2] != "- " else part for part in verb.help.strip().split("\n\n"))
        own = [option for option in map(_option, verb.params) if option not in shared]
        if own:
            yield "\n".join(own)


def all_verbs() -> dict[str, Any]:
    """The verbs by name, as typer has made them."""
    return dict(sorted(typer.main.get_command(app).commands.items()))  # type: ignore[attr-defined]


def _option(parameter: Any) -> str:
    names = [f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts)]
    if parameter.param_type_name == "argument":
        names = [f"`{parameter.name.upper()}`"]
    return _wrapped(f"- {', '.join(names)}: {parameter.help}", "  ")


def _wrapped(text: str, indent: str = "") -> str:
    lines = textwrap.wrap(
        text.replace("``", "`"), 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
