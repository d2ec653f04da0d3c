"""The card of an export: ``README.md`` in its folder, as hubs read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch._version import __version__
from mpqsearch.core import FULL_PRECISION, MetricValue
from mpqsearch.errors import shown
from mpqsearch.pareto import DROP
from mpqsearch.prompts import Prompts
from mpqsearch.sources import denoiser_folders, local_folder, model_name
from mpqsearch.stages.base import Run
from mpqsearch.stages.discovering import layers
from mpqsearch.stages.references import SHOWN, file_key, full_precision, full_record, key_frames

if TYPE_CHECKING:
    from mpqsearch.export import Target

CARD = "README.md"
"""What a person reads first in the folder of an export."""

CAPTIONED = 5
"""Samples with prompts that the card shows; without prompts `SHOWN`."""


def cards(run: Run) -> list[Path]:
    """Write the cards of all exports of a run again, from what the run folder holds."""
    from mpqsearch.export import get_exporter

    layers(run)
    written = []
    for stamp in sorted(run.path("export").glob("*.json")):
        data = artifacts.read_json(stamp, "mpqsearch/export").data
        if data["delivered"]:
            written.append(write_card(run, get_exporter(data["target"]), data, stamp.with_suffix("")))
    return written


def write_card(run: Run, target: Target, data: Mapping[str, Any], folder: Path) -> Path:
    """Write the card of the export in a folder, with pictures beside it; its faults come first.

    ``data`` is what ``export/<target>@<budget>.json`` holds: bytes, and measured quality with intervals and samples.
    """
    found = data["delivered"]
    manifest = artifacts.read_json(folder / "export.json", "mpqsearch/export").data
    metrics = {key: MetricValue(**value) for key, value in found["metrics"].items()}
    not_measured = found["not_measured"]
    parts = [
        _front_matter(run, target.name),
        f"# {run.table.model} for {target.name}",
        *(f"**{fault[0].upper()}{fault[1:]}.**" for fault in found["faults"]),
        _sizes(data),
        f"What this file delivers was not measured: {not_measured}." if not_measured else _quality(run, metrics, found),
        _samples(run, manifest["files"], folder) if metrics else "",
        _layers(run, manifest["plan"]),
        _block("How to load it", "python", loading(run, target, folder)),
        _block(f"How it was made (mpqsearch {__version__})", "bash", _command(run, data)),
        _table(("file", "SHA-256"), sorted(manifest["files"].items())),
    ]
    artifacts.write_text(folder / CARD, "\n\n".join(filter(None, parts)) + "\n")
    return folder / CARD


def _front_matter(run: Run, target: str) -> str:
    source = run.config.model.source
    of_a_hub = run.given is None and local_folder(source) is None and "/" in source
    prompts = _prompts(run)
    kind = "text-to-image" if prompts is not None and prompts.has_text else "unconditional-image-generation"
    entries = {
        "base_model": source if of_a_hub else run.table.model if run.given is not None else model_name(source),
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "pipeline_tag": kind,
        "tags": f"[quantized, mixed-precision, mpqsearch, {target}]",
    }
    return "\n".join(["---", *(f"{key}: {value}" for key, value in entries.items()), "---"])


def _prompts(run: Run) -> Prompts | None:
    """Those of the study, or those that came with the model."""
    return run.prompts or getattr(run.denoiser.runner, "prompts", None)


def _sizes(data: Mapping[str, Any]) -> str:
    found = data["delivered"]
    whole = found["stored_bytes"] + found["header_bytes"]
    rows = [
        ("map", data["map"]),
        ("bytes of the file", f"{whole:,} ({found['header_bytes']:,} of names and shapes)"),
        ("bytes of the model it was made from", f"{found['source_bytes']:,}"),
        ("of these", f"{whole / found['source_bytes']:.1%}"),
    ]
    if found["budget_bytes"] is not None:
        rows.append(("budget", f"{found['budget']}: {found['budget_bytes']:,} bytes"))
    return _table(("what", "value"), rows)


def _quality(run: Run, metrics: Mapping[str, MetricValue], found: Mapping[str, Any]) -> str:
    """Every metric of full precision and of the file, and how much of a score is left."""
    full = full_record(run).metrics
    rows = [
        (value.name, _text(full.get(key)), _text(value), _recovery(full.get(key), metrics.get(key + DROP)))
        for key, value in metrics.items()
        if not key.endswith(DROP)
    ]
    if (uniform := found["uniform"]) is not None:
        size = f"{uniform['stored_bytes'] + uniform['header_bytes']:,} bytes"
        name = f"{metrics['paired_mse'].name}, {uniform['choice']} in every layer ({size})"
        rows.append((name, "", _text(MetricValue(**uniform["error"])), ""))
    c, prompts = run.config.evaluate, _prompts(run)
    asked = "" if prompts is None else f" of prompts {prompts.digest[:12]}"
    seeds = f"seeds {c.first_seed} to {c.first_seed + c.samples - 1}"
    runner = repr(run.denoiser.runner).replace(f", {prompts!r}", "")  # which `asked` names
    said = (
        f"{c.samples} samples{asked}, {seeds}, by {runner}. Intervals are 95 %, from a bootstrap over "
        "samples; that of a recovery is of the differences on the same noise."
    )
    return _table(("metric", "full precision", "this", "recovery"), rows) + f"\n\n{said}"


def _text(value: MetricValue | None) -> str:
    if value is None:
        return ""
    return f"{value.value:.4g} ({value.low:.4g} to {value.high:.4g}), {value.n_samples} samples"


def _recovery(full: MetricValue | None, lost: MetricValue | None) -> str:
    """What is left of a score that is better when it is higher, in per cent of full precision."""
    if full is None or lost is None or not full.higher_is_better or full.value <= 0:
        return ""
    value, low, high = (1 - part / full.value for part in (lost.value, lost.high, lost.low))
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _samples(run: Run, files: Mapping[str, str], folder: Path) -> str:
    """Write the first samples of full precision and of the file, and refer to them."""
    from mpqsearch.report import sample_grid
    from mpqsearch.report.grids import page_scale, strip_picture

    full = full_precision(run).read(0, SHOWN)
    kept = run.path("stats", f"{file_key(run, files)[:16]}.npz")
    if full.images is None or not kept.is_file():
        return ""
    prompts = [label for label in full.labels if isinstance(label, str)]
    n = CAPTIONED if prompts else SHOWN
    rows = {"full precision": key_frames(full.images)[:n].numpy(), "this": artifacts.read_arrays(kept)["images"][:n]}
    grid = sample_grid("card", rows, columns=n)
    lines = [f"Samples of the seeds {', '.join(map(str, full.seeds[:n]))}: full precision above, this file below."]
    for label, images in grid.rows.items():
        picture, kind = strip_picture(images, page_scale([grid]))
        name = f"samples-{label.replace(' ', '-')}.{kind}"
        with artifacts.atomic_write(folder / name) as handle:
            handle.write(picture)
        lines.append(f"![{label}]({name})")
    return "\n\n".join([*lines, "\n".join(f"{i}. {shown(text)}" for i, text in enumerate(prompts[:n], 1))]).rstrip()


def _layers(run: Run, plan: Sequence[Mapping[str, Any]]) -> str:
    """What is quantized to what, and what is kept."""
    weights = {layer.name: layer.n_weights for layer in run.table}
    counts, sizes = Counter[str](), Counter[str]()
    for entry in plan:
        bits = entry["will_get"]
        stored = entry["choice"] or ("by channel" if bits is None else f"{bits} bits")
        name = "full precision" if bits == FULL_PRECISION else stored
        counts[name] += 1
        sizes[name] += weights[entry["layer"]]
    rows = [(name, f"{counts[name]:,}", f"{size:,}") for name, size in sizes.most_common()]
    kept = Counter[str]()
    for parameter in run.table.kept:
        kept[parameter.reason] += parameter.n_values
    rows += [(f"full precision: {reason}", "", f"{n:,}") for reason, n in kept.most_common()]
    return _table(("stored as", "layers", "values"), rows)


def _command(run: Run, data: Mapping[str, Any]) -> str:
    study = run.path("config.toml").as_posix()
    return f"mpqsearch export -c {study} --target {data['target']} --budget {data['budget']}"


def loading(run: Run, target: Target, folder: Path) -> str:
    """Python that loads an export, into the pipeline that its model came from where that is a folder; empty where the
    target says nothing of it, or not of several parts."""
    from mpqsearch.models.runner import parts_of

    module, c = run.denoiser.module, run.config.model
    several = target.encoders and len(parts_of(module)) > 1
    if not target.loading or not (several or hasattr(module, "config")):  # or a module of the user's
        return ""
    code = target.loading.format(cls=type(module).__name__, folder=folder.as_posix())
    source = None if run.given is not None else local_folder(c.source)
    if source is None or not (source / "model_index.json").is_file():
        return code
    part, *_ = denoiser_folders(c.source, source, run.config.component).values()
    given = "**model" if several else f"{part.name}=model"
    return (
        f"{code}\n\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained(\n    {source.as_posix()!r}, {given}, "
        "torch_dtype=torch.float32\n)"  # as the model: text encoders come in the type that they are stored in
    )


def _block(title: str, language: str, text: str) -> str:
    return f"## {title}\n\n```{language}\n{text}\n```" if text else ""


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
