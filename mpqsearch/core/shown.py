"""How nouns show themselves: a few lines in a terminal, a small table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any


class Shown:
    """Gives a noun a short ``repr`` and ``_repr_html_`` from its `facts`."""

    __slots__ = ()

    def facts(self) -> Mapping[str, Any]:
        """What a person wants to know first, by name; a few entries."""
        raise NotImplementedError

    def __repr__(self) -> str:
        lines = [f"  {name}: {value}" for name, value in self.facts().items()]
        return "\n".join([type(self).__name__, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in self.facts().items()
        )
        return f"<b>{type(self).__name__}</b><table>{rows}</table>"


def short_list(names: tuple[str, ...] | list[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shortened(name: str, longest: int) -> str:
    """A name in at most ``longest`` characters, its middle left out."""
    return name if len(name) <= longest else f"{name[: longest // 3]}…{name[longest // 3 + 1 - longest :]}"
