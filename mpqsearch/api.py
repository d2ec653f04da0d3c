"""The front door: each function is a thin call of the room that does the work.

Paths may be text or `pathlib.Path`. How samples are drawn and what they show belongs to the model (`load`); what else
is not given comes from the profile: its widths, its quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpqsearch.config import AllocateConfig, Config, DistillConfig, EvaluateConfig, ModelConfig, QuantizerConfig
from mpqsearch.core import BitMap, Budget, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError, ModelError
from mpqsearch.export import Verification
from mpqsearch.export.packed import load_quantized as _load_packed
from mpqsearch.export.packed import save_quantized
from mpqsearch.methods import Allocation, MethodSpec
from mpqsearch.metrics import Evaluation, FeatureExtractor, Scorer
from mpqsearch.models import Calls, Denoiser, discover, load_calls
from mpqsearch.models.runner import device_of
from mpqsearch.profile import SecondMoments, WithGradients, gradient_moments, statistics_of
from mpqsearch.profile import profile_model as _measure
from mpqsearch.progress import bar_of, bars_of
from mpqsearch.prompts import Prompts, prompts_of, read_prompts
from mpqsearch.quant import Statistics, quantize_model
from mpqsearch.sampling import can_sample, load_model, samples
from mpqsearch.specs import CalibrationSpec, PromptsSpec, SamplerSpec, SearchSpec
from mpqsearch.stages.base import log
from mpqsearch.stages.delivering import faults, sized
from mpqsearch.stages.selecting import plain_method

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import nn

    from mpqsearch.export import ExportJob, Target

__all__ = [
    "allocate",
    "compare",
    "discover",
    "distill",
    "evaluate",
    "export",
    "import_map",
    "load",
    "load_quantized",
    "profile",
    "quantize",
    "save",
    "search",
]

OURS = MethodSpec(name="ilp-channel", allocator="ilp-channel", scheme="auto", bias_correction=True)
"""The plain integer program: exact over all channels, the better scheme of each row, biases corrected."""

MEASURED = MethodSpec(name="measured", allocator="measured", scheme="auto", bias_correction=True, rounding="kfac")
"""What `allocate` does unless told otherwise: the best of several maps by what their samples show."""

CALIBRATION_SEEDS = range(1_000_000, 1_000_040)
"""Samples from whose trajectories GPTQ learns what the layers' inputs are like."""


def load(
    source: str | Path,
    *,
    sampler: SamplerSpec | None = None,
    prompts: str | Path | Sequence[str] | Prompts | None = None,
    calls: str | Path | Calls | None = None,
    device: str = "auto",
    dtype: str = "float32",
    component: str | Sequence[str] = "",
    revision: str | None = None,
) -> Denoiser:
    """A model with the way it is run: an embedded name, a diffusers folder, ``owner/name`` of a hub, or
    ``package.module:function``, on ``device`` (``auto``, ``cpu``, ``cuda``, ``mps``).

    sampler
        What to change of how a pipeline samples by itself: steps, guidance, batch, arguments of its call.
    prompts
        What the samples of a pipeline for text show: a file, or texts. See `mpqsearch.prompts.read_prompts`.
    calls
        Recorded calls (``mpqsearch record``), or their file, in the place of the pipeline's own run.
    dtype
        ``float32``, ``bfloat16``, ``float16`` or ``stored``.
    component
        Part of a pipeline; empty: its denoisers. Several (``("unet", "text_encoder")``) are one model with one budget.

    A module of your own comes through `mpqsearch.sampling.adapt`. Raises `ModelError` when there is no such model or
    its weights are not whole, `ConfigError` for prompts that are missing or empty.
    """
    return load_model(
        str(source),
        sampler=sampler,
        prompts=_prompts(prompts),
        calls=load_calls(calls) if isinstance(calls, (str, Path)) else calls,
        device=device,
        dtype=dtype,
        component=component,
        revision=revision,
    )


def profile(
    model: Denoiser,
    *,
    table: LayerTable | None = None,
    policy: Policy | None = None,
    calibration: CalibrationSpec | None = None,
    quantizer: QuantFormat | None = None,
    known: SensitivityProfile | None = None,
    progress: bool = True,
) -> SensitivityProfile:
    """Measure kurtosis, exact output errors and sensitivities of every channel at every width of ``policy``.

    ``table`` defaults to `discover` of the model. ``known``: the profile of a model that this one was fine-tuned from,
    whose sensitivities are taken. Raises what `mpqsearch.profile.profile_model` raises.
    """
    with bars_of(enabled=progress) as report:
        return _measure(
            model,
            table or discover(model),
            policy or Policy(),
            calibration or CalibrationSpec(),
            quantizer or QuantFormat(),
            known=known,
            progress=report,
        )


def allocate(
    model: Denoiser | LayerTable,
    profile: SensitivityProfile,
    budget: str | Budget = "3bit",
    *,
    within: Sequence[str | Budget] = (),
    costs: str | Path | None = None,
    method: MethodSpec = MEASURED,
    policy: Policy | None = None,
    quantizer: QuantFormat | None = None,
) -> Allocation:
    """The bit map that loses least under ``budget`` (``"3bit"``, ``"uniform:3"``, ``"450kB"``, ``"2e9bops"``).

    By default maps that differ in kind are solved and measured on a few samples from the same noise; the best is
    returned, and ``.notes`` say of how many. Where nothing can be sampled (a `LayerTable` in the place of the model,
    recorded calls, a profile of the weights alone), or with ``method=mpq.api.OURS``, it is the map of least predicted
    loss.

    ``within`` are further budgets that hold at the same time; those in milliseconds (``"12ms"``) need ``costs``, a CSV
    of latencies (`mpqsearch.methods.CostTable`). Bounds, groups and fixed widths are in `Policy`.

    ``.bit_map`` of what is returned has the widths, ``.result`` the lower bound and the gap that say how good they are.
    A method with GPTQ rounding is priced with the errors that this rounding leaves, which runs the model. Raises
    `InfeasibleBudgetError`, with the smallest attainable size, when nothing fits.
    """
    from mpqsearch import stages

    table, given = (model, None) if isinstance(model, LayerTable) else (discover(model), model)
    if given is None and method.allocator == "measured":
        method = replace(plain_method(method, profile), rounding="nearest")
    elif given is None and method.rounding != "nearest":
        raise ConfigError(
            f"the method {method.name!r} rounds by {method.rounding.upper()}, which runs the model: give it, not its "
            "table"
        )
    wanted, further = _budget(budget), tuple(_budget(b).label() for b in within)
    asked = AllocateConfig(budgets=(wanted.label(),), within=further, costs="" if costs is None else str(costs))
    config = _study(model, policy or Policy(widths=profile.widths), quantizer or _quantizer(profile), asked, method)
    with TemporaryDirectory() as folder:
        run = stages.Run(config=config, folder=Path(folder), given=given)
        run.table, run.profile = table, profile
        solved, found = stages.allocated(run, method, wanted)
    if found is None:
        return solved
    tried = f"{found.chosen.label}, by {len(found.chosen.errors)} samples of {len(found.rivals)} maps"
    return replace(solved, notes=(*solved.notes, tried))


def quantize(
    model: Denoiser,
    allocation: Allocation | BitMap,
    profile: SensitivityProfile | None = None,
) -> Denoiser:
    """``model`` with the weights that the codes of ``allocation`` decode to; the original is left as it is.

    ``profile`` gives the input means that bias correction needs; without it the biases stay as they are. GPTQ rounding
    runs 40 samples to learn what the layers' inputs are like. Raises `LayerMismatchError` when the map is for another
    model.
    """
    table = discover(model)
    bit_map, known = _statistics(model, table, allocation, profile)
    return model.with_module(quantize_model(model.module, table, bit_map, **known).module)


def evaluate(
    model: Denoiser,
    quantized: Denoiser,
    *,
    seeds: Sequence[int] = range(128),
    extractor: str | FeatureExtractor = "auto",
    data: str | Path | None = None,
    scorers: Sequence[Scorer] = (),
    progress: bool = True,
) -> Evaluation:
    """Samples of ``quantized`` against those of ``model`` from the same noise and prompts: distances, PSNR, each with
    an interval.

    ``extractor``: ``auto`` (by the pictures), ``fmnist-cnn``, ``random-conv``, ``inception``, or one of
    `mpqsearch.metrics.module_extractor`. ``data``: statistics of real data (`mpqsearch.metrics.save_reference`); the
    embedded ones of the extractor, if it has any, otherwise. ``scorers``: further scores of single pictures, such as
    `mpqsearch.metrics.clip_scorer`. Samples are measured batch by batch; those of full
    precision lie in a temporary folder.
    """
    from mpqsearch.metrics import AUTO, Reference, SampleStore, extractor_for, load_extractor, load_reference
    from mpqsearch.metrics import evaluate as measure

    shape = (model.runner.picture(model.module) or ())[-3:]  # of a video that of its frames; empty for sound
    if not isinstance(extractor, FeatureExtractor):
        name = extractor_for(shape, model.name) if extractor == AUTO else extractor
        extractor = load_extractor(name, device=device_of(model.module))
    if shape:
        extractor.check(shape)
    statistics = load_reference(None if data is None else Path(data), extractor)
    with TemporaryDirectory() as folder, bar_of("evaluate", 2 * len(seeds), enabled=progress) as bar:
        store = SampleStore(Path(folder), seeds, {})
        store.fill(samples(model, seeds, progress=bar.update))
        reference = Reference.of(store, extractor, statistics, scorers)
        return measure(samples(quantized, seeds, progress=bar.update), reference)


def distill(
    model: Denoiser,
    allocation: Allocation | BitMap,
    profile: SensitivityProfile | None = None,
    *,
    settings: DistillConfig | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Denoiser:
    """Train the quantized model of ``allocation`` against ``model`` on the latter's own trajectories; no data needed.

    ``folder`` keeps checkpoints, from which the same call continues. Maps that store scales of activations are trained
    with ``mpqsearch distill``.
    """
    from mpqsearch.distill import Trajectories
    from mpqsearch.distill import distill as train
    from mpqsearch.quant import build_student, convert, param_groups

    c, table = settings or DistillConfig(), discover(model)
    bit_map, known = _statistics(model, table, allocation, profile)
    if bit_map.static_inputs(table):
        raise ConfigError(
            "this map quantizes activations, whose scales belong to a run: train it with mpqsearch distill"
        )
    student = build_student(
        model.module,
        table,
        bit_map,
        trainable=c.trainable,  # type: ignore[arg-type]
        rank=c.rank,
        seed=c.seed,
        **known,
    )
    source = Trajectories(model, batch=c.batch, seed=c.seed)
    groups = param_groups(student, **c.rates)
    where = None if folder is None else Path(folder)
    inputs = {"model": table.digest, "bit_map": bit_map.digest}
    with bar_of("distill", c.steps, unit="step", enabled=progress) as bar:
        for state in train(student, groups, source, c, folder=where, inputs=inputs):
            bar.update(1)
            if state.interrupted:
                raise KeyboardInterrupt
    return model.with_module(convert(student).module)


@dataclass(frozen=True, kw_only=True, repr=False)
class SearchResult:
    """What an outer search found: the map it hands out at each budget (by the budget's label), and all rows of its
    table."""

    maps: Mapping[str, BitMap]
    data: Mapping[str, Any]
    folder: Path

    def to_frame(self) -> DataFrame:
        """One row for each budget and arm: size, bits, measured error."""
        import pandas as pd

        rows = [{"budget": entry["budget"], **row} for entry in self.data["budgets"] for row in entry["rows"]]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        lines = [f"SearchResult in {self.folder}: {self.data['trials']} trials"]
        for entry in self.data["budgets"]:
            errors = ", ".join(f"{row['arm']} {row['error']:.4g}" for row in entry["rows"])
            lines.append(f"  {entry['budget']}: error of {errors}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html())


def search(
    model: Denoiser,
    profile: SensitivityProfile,
    budgets: str | Sequence[str] = "3bit",
    *,
    trials: int = 40,
    method: MethodSpec = OURS,
    settings: SearchSpec | None = None,
    policy: Policy | None = None,
    extractor: str = "auto",
    folder: str | Path | None = None,
) -> SearchResult:
    """Search over how the integer program of ``method`` is built, scored by measured samples.

    Files go to ``folder`` (default: ``runs/<model>``); the same call continues from there. Raises `ConfigError` for
    settings that do not go together.
    """
    from mpqsearch import stages

    wanted = (budgets,) if isinstance(budgets, str) else tuple(budgets)
    spec = replace(settings or SearchSpec(), trials=trials, method=method.name, budgets=wanted)
    policy, asked = policy or Policy(widths=profile.widths), AllocateConfig(budgets=wanted)
    study = _study(model, policy, _quantizer(profile), asked, method)
    config = replace(study, search=spec, evaluate=EvaluateConfig(extractor=extractor))
    run = stages.Run(config=config, folder=Path(folder) if folder else Path("runs") / model.name, given=model)
    run.profile = profile
    stages.layers(run)
    data = stages.search(run)
    maps = {text: stages.searched_map(run, Budget.parse(text))[0] for text in (b["budget"] for b in data["budgets"])}
    return SearchResult(maps=maps, data=data, folder=run.path("search"))


@dataclass(frozen=True, kw_only=True, repr=False)
class Exported:
    """A map in the format of another tool: its files, what each layer got, and what the consumer read back (None: it
    was not asked). ``faults`` say what to know before the file is taken: others do not load it, or it is too large."""

    target: str
    folder: Path
    files: tuple[Path, ...]
    plan: tuple[Mapping[str, Any], ...]
    verification: Verification | None
    faults: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def to_frame(self) -> DataFrame:
        """One row a layer: width asked for, what it gets, why."""
        import pandas as pd

        return pd.DataFrame(list(self.plan))

    def __repr__(self) -> str:
        state = "not read back by its consumer" if self.verification is None else self.verification.summary()
        text = f"Exported for {self.target} to {self.folder}: {len(self.files)} files, {self.size_bytes} bytes; {state}"
        return "\n".join([*self.faults, text])

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>{self.to_frame().to_html(max_rows=20)}"


def export(
    model: Denoiser,
    allocation: Allocation | BitMap,
    target: str,
    folder: str | Path,
    profile: SensitivityProfile | None = None,
    *,
    verify: bool = False,
) -> Exported:
    """Write a map for another quantizer (``gguf``, ``quanto``, ``sdnq`` ...; `mpqsearch doctor` lists them).

    Where the target cannot hold the map, its formats are solved for anew at the size of the map, from ``profile``;
    without one every width becomes the next one up that it has. With ``verify`` its consumer reads the files back.
    Faults of the file, as ``mpqsearch export`` says them, are logged as warnings; only there is it measured. Raises
    `UnknownNameError` for an unknown target.
    """
    from mpqsearch.export import ExportJob, get_exporter, plan_table
    from mpqsearch.export.allocation import resolve_job, target_losses, target_squares

    table, exporter, where = discover(model), get_exporter(target), Path(folder)
    bit_map, known = _statistics(model, table, allocation, profile)
    job = ExportJob(
        table=table,
        bit_map=bit_map,
        denoiser=model,
        statistics=known["statistics"],
        bias_correction=known["bias_correction"],
        inputs={"model": table.digest},
    )
    if profile is not None:
        weights = {name: module.weight for name, module in model.module.named_modules() if name in table.by_name}
        squared = partial(target_squares, exporter, table, weights.__getitem__)
        job = resolve_job(exporter, job, lambda: (target_losses(squared(), table, profile), None), Policy())
    plan = tuple(plan_table(exporter.plan(job)))
    files = tuple(exporter.write(where, job))
    known_faults = tuple(_faults(exporter, job, where, allocation)) if exporter.payload else ()
    for fault in known_faults:
        log.warning("%s", fault)
    verification = exporter.verify(where) if verify else None
    return Exported(target=target, folder=where, files=files, plan=plan, verification=verification, faults=known_faults)


def _faults(target: Target, job: ExportJob, folder: Path, allocation: Allocation | BitMap) -> Iterator[str]:
    """What is wrong with a file as far as it can be told without samples."""
    limit, label = None, ""
    if isinstance(allocation, Allocation) and allocation.budget.unit == "bits stored":
        limit, label = allocation.limit, allocation.budget.label()
    found = sized(target, job, folder, limit, job.model.size_bytes, whole=False)
    yield from faults(target.name, found | {"budget": label})


def import_map(path: str | Path, model: Denoiser | LayerTable, *, source: str | None = None) -> BitMap:
    """The widths that a file or folder of another quantizer gives to the layers of ``model``.

    ``source``: the format, such as ``gguf`` (default: found out from the file). What the file holds beyond widths is
    logged as a warning. Raises `ArtifactError` for a file of no known format, `LayerMismatchError` for layers that the
    model does not have.
    """
    from mpqsearch.export import import_map as read

    return read(path, model if isinstance(model, LayerTable) else discover(model), source)


def save(
    folder: str | Path,
    model: Denoiser,
    allocation: Allocation | BitMap,
    profile: SensitivityProfile | None = None,
) -> Path:
    """Quantize ``model`` and write it as a packed checkpoint that `load_quantized` reads; returns the folder.

    Raises `ConfigError` for a module without a diffusers configuration from which it could be built again.
    """
    table = discover(model)
    bit_map, known = _statistics(model, table, allocation, profile)
    quantized = quantize_model(model.module, table, bit_map, **known)
    save_quantized(folder, quantized, table, {"model": table.digest})
    return Path(folder)


def load_quantized(path: str | Path) -> nn.Module:
    """The diffusers model of a packed checkpoint, its weights those that the codes decode to, bit for bit.

    Raises `ArtifactError` when files are missing or damaged.
    """
    return _load_packed(path)


def compare(model: Denoiser, quantized: Denoiser, *, seeds: Sequence[int] = range(8)) -> Figure:
    """Samples of both from the same noise and prompts, one above the other, titled with the paired PSNR of their
    pictures in dB; of videos the first frames are shown.

    Raises `ConfigError` when the model makes no pictures.
    """
    from mpqsearch.report import plot_samples, sample_grid

    rows = {name: _shown(m, seeds) for name, m in (("full precision", model), ("quantized", quantized))}
    before, after = (images.astype(np.float64) / 255 for images in rows.values())
    error = float(np.square(before - after).mean())
    title = "identical samples" if error == 0 else f"PSNR to full precision {-10 * np.log10(error):.1f} dB"
    figure: Figure = plot_samples(sample_grid(title, rows, columns=len(seeds))).figure  # type: ignore[assignment]
    return figure


def _shown(model: Denoiser, seeds: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pictures ``[N, C, H, W]``, of videos the first frames."""
    images = [drawn.images for drawn in samples(model, seeds) if drawn.images is not None]
    if not images:
        raise ConfigError(f"{model.name} makes no pictures that could be compared; evaluate measures its paired error")
    whole = torch.cat(images)
    return (whole[:, 0] if whole.dim() == 5 else whole).numpy()


def _study(
    model: Denoiser | LayerTable, policy: Policy, fmt: QuantFormat, asked: AllocateConfig, method: MethodSpec
) -> Config:
    """The study of one method of a loaded model."""
    source = model.model if isinstance(model, LayerTable) else model.source or model.name
    return Config(
        model=ModelConfig(source=source),
        policy=policy,
        quantizer=QuantizerConfig(criterion=fmt.criterion, p=fmt.p, n_candidates=fmt.n_candidates),
        allocate=asked,
        methods=(method,),
    )


def _prompts(given: str | Path | Sequence[str] | Prompts | None) -> Prompts | None:
    if isinstance(given, (str, Path)):
        return read_prompts(PromptsSpec(file=str(given)))
    return given if given is None or isinstance(given, Prompts) else prompts_of(given)


def _budget(budget: str | Budget) -> Budget:
    return budget if isinstance(budget, Budget) else Budget.parse(budget)


def _quantizer(profile: SensitivityProfile) -> QuantFormat:
    """How the ranges of the profile were searched."""
    found = profile.calibration.get("format", {})
    return QuantFormat(**{key: found[key] for key in ("criterion", "p", "n_candidates") if key in found})


def _statistics(
    model: Denoiser,
    table: LayerTable,
    allocation: Allocation | BitMap,
    profile: SensitivityProfile | None,
) -> tuple[BitMap, dict[str, Any]]:
    """The map, and what quantizing by it takes: ``statistics`` of the layers' inputs, and ``bias_correction``."""
    bit_map = allocation.bit_map if isinstance(allocation, Allocation) else allocation
    corrected = isinstance(allocation, BitMap) or allocation.method.bias_correction
    known: Statistics = {} if profile is None else statistics_of(profile)
    if not bit_map.rounds_to_nearest:
        means = known
        known = SecondMoments(denoiser=model, table=table, seeds=CALIBRATION_SEEDS, known=means)
        if bit_map.rounds_by("kfac") and can_sample(model):
            seeds = CALIBRATION_SEEDS[: QuantizerConfig.gradient_samples]
            try:
                known = WithGradients(known, gradient_moments(model, table, seeds, means))
            except ModelError as error:  # as in a run
                log.warning("KFAC rounding: codes are those of GPTQ, since %s", error)
    return bit_map, {"statistics": known, "bias_correction": corrected and profile is not None}
