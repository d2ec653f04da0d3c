"""Measured selection as a stage: maps that differ in kind, measured on a few samples; the best is handed out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mpqsearch import artifacts
from mpqsearch.core import Budget, SensitivityProfile
from mpqsearch.core.formats import SCHEMES
from mpqsearch.errors import InfeasibleBudgetError
from mpqsearch.methods import Allocation, MethodSpec, Programs
from mpqsearch.prompts import band_of
from mpqsearch.stages.base import Run
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.references import delivered_module, quantized_module, scratch_file
from mpqsearch.stages.statistics import moment_inputs, statistics_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from mpqsearch.export import Target
    from mpqsearch.search.measure import ModelEvaluator
    from mpqsearch.search.selection import Selection
    from mpqsearch.search.surrogate import Candidate

HELD = 2 * 10**9
"""Bytes of quantized models that are kept between the rounds; what does not fit is quantized again."""

TRIED = {
    "uniform": ("nearest", "gptq"),
    "by layer": ("kfac",),
    "by channel": ("nearest", "kfac"),
}
"""Roundings that are tried with each kind of map: what rests on little by the simpler ones, too."""

DOUBTFUL = 0.5
"""Rank correlation of predicted and measured losses below which predictions are said not to be believed."""


def plain_method(method: MethodSpec, measured: SensitivityProfile) -> MethodSpec:
    """The integer program behind a method of the allocator ``measured``: over channels where these were measured."""
    if measured.layers_only or measured.weights_only:  # GPTQ rounds by the inputs of layers, which were not looked at
        method = replace(method, rounding="nearest")
    return replace(method, allocator="ilp-layer" if measured.layers_only else "ilp-channel")


def variants(method: MethodSpec, measured: SensitivityProfile, budgets: Sequence[Budget]) -> Mapping[str, MethodSpec]:
    """What is tried, by a label, safest first: the less a map rests on estimates, the safer it is.

    ``levelled`` trusts no sensitivity of a single channel, ``as measured`` all of them; between these the shrinkage is
    as the data say. Formats are chosen layer by layer among those of the method; where it names none, among its own and
    those of the profile that differ from it by groups of inputs or by three levels.
    """
    formats, method = method.formats or _formats(method, measured), method.in_format(method.format_name)
    found = {}
    if "asymmetric" in measured.formats:
        bare = replace(method, allocator="uniform", scheme="asymmetric", bias_correction=False, rounding="nearest")
        found["uniform, plain"] = bare
    kinds = {"uniform": "uniform", "by layer": "ilp-layer", "by channel": "ilp-channel"}
    for label, allocator in kinds.items():
        for rounding in ("nearest",) if measured.layers_only else TRIED[label]:
            found[f"{label}, {rounding}"] = replace(method, allocator=allocator, rounding=rounding)
    if measured.layers_only or any(b.quantity == "latency" for b in budgets):
        found = {label: spec for label, spec in found.items() if spec.allocator != "ilp-channel"}
    if "by channel, kfac" in found:
        best = found.pop("by channel, kfac")
        found["by channel, kfac, levelled"] = replace(best, shrinkage=1.0)
        found["by channel, kfac"] = best
        found["by channel, kfac, as measured"] = replace(best, shrinkage=0.0)
    if len(formats) > 1:
        label = "by channel, kfac" if "by channel, kfac" in found else list(found)[-1]
        found[f"{label}, formats by layer"] = replace(found[label], scheme=SCHEMES[0], group=0, formats=formats)
    return found


def _formats(method: MethodSpec, measured: SensitivityProfile) -> tuple[str, ...]:
    """The method's own format and, without smoothing, those of the profile in its scheme or the ternary one."""
    own = method.format_name
    schemes = {method.scheme, "ternary"}
    near = (n for n in measured.formats if n.partition("+")[0] in schemes and "smooth" not in n)
    return (own,) if method.smooth else tuple(dict.fromkeys((own, *near)))


def selection_inputs(run: Run) -> dict[str, str]:
    """Digests of what a measured selection depends on besides the allocation."""
    c = run.config
    settings = {"select": artifacts.digest_of([c.allocate.select, c.allocate.select_samples])}
    return settings if c.allocate.select == "none" else settings | moment_inputs(run)


def can_select(run: Run) -> bool:
    """Whether maps can be measured here: asked for, and the model brings a sampler."""
    if run.config.allocate.select == "none" or run.dry_run or run.profile.weights_only:
        return False
    from mpqsearch.sampling import can_sample

    return can_sample(run.denoiser)


def selected(
    run: Run,
    method: MethodSpec,
    budget: Budget,
    programs: Callable[[MethodSpec], Programs],
) -> tuple[Allocation, Selection]:
    """Solve every variant of a method at a budget, measure the maps, and choose. Raises
    `InfeasibleBudgetError` when none fits.
    """
    from mpqsearch.search.surrogate import Candidate

    c = run.config.allocate
    solved = _solved(variants(method, run.profile, (budget, *c.parsed_within())), budget, c.parsed_within(), programs)
    found = race(run, {label: Candidate.of(run.table, s, budget) for label, s in solved.items()})
    return solved[found.chosen.label], found


def race(run: Run, candidates: Mapping[str, Candidate]) -> Selection:
    """Measure candidates by label, safest first, on the seeds of ``[allocate]``, and choose."""
    from mpqsearch.progress import bar_of
    from mpqsearch.search.selection import Rival, select

    first = band_of("development")[0]
    seeds = range(first, first + run.config.allocate.select_samples)
    evaluator = run.once("selection", lambda: _evaluator(run, len(candidates)))
    with run.timed("select"), bar_of("select", 0) as bar:

        def measure(candidate: Candidate, some: Sequence[int]) -> list[float]:
            errors = evaluator.errors(candidate, some)
            bar.update(len(some))
            return errors

        return select([Rival(label=label, candidate=c) for label, c in candidates.items()], measure, seeds)


def _solved(
    wanted: Mapping[str, MethodSpec],
    budget: Budget,
    within: Sequence[Budget],
    programs: Callable[[MethodSpec], Programs],
) -> dict[str, Allocation]:
    """The different maps of some methods that keep to the budgets. Raises `InfeasibleBudgetError` when there is
    none."""
    solved: dict[str, Allocation] = {}
    refused: InfeasibleBudgetError | None = None
    for label, variant in wanted.items():
        try:
            allocation = programs(variant).allocate(variant, budget, within)
        except InfeasibleBudgetError as error:
            refused = error
            continue
        if allocation.within_budget and all(_differ(allocation, other) for other in solved.values()):
            solved[label] = allocation
    if not solved:
        assert refused is not None
        raise refused
    return solved


def say_selection(run: Run, where: str, found: Selection) -> None:
    """One line on what was chosen, and one where predictions should not be believed."""
    from mpqsearch.search.selection import APART

    rivals = ", ".join(r.label for r in found.close)
    doubt = f"; it {APART} from {rivals}" if rivals else ""
    n = len(found.chosen.errors)
    run.say(f"select: at {where} {found.chosen.label!r} of {len(found.rivals)} maps, by {n} samples{doubt}")
    if found.spearman < DOUBTFUL:
        run.say(
            f"select: predicted losses rank these maps poorly at {where} (Spearman {found.spearman:.2f}): "
            "do not believe predictions on this model"
        )


def _differ(a: Allocation, b: Allocation) -> bool:
    return (a.bit_map.digest, a.method.bias_correction) != (b.bit_map.digest, b.method.bias_correction)


def _evaluator(run: Run, n: int) -> ModelEvaluator:
    from mpqsearch.search.measure import ModelEvaluator

    size = sum(p.numel() * p.element_size() for p in run.denoiser.module.parameters())

    def quantized(candidate: Candidate) -> nn.Module:
        if candidate.target:
            with candidate_file(run, candidate) as (target, folder):
                return delivered_module(run, target, folder)
        return quantized_module(run, candidate.bit_map, bias_correction=candidate.bias_correction)

    return ModelEvaluator(
        denoiser=run.denoiser,
        quantized=quantized,
        calibration=artifacts.digest_of(profile_inputs(run)),
        error="latents",
        keep=max(1, min(n, HELD // max(size, 1))),
    )


@contextmanager
def candidate_file(run: Run, candidate: Candidate) -> Iterator[tuple[Target, Path]]:
    """The target of a candidate and the folder of its file, which is dropped after the block."""
    from mpqsearch.export import ExportJob, get_exporter

    target = get_exporter(candidate.target)
    job = ExportJob(
        table=run.table,
        bit_map=candidate.bit_map,
        denoiser=run.denoiser,
        choices=candidate.choices,
        statistics=statistics_for(run, candidate.bit_map),
        bias_correction=candidate.bias_correction,
    )
    with scratch_file(run, target, job) as folder:
        yield target, folder
