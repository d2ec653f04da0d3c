"""The stages of a run: load inputs, call the pure function, save outputs. The same command again continues.

Files of a run folder are described in the README. A stage whose output was made from the present inputs is reused, and one line
says so. Torch is imported only by the stages that need a model.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch import __version__, artifacts
from mpqsearch.config import Config
from mpqsearch.core import BitMap, Budget, LayerTable, MetricValue, SensitivityProfile, StudyRecord, average_bits
from mpqsearch.errors import ArtifactError, ConfigError, StaleArtifactError, UnknownNameError
from mpqsearch.methods import LOSSES, Allocation, MethodSpec, allocate, channel_losses

if TYPE_CHECKING:
    from mpqsearch.metrics import FeatureExtractor, Reference
    from mpqsearch.models import Denoiser

log = logging.getLogger("mpqsearch")

Say = Callable[[str], None]


@dataclass
class Run:
    """One run folder with its configuration: what the stages read and write."""

    config: Config
    folder: Path
    overwrite: bool = False
    dry_run: bool = False
    say: Say = field(default=lambda text: print(text, file=sys.stderr))  # noqa: T201
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model, loaded once."""
        from mpqsearch.models import load_model

        c = self.config.model
        return load_model(c.source, device=c.device, revision=c.revision)

    @property
    def source_inputs(self) -> dict[str, str]:
        """What identifies the model without loading it."""
        c = self.config.model
        return {"model_source": artifacts.digest_of([c.source, c.revision])}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of a block to the record of its stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def path(self, *parts: str) -> Path:
        """A path in the run folder."""
        return self.folder.joinpath(*parts)


def slug(method: str, budget: Budget) -> str:
    """Folder name of one allocation."""
    return f"{method}@{budget.label().replace(':', '-')}"


def start(run: Run) -> None:
    """Write the resolved configuration and the environment of this run."""
    if run.dry_run:
        return
    artifacts.write_text(run.path("config.toml"), run.config.to_toml())
    artifacts.write_json(run.path("environment.json"), "mpqsearch/environment", artifacts.environment(), {})


def layers(run: Run) -> LayerTable:
    """Discover the layers of the model, or reuse ``layers.json``."""
    path = run.path("layers.json")
    if artifacts.is_current(path, "mpqsearch/layers", run.source_inputs, overwrite=run.overwrite):
        run.say(f"layers: reused {path}")
        return artifacts.load_layers(path)
    if run.dry_run:
        run.say(f"layers: would discover the layers of {run.config.model.source}")
    from mpqsearch.models import discover

    table = discover(run.denoiser)
    run.config.policy.check(table)
    if not run.dry_run:
        artifacts.save_layers(path, table, run.source_inputs)
    run.say(
        f"layers: {len(table)} weight layers, {table.n_channels} output channels, {table.n_weights} weights; "
        f"{table.n_parameters - table.n_weights} other parameters stay at full precision"
    )
    unknown = [k.name for k in table.kept if k.reason.startswith("unknown")]
    if unknown:
        run.say(f"layers: kept at full precision because no quantizer here knows them: {', '.join(unknown)}")
    run.say(f"layers: policy: {run.config.policy.describe()}")
    return table


def profile_inputs(run: Run, table: LayerTable) -> dict[str, str]:
    """Digests of all that a profile depends on."""
    c = run.config.to_data()
    return {
        "model": table.digest,
        "calibration": artifacts.digest_of(c["calibration"]),
        "sampler": artifacts.digest_of(c["sampler"]),
        "quantizer": artifacts.digest_of(c["quantizer"]),
        "widths": artifacts.digest_of(sorted(run.config.policy.widths)),
    }


def profile(run: Run, table: LayerTable) -> SensitivityProfile | None:
    """Measure the model, or reuse ``profile.json``; None in a dry run that would have to measure."""
    path = run.path("profile.json")
    inputs = profile_inputs(run, table)
    if artifacts.is_current(path, "mpqsearch/profile", inputs, overwrite=run.overwrite):
        run.say(f"profile: reused {path}")
        return artifacts.load_profile(path)
    if run.dry_run:
        run.say(f"profile: would measure {len(table)} layers at {len(run.config.policy.widths)} widths")
        return None
    from mpqsearch.profile import CalibrationSpec

    _same_model(run, table)
    settings: Any = {f.name: getattr(run.config.calibration, f.name) for f in fields(run.config.calibration)}
    spec = CalibrationSpec(**settings)
    with run.timed("profile"), _bars() as progress:
        measured = _measure(run, table, spec, inputs, progress)
    artifacts.save_profile(path, measured, inputs)
    shutil.rmtree(run.path("partial"), ignore_errors=True)
    run.say(f"profile: written to {path} in {run.seconds['profile']:.0f} s")
    return measured


def _measure(run: Run, table: LayerTable, spec: Any, inputs: Mapping[str, str], progress: Any) -> SensitivityProfile:
    """Profile in two halves, each kept in ``partial/`` as it is finished, so that an interrupted run continues."""
    from mpqsearch.profile import final_errors, profile_base, with_final_errors

    fmt, sampler = run.config.quantizer.format(), _sampler(run)
    base_path, final_path = run.path("partial", "profile.json"), run.path("partial", "final.json")
    if artifacts.is_current(base_path, "mpqsearch/profile", inputs, overwrite=True):
        base = artifacts.load_profile(base_path)
        run.say(f"profile: continuing from {base_path.parent}")
    else:
        base = profile_base(run.denoiser, table, run.config.policy, sampler, spec, fmt, progress=progress)
        artifacts.save_profile(base_path, base, inputs)
    known = {}
    if artifacts.is_current(final_path, "mpqsearch/final-errors", inputs, overwrite=True):
        known = {(name, bits): value for name, bits, value in artifacts.read_json(final_path, "mpqsearch/final-errors").data}

    def keep(found: Mapping[tuple[str, int], float]) -> None:
        artifacts.write_json(final_path, "mpqsearch/final-errors", [[n, b, v] for (n, b), v in found.items()], inputs)

    found = final_errors(run.denoiser, table, base, sampler, spec, fmt, known=known, keep=keep, progress=progress)
    return with_final_errors(base, found)


def allocation(
    run: Run, table: LayerTable, measured: SensitivityProfile, method: MethodSpec, budget: Budget
) -> tuple[BitMap, dict[str, Any]]:
    """Solve one method at one budget, or reuse its folder. Returns the map and what ``allocation.json`` holds."""
    folder = run.path("allocations", slug(method.name, budget))
    c = run.config.to_data()
    inputs = profile_inputs(run, table) | {
        "method": artifacts.digest_of([m for m in c["methods"] if m["name"] == method.name]),
        "budget": artifacts.digest_of(budget.label()),
        "policy": artifacts.digest_of(c["policy"]),
    }
    path, map_path = folder / "allocation.json", folder / "bitmap.json"
    if artifacts.is_current(path, "mpqsearch/allocation", inputs, overwrite=run.overwrite):
        return artifacts.load_bit_map(map_path), artifacts.read_json(path, "mpqsearch/allocation").data
    with run.timed("allocate"):
        made = allocate(method, budget, table, measured, run.config.policy, run.config.quantizer.format())
    data = made.to_data()
    if not run.dry_run:
        _save_map(map_path, made, table, inputs)
        artifacts.write_json(path, "mpqsearch/allocation", data, inputs)
    return made.bit_map, data


def allocations(
    run: Run, table: LayerTable, measured: SensitivityProfile
) -> list[tuple[MethodSpec, Budget, BitMap, dict[str, Any]]]:
    """All methods at all budgets of the configuration."""
    out = []
    for budget in run.config.allocate.parsed():
        for method in run.config.methods:
            bit_map, data = allocation(run, table, measured, method, budget)
            out.append((method, budget, bit_map, data))
    run.say(f"allocate: {len(out)} maps in {run.path('allocations')}")
    return out


def evaluation_key(run: Run, table: LayerTable, bit_map: BitMap | None, *, bias_correction: bool) -> str:
    """Digest of everything that the samples of a map depend on: the same point is never evaluated twice."""
    c = run.config.to_data()
    parts: list[Any] = [
        __version__,
        table.digest,
        c["sampler"],
        c["evaluate"],
        bit_map.digest if bit_map is not None else "full precision",
    ]
    if bit_map is not None and (bias_correction or bit_map.format.prescale):
        parts += [bias_correction, profile_inputs(run, table)]  # input means and maxima come from the profile
    return artifacts.digest_of(parts)


def reference(run: Run, table: LayerTable, extractor: FeatureExtractor) -> tuple[Reference, StudyRecord]:
    """Full-precision samples with their features, cached, and their record."""
    import torch

    from mpqsearch.metrics import Reference, evaluate, load_reference
    from mpqsearch.sampling import labels_of, sample, to_uint8

    c = run.config.evaluate
    seeds = tuple(range(c.first_seed, c.first_seed + c.samples))
    key = evaluation_key(run, table, None, bias_correction=False)
    cache = run.path("stats", f"full-precision-{key[:16]}.npz")
    began = time.perf_counter()
    if cache.exists() and not run.overwrite:
        samples = torch.from_numpy(artifacts.read_arrays(cache)["samples"])
    else:
        _same_model(run, table)
        with run.timed("evaluate"), _bar("full precision", len(seeds)) as bar:
            samples = sample(run.denoiser, seeds, _sampler(run), tick=bar.update)
        artifacts.write_arrays(cache, {"samples": samples.numpy()})
    seconds = time.perf_counter() - began
    labels = labels_of(run.denoiser, seeds)
    base = Reference(
        samples=samples,
        features=extractor(to_uint8(samples)),
        seeds=seeds,
        labels=labels if isinstance(labels, torch.Tensor) else None,
        data=load_reference(Path(c.reference) if c.reference else None, extractor),
    )

    def measure() -> dict[str, Any]:
        found = evaluate(samples, base, extractor, is_reference=True)
        return {"seconds": seconds, "metrics": {k: v.to_data() for k, v in found.metrics.items()}}

    data, _ = artifacts.resumable(
        run.path("metrics", f"{key[:16]}.json"), "mpqsearch/metrics", {"evaluation": key}, measure, overwrite=run.overwrite
    )
    full = uniform_full_precision(table)
    record = StudyRecord(
        model=table.model,
        method="full-precision",
        granularity="model",
        target_bits=16.0,
        average_bits=average_bits(table, full),
        size_bytes=_bytes(table, full),
        act_bits=16.0,
        bit_map_digest=full.digest,
        n_samples=c.samples,
        seeds=f"{seeds[0]}..{seeds[-1]}",
        seconds=data["seconds"],
        predicted_loss=0.0,
        metrics={k: MetricValue(**m) for k, m in data["metrics"].items()},
    )
    return base, record


def evaluate_map(
    run: Run,
    table: LayerTable,
    measured: SensitivityProfile,
    base: Reference,
    extractor: FeatureExtractor,
    method: MethodSpec,
    budget: Budget,
    bit_map: BitMap,
    solved: Mapping[str, Any],
    bar: Any,
) -> StudyRecord:
    """Quantize, sample and measure one map, or reuse its metrics."""
    key = evaluation_key(run, table, bit_map, bias_correction=method.bias_correction)
    path = run.path("metrics", f"{key[:16]}.json")

    def measure() -> dict[str, Any]:
        from mpqsearch.metrics import evaluate
        from mpqsearch.sampling import sample, to_uint8

        _same_model(run, table)
        began = time.perf_counter()
        module = quantized_module(run, table, measured, bit_map, bias_correction=method.bias_correction)
        samples = sample(run.denoiser.with_module(module), base.seeds, _sampler(run), tick=bar.update)
        result = evaluate(samples, base, extractor)
        artifacts.write_arrays(
            run.path("stats", f"{key[:16]}.npz"), {"features": result.features.numpy(), "images": to_uint8(samples[:64]).numpy()}
        )
        return {"seconds": time.perf_counter() - began, "metrics": {k: v.to_data() for k, v in result.metrics.items()}}

    with run.timed("evaluate"):
        data, reused = artifacts.resumable(path, "mpqsearch/metrics", {"evaluation": key}, measure, overwrite=False)
    if reused:
        bar.update(len(base.seeds))
    return StudyRecord(
        model=table.model,
        method=method.name,
        granularity=method.granularity,
        target_bits=budget.limit,
        average_bits=average_bits(table, bit_map),
        size_bytes=_bytes(table, bit_map),
        act_bits=16.0,
        bit_map_digest=bit_map.digest,
        n_samples=len(base.seeds),
        seeds=f"{base.seeds[0]}..{base.seeds[-1]}",
        seconds=data["seconds"],
        predicted_loss=solved["predicted_loss"],
        metrics={k: MetricValue(**m) for k, m in data["metrics"].items()},
    )


def quantized_module(run: Run, table: LayerTable, measured: SensitivityProfile, bit_map: BitMap, *, bias_correction: bool) -> Any:
    """The fake-quantized copy of the run's model."""
    import torch

    from mpqsearch.quant import quantize_model

    means = {k: torch.from_numpy(np.array(v)) for k, v in measured.means.items()} if bias_correction else None
    input_max = {k: torch.from_numpy(np.array(v)) for k, v in measured.input_max.items()}
    return quantize_model(run.denoiser.module, table, bit_map, means=means, input_max=input_max).module


def evaluate(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[StudyRecord]:
    """Measure every map of the configuration, and the full-precision model."""
    maps = allocations(run, table, measured)
    if run.dry_run:
        keys = {evaluation_key(run, table, m, bias_correction=s.bias_correction): s for s, _, m, _ in maps}
        done = sum(run.path("metrics", f"{k[:16]}.json").exists() for k in keys)
        run.say(
            f"evaluate: {len(keys)} distinct maps of {run.config.evaluate.samples} samples; {done} reused, {len(keys) - done} to do"
        )
        return []
    from mpqsearch.metrics import load_extractor

    c = run.config.evaluate
    extractor = load_extractor(c.extractor, weights=Path(c.extractor_weights) if c.extractor_weights else None)
    base, full = reference(run, table, extractor)
    records = [full]
    with _bar("evaluate", len(maps) * c.samples) as bar:
        for method, budget, bit_map, solved in maps:
            bar.set_postfix_str(slug(method.name, budget))
            records.append(evaluate_map(run, table, measured, base, extractor, method, budget, bit_map, solved, bar))
    run.say(f"evaluate: {len(records) - 1} maps and full precision; metrics in {run.path('metrics')}")
    return records


def report(run: Run, table: LayerTable, measured: SensitivityProfile, records: list[StudyRecord], command: str = "") -> Path:
    """Write tables, figures and ``report.html``, or reuse them when nothing changed."""
    page = run.path("report.html")
    inputs = {
        "records": artifacts.digest_of([r.to_data() for r in records]),
        "config": artifacts.digest_of(run.config.to_data()),
        "profile": artifacts.digest_of(profile_inputs(run, table)),
    }
    path = run.path("pareto.json")
    # Metrics changed or not, a report is cheap and made of other artifacts only: a stale one is simply drawn again.
    if page.exists() and artifacts.is_current(path, "mpqsearch/pareto", inputs, overwrite=True):
        run.say(f"report: reused {page}")
        return page
    if run.dry_run:
        run.say(f"report: would draw {page}")
        return page
    from mpqsearch.report import ReportContent, build_report

    chosen = chosen_method(run, records)
    maps = {}
    for budget in run.config.allocate.parsed():
        maps[f"{chosen.name} at {budget.label()}"], _ = allocation(run, table, measured, chosen, budget)
    content = ReportContent(
        title=run.config.report.title or f"Bit allocation of {table.model}",
        records=records,
        table=table,
        policy=run.config.policy,
        maps=maps,
        profile=measured,
        variant=chosen.variant,
        grids=_grids(run, table, measured),
        correlations=rank_correlations(table, measured),
        environment=artifacts.environment(),
        config=run.config.to_toml(),
        command=command or shlex.join(["mpqsearch", *sys.argv[1:]]),
        digests={"model": table.digest, **inputs},
        seconds=run.seconds,
        notes=_notes(run, table, measured),
    )
    with run.timed("report"):
        build_report(run.folder, content, inputs)
    run.say(f"report: {page}")
    return page


def rank_correlations(table: LayerTable, measured: SensitivityProfile) -> list[dict[str, Any]]:
    """Spearman correlation over layers of every predictor with one-layer-at-a-time error of final samples, at each measured width."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for key in sorted(k for k in measured.arrays if k.startswith("layer_final_error/")):
        variant, final = key.split("/")[1], measured.arrays[key]
        searched = [i for i, name in enumerate(measured.names) if table[name].macs]
        for j, bits in enumerate(measured.widths):
            if not np.isfinite(final[searched, j]).all():
                continue
            truth = pd.Series(final[searched, j]).rank()
            for loss in LOSSES[:-1]:
                totals = measured.layer_sum(channel_losses(measured, table, variant, loss, bias_correction=True))
                value = pd.Series(totals[searched, j]).rank().corr(truth)
                rows.append(
                    {
                        "predictor": loss,
                        "codebook": variant,
                        "bits": bits,
                        "layers": len(searched),
                        "spearman": round(float(value), 3),
                    }
                )
    return rows


def chosen_method(run: Run, records: list[StudyRecord]) -> MethodSpec:
    """The method that is drawn and exported: the configured one, else the one with the least mean log distance to full precision."""
    by_name = {m.name: m for m in run.config.methods}
    if run.config.report.chosen:
        return by_name[run.config.report.chosen]
    scores: dict[str, list[float]] = {}
    for r in records:
        if r.method in by_name and "fd_fp" in r.metrics:
            scores.setdefault(r.method, []).append(float(np.log(max(r.metrics["fd_fp"].value, 1e-12))))
    if not scores:
        return run.config.methods[-1]
    return by_name[min(scores, key=lambda name: float(np.mean(scores[name])))]


def export(run: Run, table: LayerTable, measured: SensitivityProfile, records: list[StudyRecord]) -> list[Path]:
    """Write the chosen map for every configured target and let the consumer read it back."""
    from mpqsearch.export import ExportJob, get_exporter

    c = run.config.export
    budget = Budget.parse(c.budget) if c.budget else run.config.allocate.parsed()[0]
    method = chosen_method(run, records)
    bit_map, solved = allocation(run, table, measured, method, budget)
    written: list[Path] = []
    for target in c.targets:
        exporter = get_exporter(target)
        folder = run.path("export", target)
        inputs = {"bit_map": bit_map.digest, "model": table.digest, "rounding": c.rounding, "target": target}
        stamp = run.path("export", f"{target}.json")
        if artifacts.is_current(stamp, "mpqsearch/export", inputs, overwrite=True):
            run.say(f"export: reused {folder}")
            continue
        if run.dry_run:
            run.say(f"export: would write {method.name} at {budget.label()} for {target}")
            continue
        job = ExportJob(
            table=table,
            bit_map=bit_map,
            denoiser=run.denoiser,
            rounding=c.rounding,
            inputs={"model": table.digest},
            provenance={"method": method.name, "budget": budget.label(), "predicted_loss": solved["predicted_loss"]},
        )
        with run.timed("export"):
            written += exporter.write(folder, job)
            verification = exporter.verify(folder)
        run.say(f"export: {verification.summary()}")
        if not verification.ok:
            raise ArtifactError(f"the export for {target} in {folder} was not read back as planned: see the lines above")
        artifacts.write_json(stamp, "mpqsearch/export", verification.to_data(), inputs)
    return written


def quantize(run: Run, table: LayerTable, measured: SensitivityProfile, method_name: str, budget: Budget) -> Path:
    """Write the fake-quantized model as a diffusers folder with its bit map."""
    methods = {m.name: m for m in run.config.methods}
    if method_name not in methods:
        raise UnknownNameError("method", method_name, methods)
    method = methods[method_name]
    bit_map, _ = allocation(run, table, measured, method, budget)
    folder = run.path("quantized", slug(method_name, budget))
    if run.dry_run:
        run.say(f"quantize: would write {folder}")
        return folder
    _same_model(run, table)
    module = quantized_module(run, table, measured, bit_map, bias_correction=method.bias_correction)
    if not hasattr(module, "save_pretrained"):
        raise ConfigError(f"{type(module).__name__} has no save_pretrained; use mpqsearch.quant.quantize_model from Python instead")
    from safetensors.torch import save

    with artifacts.atomic_write(folder / "diffusion_pytorch_model.safetensors") as handle:
        handle.write(save({k: v.contiguous().clone() for k, v in module.state_dict().items()}, metadata={"format": "pt"}))
    artifacts.write_text(folder / "config.json", module.to_json_string())
    artifacts.write_text(folder / "scheduler_config.json", _json(dict(run.denoiser.scheduler)))
    hints = {"n_classes": run.denoiser.n_classes, "null_class": run.denoiser.null_class}
    artifacts.write_text(folder / "denoiser.json", _json(hints))
    artifacts.save_bit_map(folder / "bitmap.json", bit_map, {"model": table.digest})
    run.say(f"quantize: {folder}")
    return folder


def everything(run: Run) -> list[StudyRecord]:
    """All stages, from the model to the report and the exports."""
    start(run)
    table = layers(run)
    measured = profile(run, table)
    if measured is None:
        run.say("allocate, evaluate, report, export: would follow")
        return []
    records = evaluate(run, table, measured)
    if not run.dry_run:
        for row in rank_correlations(table, measured):
            run.say(
                f"profile: rank correlation of {row['predictor']!r} with one layer at a time, {row['bits']} bits: {row['spearman']:.2f}"
            )
    report(run, table, measured, records)
    export(run, table, measured, records)
    return records


def uniform_full_precision(table: LayerTable) -> BitMap:
    """The map that quantizes nothing."""
    return BitMap(model_digest=table.digest, weights={la.name: np.array(16, dtype=np.uint8) for la in table})


def _save_map(path: Path, made: Allocation, table: LayerTable, inputs: Mapping[str, str]) -> None:
    from mpqsearch.export import neutral_extra

    provenance = {"method": made.method.name, "budget": made.budget.label(), "predicted_loss": made.predicted_loss}
    artifacts.save_bit_map(path, made.bit_map, inputs, neutral_extra(table, made.bit_map, provenance=provenance))


def _same_model(run: Run, table: LayerTable) -> None:
    if run.denoiser.digest != table.digest:
        raise StaleArtifactError(
            f"the weights of {run.config.model.source} ({run.denoiser.digest[:10]}) are not those that {run.path('layers.json')} was made "
            f"from ({table.digest[:10]}). Use another --run-dir, or --overwrite to make everything again."
        )


def _sampler(run: Run) -> Any:
    from mpqsearch.sampling import SamplerSpec

    c = run.config.sampler
    return SamplerSpec(name=c.name, steps=c.steps, guidance=c.guidance, batch=c.batch)


def _grids(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[Any]:
    from mpqsearch.report import sample_grid
    from mpqsearch.sampling import to_uint8

    key = evaluation_key(run, table, None, bias_correction=False)
    import torch

    columns = run.config.report.grid_columns
    full = to_uint8(
        torch.from_numpy(artifacts.read_arrays(run.path("stats", f"full-precision-{key[:16]}.npz"))["samples"][:columns])
    )
    grids = []
    for budget in run.config.allocate.parsed():
        rows = {"full precision": full.numpy()}
        for method in run.config.methods:
            bit_map, _ = allocation(run, table, measured, method, budget)
            point = evaluation_key(run, table, bit_map, bias_correction=method.bias_correction)
            file = run.path("stats", f"{point[:16]}.npz")
            if file.exists():
                rows[method.name] = artifacts.read_arrays(file)["images"][:columns]
        grids.append(sample_grid(f"Budget {budget.label()}", budget.limit, rows, columns=columns))
    return grids


def _notes(run: Run, table: LayerTable, measured: SensitivityProfile) -> list[str]:
    notes = [
        f"Policy: {run.config.policy.describe()}. Everything that is stored is counted: scales, zero points, channel tags, leftovers."
    ]
    over = []
    for method, budget in ((m, b) for b in run.config.allocate.parsed() for m in run.config.methods):
        _, data = allocation(run, table, measured, method, budget)
        if not data["within_budget"]:
            over.append(f"{method.name} at {budget.label()} by {(data['size_bits'] - data['limit']) / 8 / 1000:.2f} kB")
    if over:
        notes.append("Over the budget, because the method has no means to pay for its channel tags: " + "; ".join(over) + ".")
    return notes


def _bytes(table: LayerTable, bit_map: BitMap) -> int:
    from mpqsearch.core import size_bytes

    return size_bytes(table, bit_map)


def _json(data: Any) -> str:
    import json

    return json.dumps(data, indent=2, default=str) + "\n"


def _bar(label: str, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit="sample", leave=False, disable=None, file=sys.stderr, dynamic_ncols=True)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar for each label that is reported."""
    from tqdm import tqdm

    current: dict[str, Any] = {}

    def progress(label: str, done: int, total: int) -> None:
        if label not in current:
            for bar in current.values():
                bar.close()
            current.clear()
            current[label] = tqdm(total=total, desc=label, leave=False, disable=None, file=sys.stderr, dynamic_ncols=True)
        current[label].update(done - current[label].n if not current[label].disable else 0)

    try:
        yield progress
    finally:
        for bar in current.values():
            bar.close()
