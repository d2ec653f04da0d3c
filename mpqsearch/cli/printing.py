"""Results on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpqsearch.untrusted import shown

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
    to the left."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0] if rows else ()):
        numbers = i > 0 and all(_NUMBER.match(str(row[name])) for row in rows if str(row[name]) not in ("", "-"))
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(shown(str(cell))) for cell in row.values()))  # names may hold brackets, which rich reads
    console = Console()
    # A pipe has no width of its own: wide enough that no cell is folded, so that other programs can read it.
    (console if console.is_terminal else Console(width=200)).print(table)


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
        cells = {
            "layer": row.name,
            "role": row.role,
            "max kurtosis": number(row.kurtosis, ".1f"),
            "mean shift": number(row.mean_shift, ".0%") + no_bias,
            "rel. error": number(row.relative_error, ".0%"),
        }
        rows.append(
            cells | {f"{bits} bit": f"{loss:.3g}" for bits, loss in zip(measured.widths, row.losses, strict=True)}
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
