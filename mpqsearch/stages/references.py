"""What samples of a run are compared with, and the models they are drawn from: below solving and searching, which both
need it."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpqsearch import artifacts
from mpqsearch._version import __version__
from mpqsearch.core import BitMap, LayerTable, MetricValue, StudyRecord, average_bits, size_bytes
from mpqsearch.errors import ArtifactError
from mpqsearch.progress import bar_of
from mpqsearch.stages.base import Run, same_model
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.reuse import METRICS, reuse_or_make
from mpqsearch.stages.statistics import activation_table, moment_inputs, statistics_for

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpqsearch.export import ExportJob, Target
    from mpqsearch.metrics import Reference, SampleStore

SHOWN = 10
"""Pictures of every map that are kept for the report."""


def evaluation_key(run: Run, bit_map: BitMap | None, *, bias_correction: bool) -> str:
    """Digest of everything that the samples of a map depend on: the same point is never evaluated twice."""
    c = run.config.to_data()
    parts: list[Any] = [*_measured_with(run), bit_map.digest if bit_map is not None else "full precision"]
    if bit_map is not None and (bias_correction or bit_map.format.smooth or bit_map.format.rounding != "nearest"):
        parts += [bias_correction, profile_inputs(run)]  # input statistics come from the profile or its settings
        parts += [moment_inputs(run)] if bit_map.format.rounding != "nearest" else []
    if bit_map is not None and bit_map.activations:
        parts += [c["activations"]]
    return artifacts.digest_of(parts)


def _measured_with(run: Run) -> list[Any]:
    """All that samples and their metrics depend on beside the weights that are drawn with."""
    sampler = run.config.to_data()["sampler"]
    return [__version__, run.table.digest, sampler, run.evaluation_inputs, run.source_inputs]


def file_key(run: Run, digests: Mapping[str, str]) -> str:
    """As `evaluation_key`, for weights that come from files with these digests."""
    return artifacts.digest_of([*_measured_with(run), "files", dict(digests)])


def measure(run: Run, key: str, make: Callable[[], nn.Module], progress: Callable[[int], Any]) -> dict[str, Any]:
    """Make a module, sample from it and measure; its features and first images are kept beside the metrics."""
    from mpqsearch.metrics import evaluate
    from mpqsearch.sampling import samples

    same_model(run)
    base = reference(run)
    began = time.perf_counter()
    drawn = samples(run.denoiser.with_module(make()), base.seeds, progress=progress)
    result = evaluate(drawn, base, keep=SHOWN)
    kept = {"features": result.features, "images": None if result.images is None else key_frames(result.images)}
    arrays = {name: tensor.numpy() for name, tensor in kept.items() if tensor is not None}
    artifacts.write_arrays(run.path("stats", f"{key[:16]}.npz"), arrays)
    return {"seconds": time.perf_counter() - began, "metrics": {k: v.to_data() for k, v in result.metrics.items()}}


def reference(run: Run) -> Reference:
    """Full-precision samples with their features; made once in this process."""
    from mpqsearch.metrics import Reference

    def make() -> Reference:
        return Reference.of(full_precision(run), run.extractor, run.data_reference, run.scorers)

    return run.once("reference", make)


def full_record(run: Run) -> StudyRecord:
    """What the full-precision samples measure."""
    key = evaluation_key(run, None, bias_correction=False)

    def measure() -> dict[str, Any]:
        began = time.perf_counter()
        full_precision(run)
        seconds = time.perf_counter() - began
        metrics = reference(run).evaluation().metrics
        return {"seconds": seconds, "metrics": {k: v.to_data() for k, v in metrics.items()}}

    return record_of(
        run,
        uniform_full_precision(run.table),
        reuse_or_make(run, METRICS, metrics_file(run, key), {"evaluation": key}, measure),
        method="full-precision",
        granularity="model",
        act_bits=16.0,
        predicted_loss=0.0,
    )


def report_seeds(run: Run) -> range:
    """The seeds that maps are measured on."""
    c = run.config.evaluate
    return range(c.first_seed, c.first_seed + c.samples)


def full_precision(run: Run) -> SampleStore:
    """Full-precision samples of the report seeds; those that the run folder lacks are made."""
    from mpqsearch.metrics import SampleStore
    from mpqsearch.sampling import samples

    key = evaluation_key(run, None, bias_correction=False)
    folder = run.path("stats", f"full-precision-{key[:16]}")
    if run.reads_only:  # a store that knows nothing of the folder would begin anew
        artifacts.read_json(folder / "samples.json", "mpqsearch/samples")
    store = SampleStore(folder, report_seeds(run), {"evaluation": key}, overwrite=run.overwrite)
    if missing := store.missing:
        if run.reads_only:
            raise ArtifactError(f"{folder} lacks {len(missing)} samples. `mpqsearch evaluate` makes them.")
        same_model(run)
        with run.timed("evaluate"), bar_of("full precision", len(missing)) as bar:
            store.fill(samples(run.denoiser, missing, progress=bar.update))
    return store


def key_frames(images: Tensor) -> Tensor:
    """Pictures as they are; of videos ``[N, F, C, H, W]`` the first and the middle frame."""
    return images[:, [0, images.shape[1] // 2]] if images.dim() == 5 else images


def metrics_file(run: Run, key: str) -> Path:
    """Where the metrics of an evaluation are kept."""
    return run.path("metrics", f"{key[:16]}.json")


def record_of(
    run: Run,
    bit_map: BitMap,
    data: dict[str, Any],
    *,
    method: str,
    granularity: str,
    act_bits: float,
    predicted_loss: float,
    budget: str = "",
    quantity: str = "",
) -> StudyRecord:
    """The record of a measured map; ``data`` is what its file of metrics holds."""
    table, seeds = run.table, report_seeds(run)
    return StudyRecord(
        model=table.model,
        method=method,
        granularity=granularity,
        budget=budget,
        quantity=quantity,
        average_bits=average_bits(table, bit_map),
        size_bytes=size_bytes(table, bit_map),
        act_bits=act_bits,
        bit_map_digest=bit_map.digest,
        n_samples=len(seeds),
        seeds=f"{seeds[0]}..{seeds[-1]}",
        seconds=data["seconds"],
        predicted_loss=predicted_loss,
        metrics={k: MetricValue(**m) for k, m in data["metrics"].items()},
    )


def quantized_module(run: Run, bit_map: BitMap, *, bias_correction: bool) -> nn.Module:
    """The fake-quantized copy of the run's model; scales of activations are calibrated where the map asks for them."""
    from mpqsearch.quant import quantize_model

    statistics = statistics_for(run, bit_map)
    return quantize_model(
        run.denoiser.module,
        run.table,
        bit_map,
        statistics=statistics,
        bias_correction=bias_correction,
        activations=activation_table(run, bit_map, statistics),
    ).module


def delivered_module(run: Run, target: Target, folder: Path) -> nn.Module:
    """The run's model with the values that the target's consumer decodes from an export."""
    from mpqsearch.export.check import put_weights

    return put_weights(copy.deepcopy(run.denoiser.module), target.weights(folder))


@contextmanager
def scratch_file(run: Run, target: Target, job: ExportJob) -> Iterator[Path]:
    """The folder of an export that is dropped after the block."""
    folder = run.path("export")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
        target.write(Path(scratch), job)
        yield Path(scratch)


def uniform_full_precision(table: LayerTable) -> BitMap:
    """The map that quantizes nothing."""
    return BitMap(model_digest=table.digest, weights={la.name: np.array(16, dtype=np.uint8) for la in table})
