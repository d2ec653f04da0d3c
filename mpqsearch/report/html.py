"""The report: one HTML file that needs nothing else, and the same figures and numbers as files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mpqsearch._version import __version__
from mpqsearch.artifacts import write_text
from mpqsearch.core import MetricValue, StudyRecord
from mpqsearch.pareto import FULL_PRECISION_METHOD, METRICS, ParetoFront
from mpqsearch.report.breakdown import breakdown_rows, export_rows
from mpqsearch.report.content import ReportContent
from mpqsearch.report.drawings import Drawing, all_drawings
from mpqsearch.report.figures import data_uri, render, save_figure
from mpqsearch.report.front import METRIC_TITLES
from mpqsearch.report.grids import SampleGrid, difference_strip, png_bytes, sample_strip
from mpqsearch.report.hover import Spot, spots
from mpqsearch.report.search import arms_table
from mpqsearch.report.style import darkened
from mpqsearch.report.tables import standings, write_pareto_csv, write_pareto_json

TEMPLATE = "report.html.j2"

_DECIMALS = {
    "fd_data": 3,
    "fd_fp": 3,
    "kid_data": 5,
    "kid_fp": 5,
    "paired_psnr": 2,
    "paired_mse": 5,
    "class_accuracy": 3,
}

_HEADINGS = {
    "fd_data": "FD to data",
    "fd_fp": "FD to full precision",
    "kid_data": "KID to data",
    "kid_fp": "KD to full precision",
    "paired_psnr": "PSNR, dB",
    "paired_mse": "Squared error",
    "class_accuracy": "Right class",
}
"""Short names for the heads of columns; the list of metrics says what they are in full."""


def build_report(folder: Path, content: ReportContent, inputs: Mapping[str, str] | None = None) -> list[Path]:
    """Write ``pareto.csv``, ``pareto.json``, ``figures/*.png|svg`` and last ``report.html`` into ``folder``; returns
    the paths.

    Each file is written atomically, so an interrupted report leaves whole files. ``inputs`` are digests for the
    envelope of the JSON. Works with any part of the content missing but the records.
    """
    csv, json_path, page = folder / "pareto.csv", folder / "pareto.json", folder / "report.html"
    write_pareto_csv(csv, content.records)
    write_pareto_json(json_path, content.records, inputs)
    drawings = all_drawings(content)
    paths = [csv, json_path]
    pictures: dict[str, dict[str, str]] = {}
    hot: list[Spot] = []
    for drawing in drawings:
        figure = render(drawing.draw)
        files = save_figure(figure, folder / "figures" / drawing.key)
        if drawing.section == "front":
            hot = spots(
                figure.axes[0], content.records, drawing.key.removeprefix("front_"), content.table, content.point_maps
            )
        paths += files
        if drawing.in_page:
            svg = files[1].read_bytes()
            pictures[drawing.key] = {"light": data_uri(svg, "svg"), "dark": data_uri(darkened(svg), "svg")}
    write_text(page, render_page(content, drawings, pictures, hot))
    return [*paths, page]


def render_page(
    content: ReportContent,
    drawings: Sequence[Drawing],
    pictures: Mapping[str, Mapping[str, str]],
    hot: Sequence[Spot] = (),
) -> str:
    """The HTML text. ``pictures`` maps the key of a drawing to its ``light`` and ``dark`` data addresses; ``hot`` are
    the points of the front that answer to the pointer."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mpqsearch.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain_heading"] = _plain_heading
    shown = [d for d in drawings if d.key in pictures]
    return environment.get_template(TEMPLATE).render(
        title=content.title,
        version=__version__,
        facts=_facts(content),
        labels=_labels(content.records),
        notes=list(content.notes),
        points=_points_table(content.records),
        spots=hot,
        figures={section: [d for d in shown if d.section == section] for section in {d.section for d in shown}},
        pictures=pictures,
        grids=[_grid(g) for g in content.grids],
        breakdown=_breakdown(content),
        correlations=_plain_table(content.correlations),
        exports=export_rows(content.exports),
        search_error=content.search["error"] if content.search is not None else "",
        searched=_plain_table(arms_table(content.search)) if content.search is not None else None,
        provenance=_provenance(content),
        config=content.config,
        command=content.command,
    )


def _facts(content: ReportContent) -> list[tuple[str, str]]:
    """What was measured, for the first screen."""
    records = content.records
    quantized = [r for r in records if r.method != FULL_PRECISION_METHOD]
    methods = list(dict.fromkeys(r.method for r in quantized))
    facts = [("Model", ", ".join(dict.fromkeys(r.model for r in records)) or "none")]
    if content.table is not None:
        table = content.table
        layers = f"{table.n_weights:,} in {len(table)} weight layers with {table.n_channels:,} output channels"
        facts.append(("Parameters", f"{table.n_parameters:,} in all; {layers}"))
    facts.append(("Samples per point", _span([r.n_samples for r in records])))
    facts.append(("Seeds", ", ".join(dict.fromkeys(r.seeds for r in records)) or "none"))
    budgets = len({r.budget for r in quantized})
    facts.append(("Methods", f"{', '.join(methods)} at {budgets} budget{'' if budgets == 1 else 's'}"))
    if content.policy is not None:
        facts.append(("Policy", content.policy.describe()))
    if content.chosen is not None:
        facts.append(("Chosen", _chosen_words(content.chosen, quantized)))
    return facts


def _chosen_words(chosen: StudyRecord, records: Sequence[StudyRecord]) -> str:
    """The chosen point in a sentence, beside the uniform map of its budget."""
    uniform = next((r for r in records if r.method == "uniform" and r.budget == chosen.budget), None)
    words = [f"{chosen.method}: {chosen.average_bits:.3f} bits a parameter, {chosen.size_bytes / 1000:.1f} kB"]
    for name, title, unit in (("fd_fp", _HEADINGS["fd_fp"], ""), ("paired_psnr", "PSNR", " dB")):
        if name in chosen.metrics:
            beside = f" (uniform: {_plain(name, uniform)})" if uniform is not None and name in uniform.metrics else ""
            words.append(f"{title} {_plain(name, chosen)}{unit}{beside}")
    return "; ".join(words)


def _plain(name: str, record: StudyRecord) -> str:
    return f"{record.metrics[name].value:.{_DECIMALS[name]}f}"


def _span(values: Sequence[int]) -> str:
    if not values:
        return "none"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _labels(records: Sequence[StudyRecord]) -> list[dict[str, str]]:
    """Each metric with the label that its values carry, its reference and its kind of interval."""
    rows = []
    for name in _metrics(records):
        values: list[MetricValue] = [r.metrics[name] for r in records if name in r.metrics]
        rows.append(
            {
                "title": METRIC_TITLES.get(name, name),
                "label": ", ".join(dict.fromkeys(v.name for v in values)),
                "reference": ", ".join(dict.fromkeys(v.reference for v in values)),
                "spread": ", ".join(dict.fromkeys(v.spread for v in values)),
                "better": "higher" if values[0].higher_is_better else "lower",
            }
        )
    return rows


def _metrics(records: Sequence[StudyRecord]) -> list[str]:
    found = {m for r in records for m in r.metrics}
    return [m for m in METRICS if m in found] + sorted(found - set(METRICS))


def _points_table(records: Sequence[StudyRecord]) -> dict[str, Any]:
    """Headings and rows of the table of points: every cell has a text, a value to sort by, and a mark."""
    metrics = _metrics(records)
    marks = {m: standings(records, m) for m in metrics}
    on_front = {id(r) for r in ParetoFront.from_records(records, "fd_fp").front}
    varying = len({r.n_samples for r in records}) > 1  # else the first screen says it once
    rows = []
    for i, record in enumerate(records):
        cells = [
            {
                "text": record.method,
                "sort": record.method,
                "mark": "front" if id(record) in on_front else "",
                "range": "",
            },
            _cell(record.granularity, record.granularity),
            _cell(record.budget, record.budget),
            _cell(_number(record.average_bits, 3), record.average_bits),
            _cell(_number(record.size_bytes / 1000, 1), record.size_bytes),
            _cell(_number(record.act_bits, 1), record.act_bits),
        ]
        cells += [_metric_cell(record.metrics.get(m), m, marks[m][i]) for m in metrics]
        cells += [_cell(f"{record.n_samples:,}", record.n_samples)] if varying else []
        cells.append(_cell(_number(record.seconds, 1), record.seconds))
        rows.append({"cells": cells, "full": record.method == FULL_PRECISION_METHOD})
    headings = [
        ("Method", "text"),
        ("Widths per", "text"),
        ("Budget", "text"),
        ("Bits stored", "number"),
        ("kB stored", "number"),
        ("Act. bits", "number"),
        *((_HEADINGS.get(m, m), "number") for m in metrics),
        *([("Samples", "number")] if varying else []),
        ("Seconds", "number"),
    ]
    return {"headings": headings, "rows": rows}


def _cell(text: str, sort: Any) -> dict[str, Any]:
    return {"text": text, "sort": sort, "mark": "", "range": ""}


def _metric_cell(value: MetricValue | None, metric: str, mark: str) -> dict[str, Any]:
    if value is None:
        return _cell("", "")
    places = _DECIMALS.get(metric, 4)
    return {
        "text": _number(value.value, places),
        "sort": value.value,
        "mark": mark,
        "range": f"{_number(value.low, places)} – {_number(value.high, places)}" if value.low == value.low else "",
    }


def _number(value: float, places: int) -> str:
    """Fixed decimals, or three digits in scientific form where these would show nothing but zeros."""
    if value != value:
        return ""
    if value and abs(value) < 10**-places:
        return f"{value:.2e}"
    return f"{value:,.{places}f}"


def _grid(grid: SampleGrid) -> dict[str, Any]:
    rows = []
    for label, images in grid.rows:
        difference = None if images is grid.reference else data_uri(png_bytes(difference_strip(grid, label)), "png")
        rows.append(
            {"label": label, "samples": data_uri(png_bytes(sample_strip(images)), "png"), "difference": difference}
        )
    return {"title": grid.title, "rows": rows, "gain": f"{grid.gain:g}", "columns": len(grid.reference)}


def _breakdown(content: ReportContent) -> dict[str, Any] | None:
    if content.table is None or not content.maps:
        return None
    return breakdown_rows(content.table, content.maps, content.policy, content.storage)


def _plain_heading(column: str) -> tuple[str, str]:
    return column, "text"


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    columns = list(rows[0])
    texts = [[f"{r[c]:.3f}" if isinstance(r.get(c), float) else str(r.get(c, "")) for c in columns] for r in rows]
    return {"columns": columns, "rows": texts}


def _provenance(content: ReportContent) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.environment.items():
        if isinstance(value, Mapping):
            rows += [(str(k), str(v)) for k, v in value.items()]
        else:
            rows.append((str(key), str(value)))
    rows += [(f"digest of {name}", digest) for name, digest in content.digests.items()]
    rows += [(f"seconds for {stage}", f"{seconds:.1f}") for stage, seconds in content.seconds.items()]
    return rows
