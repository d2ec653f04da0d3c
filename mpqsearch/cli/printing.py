"""Results on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mpqsearch.core.shown import shortened
from mpqsearch.errors import shown

if TYPE_CHECKING:
    from mpqsearch.core import LayerTable, SensitivityProfile, StudyRecord

_NUMBER = re.compile(r"[-+]?\d|nan|inf")
"""How the cells of a column of numbers begin."""

_BLOCKS = "▁▂▃▄▅▆▇█"


def print_json(data: Any) -> None:
    """Plain data as indented JSON."""
    print(json.dumps(data, indent=1, default=str))


def print_lines(lines: Sequence[Any], *, as_json: bool) -> None:
    """Written files, one a line."""
    if as_json:
        print_json([str(line) for line in lines])
        return
    for line in lines:
        print(shown(str(line)))


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table as wide as the terminal, each row by the names of its columns; columns of numbers to the right, of words
    to the left.

    No word and no number is broken: where the terminal is too narrow, long names are shortened in the middle, and then
    columns at the end are left out, which is said.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a pipe has no width of its own: wide enough for other programs to read whole cells
        console = Console(width=200)
    columns = {name: [shown(str(row[name])) for row in rows] for name in (rows[0] if rows else ())}
    left_out, whole, columns = [], columns, _shorter(columns, console.width)
    while _breadth(columns) > console.width and len(columns) > 1:
        left_out.append(whole.popitem()[0])
        columns = _shorter(whole, console.width)
    table, widths = Table(), _widths(columns, console.width)
    for i, (name, cells) in enumerate(columns.items()):
        justify: Literal["left", "right"] = "right" if i > 0 and _numbers(cells) else "left"
        table.add_column(name, justify=justify, overflow="fold", width=widths[name])
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, row))  # names may hold brackets, which rich reads
    console.print(title, style="italic", markup=False, highlight=False)
    console.print(table)
    if left_out:
        names = ", ".join(reversed(left_out))
        console.print(f"Not shown, for want of room: {names}. A wider terminal or --json has them.", highlight=False)


SHORT = 32
"""Characters of a name that are left, where there is too little room."""


def _shorter(columns: Mapping[str, list[str]], room: int) -> dict[str, list[str]]:
    """Columns whose longest words are shortened until their table fits, to `SHORT` characters at most."""
    for longest in range(room, SHORT - 1, -1):
        short = {
            name: [" ".join(shortened(word, longest) for word in cell.split(" ")) for cell in cells]
            for name, cells in columns.items()
        }
        if _breadth(short) <= room:
            break
    return short


def _numbers(cells: Sequence[str]) -> bool:
    return all(_NUMBER.match(cell) for cell in cells if cell not in ("", "-"))


def _least(name: str, cells: Sequence[str]) -> int:
    """The least width of a column that breaks no word and no number."""
    whole = cells if _numbers(cells) else [word for cell in cells for word in cell.split()]
    return max(map(len, (*name.split(), *whole)), default=0)


def _widths(columns: Mapping[str, Sequence[str]], room: int) -> dict[str, int]:
    """The width of each column: its least, and what is left of the room, those first that want little."""
    widths, room = {name: _least(name, cells) for name, cells in columns.items()}, room - _breadth(columns)
    wanted = {name: max(map(len, (name, *cells))) - widths[name] for name, cells in columns.items()}
    for name in sorted(wanted, key=lambda name: wanted[name]):
        more = max(0, min(wanted[name], room))
        widths[name], room = widths[name] + more, room - more
    return widths


def _breadth(columns: Mapping[str, Sequence[str]]) -> int:
    """The least width of a table with its rules."""
    return sum(_least(name, cells) + 3 for name, cells in columns.items()) + 1


def number(value: float | None, form: str) -> str:
    """A number in the notation ``form``; ``-`` where there is none."""
    return "-" if value is None or value != value else format(value, form)


def spark(values: Sequence[float], low: float, high: float) -> str:
    """One block a value, ``low`` the smallest block and ``high`` the tallest; a dot where there is no number."""
    span = high - low or 1.0
    return "".join("·" if v != v else _BLOCKS[min(7, max(0, round(7 * (v - low) / span)))] for v in values)


def bar(share: float, width: int = 24) -> str:
    """A horizontal bar of ``share``, 0..1, in eighths of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def print_fields(title: str, fields: Mapping[str, Any]) -> None:
    """A small record, a line a field; nested records are folded into one line."""
    folded = {
        key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        for key, value in fields.items()
    }
    print_table(title, [{"what": key, "value": value} for key, value in folded.items()])


def print_profile(table: LayerTable, measured: SensitivityProfile) -> None:
    """The most sensitive layers of a profile, the channels with the heaviest tails, and what measuring cost.

    ``mean shift``: the largest share of output error that a bias takes off, over the widths. ``rel. error``: of the
    loss, from probes.
    """
    from mpqsearch.report.profile import profile_summary

    found = profile_summary(measured, table)
    rows = []
    for row in found.layers:
        no_bias = "" if row.mean_shift is None or table[row.name].has_bias else " (no bias)"
        losses = {f"{bits} bit": f"{loss:.3g}" for bits, loss in zip(measured.widths, row.losses, strict=True)}
        rows.append(
            {
                "layer": row.name,
                "role": row.role,
                **losses,
                "max kurtosis": number(row.kurtosis, ".1f"),
                "mean shift": number(row.mean_shift, ".0%") + no_bias,
                "rel. error": number(row.relative_error, ".0%"),
            }
        )
    print_table(f"most sensitive layers ({found.label})", rows)
    if "kurtosis" in measured.arrays:
        print_table(
            f"kurtosis outliers: {found.n_outliers} of {len(measured.arrays['kurtosis'])} channels above "
            f"{found.outlier_limit:.1f}",
            [
                {
                    "layer": name,
                    "channel": channel,
                    "kurtosis": f"{value:.1f}",
                    "times the layer's median": f"{ratio:.1f}",
                }
                for name, channel, value, ratio in found.outliers
            ],
        )
    if found.spent:
        print_fields("time and memory", found.spent)


def print_records(records: list[StudyRecord], *, as_json: bool) -> None:
    """Evaluated points."""
    if as_json:
        print_json([r.to_data() for r in records])
        return
    if not records:
        return
    order = ("fd_fp", "fd_data", "paired_psnr", "class_accuracy", "attributes_recognised", "clip_score")
    keys = [k for k in order if any(k in r.metrics for r in records)] or ["paired_mse"]
    rows = []
    for r in records:
        cells = {
            "budget": r.budget,
            "method": r.method,
            "bits": f"{r.average_bits:.3f}",
            "kB": f"{r.size_bytes / 1000:.1f}",
        }
        shown = {k: r.metrics[k] for k in keys if k in r.metrics}
        rows.append(cells | {k: f"{m.value:.3f} ± {m.high - m.value:.3f}" if (m := shown.get(k)) else "" for k in keys})
    print_table(f"{records[0].model}: {records[0].n_samples} samples, seeds {records[0].seeds}", rows)
