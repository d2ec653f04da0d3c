"""The report: one HTML file that needs nothing else, and the same figures and numbers as files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from mpqsearch._version import __version__
from mpqsearch.artifacts import write_text
from mpqsearch.core import MetricValue, StudyRecord
from mpqsearch.pareto import FULL_PRECISION_METHOD, ParetoFront, main_metric, shown_metrics
from mpqsearch.report.breakdown import breakdown_rows, export_rows
from mpqsearch.report.content import ReportContent
from mpqsearch.report.drawings import all_drawings
from mpqsearch.report.figures import Drawing, data_uri, render, save_figure
from mpqsearch.report.grids import GAP, SampleGrid, difference, grid_folder, page_scale, save_samples, strip_picture
from mpqsearch.report.hover import Spot, spots
from mpqsearch.report.labels import metric_text, number, slug
from mpqsearch.report.layers import heat_maps, layers_table
from mpqsearch.report.prediction import prediction_note
from mpqsearch.report.search import arms_table, search_notes
from mpqsearch.report.style import darkened
from mpqsearch.report.table import Cell, Table, plain_table, table_of
from mpqsearch.report.tables import standings, write_pareto_csv, write_pareto_json
from mpqsearch.specs.distill import TRAINED

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A drawing on the page: ``light`` and ``dark`` are data addresses, ``spots`` the points that answer to the
    pointer."""

    drawing: Drawing
    light: str
    dark: str
    spots: Sequence[Spot] = ()


def build_report(folder: Path, content: ReportContent, inputs: Mapping[str, str] | None = None) -> list[Path]:
    """Write ``pareto.csv``, ``figures/*.png|svg``, samples that the page shows reduced, ``report.html`` and last
    ``pareto.json``, which says that all are whole, into ``folder``; returns the paths.

    Each file is written atomically, so an interrupted report leaves whole files. ``inputs`` are digests for the
    envelope of the JSON. Works with any part of the content missing but the records.
    """
    csv, json_path, page = folder / "pareto.csv", folder / "pareto.json", folder / "report.html"
    write_pareto_csv(csv, content.records)
    paths, pictures = [csv], []
    for drawing in all_drawings(content):
        figure = render(drawing.draw)
        png, svg = save_figure(figure, folder / "figures" / drawing.key)
        paths += [png, svg]
        if not drawing.in_page:
            continue
        points: Sequence[Spot] = ()
        if drawing.section == "front":
            metric = drawing.key.removeprefix("front_")
            points = spots(figure.axes[0], content.records, metric, content.table, content.point_maps)
        light = svg.read_bytes()
        dark = data_uri(darkened(light), "svg+xml")
        pictures.append(Picture(drawing=drawing, light=data_uri(light, "svg+xml"), dark=dark, spots=points))
    if page_scale(content.grids) < 1:
        paths += [path for grid in content.grids for path in save_samples(folder / "figures", grid)]
    write_text(page, render_page(content, pictures))
    paths.append(page)
    write_pareto_json(json_path, content.records, inputs, paths)
    return [*paths, json_path]


def render_page(content: ReportContent, pictures: Sequence[Picture]) -> str:
    """The HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mpqsearch.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections: dict[str, list[Picture]] = {}
    for picture in pictures:
        sections.setdefault(picture.drawing.section, []).append(picture)
    sized = content.table is not None and content.maps
    search = content.search
    return environment.get_template(TEMPLATE).render(
        title=content.title,
        version=__version__,
        facts=_facts(content),
        metrics=_metric_facts(content.records),
        notes=list(content.notes),
        take=_take(content),
        points=_points_table(content.records),
        layers=_layers(content),
        pictures=sections,
        grids=[grid_on_page(g, page_scale(content.grids)) for g in content.grids],
        heat=_heat(content),
        breakdown=plain_table(breakdown_rows(content.table, content.maps, content.policy) if sized else ()),  # type: ignore[arg-type]
        correlations=plain_table(content.correlations),
        prediction=prediction_note(content.records),
        selections=plain_table(content.selections),
        exports=plain_table(export_rows(content.exports)),
        searched=None if search is None else plain_table(arms_table(search)),
        search_error="" if search is None else search["error"],
        search_notes=[] if search is None else search_notes(search),
        provenance=_provenance(content),
        config=content.config,
        command=content.command,
    )


def _facts(content: ReportContent) -> list[tuple[str, str]]:
    """What was measured, for the first screen."""
    records = content.records
    quantized = [r for r in records if r.method != FULL_PRECISION_METHOD]
    methods, budgets = (dict.fromkeys(getattr(r, k) for r in quantized) for k in ("method", "budget"))
    facts = [("Model", ", ".join(dict.fromkeys(r.model for r in records)) or "none")]
    if content.table is not None:
        table = content.table
        layers = f"{table.n_weights:,} in {len(table)} weight layers with {table.n_channels:,} output channels"
        facts.append(("Parameters", f"{table.n_parameters:,} in all; {layers}"))
    facts.append(("Samples per point", _span([r.n_samples for r in records])))
    facts.append(("Seeds", ", ".join(dict.fromkeys(r.seeds for r in records)) or "none"))
    facts.append(("Methods", f"{', '.join(methods)} at {len(budgets)} budget{'' if len(budgets) == 1 else 's'}"))
    if content.policy is not None:
        facts.append(("Policy", content.policy.describe()))
    return facts


def _layers(content: ReportContent) -> Table | None:
    if content.table is None or not content.maps:
        return None
    taken = (
        "" if content.chosen is None else f"{content.chosen.method.removesuffix(TRAINED)} at {content.chosen.budget}"
    )
    return layers_table(content.table, content.maps, content.profile, taken)


def _heat(content: ReportContent) -> dict[str, Any] | None:
    """The layers and what the heat map shows of them."""
    table = content.table
    if table is None or not (content.maps or content.profile):
        return None
    maps = list(heat_maps(table, content.maps, content.profile, content.format_name))
    return {"layers": [[la.name, la.role] for la in table], "maps": maps}


def _take(content: ReportContent) -> dict[str, Any] | None:
    """The chosen map, for the top of the page: its size, its quality beside that of the uniform map of its budget, its
    file and the command that exports it."""
    chosen = content.chosen
    if chosen is None:
        return None
    uniform = next((r for r in content.records if r.method == "uniform" and r.budget == chosen.budget), None)
    full = content.table.n_parameters * 2 if content.table is not None else 0
    share = f", {chosen.size_bytes / full:.0%} of the {full / 1000:,.1f} kB at 16 bits" if full else ""
    facts = [
        ("Map", f"{chosen.method} at {chosen.budget}"),
        ("Size", f"{chosen.size_bytes / 1000:,.1f} kB, {chosen.average_bits:.3f} bits a parameter{share}"),
    ]
    for metric in ("fd_fp", "paired_psnr", "clip_score", "attributes_recognised", "class_accuracy"):
        if metric in chosen.metrics:
            beside = f" (uniform: {_value(uniform, metric)})" if uniform and metric in uniform.metrics else ""
            facts.append((metric_text(metric).title, f"{_value(chosen, metric)}{metric_text(metric).unit}{beside}"))
    return {"facts": facts, "file": content.chosen_file, "command": content.export_command}


def _value(record: StudyRecord, metric: str) -> str:
    return number(record.metrics[metric].value, metric_text(metric).places)


def _span(values: Sequence[int]) -> str:
    if not values:
        return "none"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _metric_facts(records: Sequence[StudyRecord]) -> list[dict[str, str]]:
    """Each metric with the label that its values carry, its reference and its kind of interval."""
    facts = []
    for name in shown_metrics(records):
        values = [r.metrics[name] for r in records if name in r.metrics]
        texts = {k: ", ".join(dict.fromkeys(getattr(v, k) for v in values)) for k in ("name", "reference", "spread")}
        better = "higher" if values[0].higher_is_better else "lower"
        facts.append({"title": metric_text(name).title, "better": better, **texts})
    return facts


def _points_table(records: Sequence[StudyRecord]) -> Table:
    """Every point, budget by budget. A column that says the same in every row, once in the facts, is left out."""
    budgets = list(dict.fromkeys(r.budget for r in records))
    records = sorted(records, key=lambda r: budgets.index(r.budget))
    front = {id(r) for r in ParetoFront.from_records(records, main_metric(records)).front}
    columns: dict[tuple[str, str], list[Cell]] = {
        ("Method", "text"): [Cell(r.method, r.method, "front" if id(r) in front else "") for r in records],
        ("Budget", "text"): [Cell(r.budget, i) for i, r in enumerate(records)],
        ("Widths per", "text"): [Cell(r.granularity, r.granularity) for r in records],
        ("Bits stored", "number"): [Cell(number(r.average_bits, 3), r.average_bits) for r in records],
        ("kB stored", "number"): [Cell(number(r.size_bytes / 1000, 1), r.size_bytes) for r in records],
    }
    if any(r.act_bits < 16 for r in records):
        columns["Act. bits", "number"] = [Cell(number(r.act_bits, 1), r.act_bits) for r in records]
    for metric in shown_metrics(records):
        marks = standings(records, metric)
        columns[metric_text(metric).heading, "number"] = [
            _metric_cell(r.metrics.get(metric), metric, mark) for r, mark in zip(records, marks, strict=True)
        ]
    if len({r.n_samples for r in records}) > 1:
        columns["Samples", "number"] = [Cell(f"{r.n_samples:,}", r.n_samples) for r in records]
    columns["Seconds", "number"] = [Cell(f"{r.seconds:,.1f}", r.seconds) for r in records]
    return table_of(columns)


def _metric_cell(value: MetricValue | None, metric: str, mark: str) -> Cell:
    if value is None:
        return Cell("", "")
    places = metric_text(metric).places
    bounded = value.low == value.low and value.high == value.high
    interval = f"{number(value.low, places)} – {number(value.high, places)}" if bounded else ""
    return Cell(number(value.value, places), value.value, mark, interval)


def grid_on_page(grid: SampleGrid, scale: float) -> dict[str, Any]:
    """What the template needs to know of a grid whose samples are reduced by ``scale``."""
    rows = [
        {
            "label": label,
            "samples": data_uri(*strip_picture(images, scale)),
            "difference": "" if images is grid.reference else data_uri(*strip_picture(difference(grid, label), scale)),
            "file": f"figures/{grid_folder(grid)}/{slug(label)}-" if scale < 1 else "",
        }
        for label, images in grid.rows.items()
    ]
    n, height, width = grid.reference.shape[:3]
    return {
        "title": grid.title,
        "rows": rows,
        "columns": n,
        "captions": grid.captions,
        "names": [_sample_name(grid, i) for i in range(n)],
        "breadth": round(100 * (n * width + (n - 1) * GAP) / width, 3),
        "shape": f"{width} / {height}",
        "size": f"{width} × {height}",
        "exact": scale == 1,
    }


def _sample_name(grid: SampleGrid, i: int) -> str:
    """Number, seed and caption of a sample, as far as they are known."""
    seed = f", seed {grid.first_seed + i}" if grid.first_seed is not None else ""
    return f"Sample {i + 1}{seed}{': ' + grid.captions[i] if grid.captions else ''}"


def _provenance(content: ReportContent) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.environment.items():
        rows += [(str(k), str(v)) for k, v in (value.items() if isinstance(value, Mapping) else [(key, value)])]
    rows += [(f"digest of {name}", digest) for name, digest in content.digests.items()]
    rows += [(f"seconds for {stage}", f"{seconds:.1f}") for stage, seconds in content.seconds.items()]
    return rows
