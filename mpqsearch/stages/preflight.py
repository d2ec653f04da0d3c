"""What would go wrong after minutes of work is found before they begin."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mpqsearch.core import FULL_PRECISION, Budget, size_bits, uniform_map
from mpqsearch.errors import ConfigError, InfeasibleBudgetError
from mpqsearch.stages.base import Run

if TYPE_CHECKING:
    from mpqsearch.export import Target


def preflight(run: Run, sampling: str = "") -> None:
    """Raise what a later stage would raise: for budgets that no map meets, and targets whose quantizer is not
    installed.

    With ``sampling``, which says what samples are for: a model that cannot be sampled, an extractor, statistics of data
    or a text score that are not there or do not fit the pictures, and what a rehearsal of the pipeline's loop and one
    decoded picture show (prompts, classes, arguments of the call, the scheduler).
    """
    _check_budgets(run)
    _check_targets(run)
    if sampling:
        check_sampling(run, sampling)


def check_sampling(run: Run, sampling: str) -> None:
    """The part of `preflight` that is about samples; a dry run makes none."""
    from mpqsearch.sampling import require_sampler

    if run.dry_run:
        return
    if run.config.calibration.captured:
        require_sampler(run.denoiser, sampling)
    if run.picture is None:
        _refuse_without_pictures(run)
        return
    run.extractor.check(run.picture[-3:])
    c = run.config.evaluate
    if c.text_score and not isinstance(run.denoiser.runner.labels([c.first_seed])[0], str):
        raise ConfigError(
            f"evaluate.text_score compares pictures with their prompts, and {run.config.model.source} is given none: "
            "leave it out, or name a file of prompts (prompts.file)"
        )
    _ = run.data_reference, run.scorers


def _refuse_without_pictures(run: Run) -> None:
    """Raise `ConfigError` for what needs features of samples that are no pictures."""
    c = run.config
    keys = {
        'search.error = "features" (use "latents")': c.search.trials > 0 and c.search.error == "features",
        "distill.check_every": c.distill.check_every > 0 and bool(c.distill.methods),
        "evaluate.reference": bool(c.evaluate.reference),
        "evaluate.text_score": bool(c.evaluate.text_score),
    }
    for key, asked in keys.items():
        if asked:
            raise ConfigError(f"{run.config.model.source} makes no pictures, so there are no features for {key}")


def _check_budgets(run: Run) -> None:
    """Raise `InfeasibleBudgetError` for a size that is below that of all searched layers at their smallest width, and
    `ConfigError` for one above full precision."""
    c, policy = run.config, run.config.policy
    budgets = [*c.allocate.parsed(), *c.allocate.parsed_within(), *map(Budget.parse, c.search.budgets)]
    schemes = {m.scheme for m in c.methods if m.allocator != "map"}
    smallest = [
        size_bits(
            run.table, uniform_map(run.table, policy, min(policy.widths), replace(c.quantizer.format(), scheme=scheme))
        )
        for scheme in schemes
    ]
    for budget in (b for b in budgets if smallest and b.unit == "bits stored"):
        limit, full = budget.limit_bits(run.table, policy), FULL_PRECISION * run.table.n_parameters
        if limit < min(smallest):
            raise InfeasibleBudgetError(
                f"the budget {budget.label()} allows {limit} bits; the smallest attainable is {min(smallest)} "
                f"({min(smallest) / run.table.n_parameters:.4f} bits a parameter, {-(-min(smallest) // 8)} bytes): "
                f"every searched layer at {min(policy.widths)} bits. Raise the budget, or allow smaller widths "
                "(policy.widths)."
            )
        if limit > full:
            raise ConfigError(
                f"the budget {budget.label()} is above full precision, which takes {full} bits: there is nothing to "
                "quantize"
            )


def _check_targets(run: Run) -> None:
    """Raise `ConfigError` for a target that errors are asked of and that is not installed."""
    for name in run.config.allocate.targets:
        target = target_of(name)
        if target.asks_itself:
            target.require()


def require_targets(run: Run) -> None:
    """Raise `ConfigError` for an export target whose library is not installed."""
    from mpqsearch.export import get_exporter

    for name in run.config.export.targets:
        get_exporter(name).require()


def target_of(name: str) -> Target:
    """The target of that name. Raises `UnknownNameError` for an unknown one, `ConfigError` for one that has no formats
    of its own."""
    from mpqsearch.export import get_exporter

    target = get_exporter(name)
    if target.holds_any_map:
        raise ConfigError(f"the target {name!r} holds every map as it is: leave out --target (or allocate.targets)")
    return target
