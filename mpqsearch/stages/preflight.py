"""What would go wrong after minutes of work is found before they begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mpqsearch.core import FULL_PRECISION, Budget, size_bits, uniform_map
from mpqsearch.errors import ConfigError, InfeasibleBudgetError
from mpqsearch.stages.base import Run

if TYPE_CHECKING:
    from mpqsearch.export import Target
    from mpqsearch.metrics import Scorer

PUBLISHED = ("inception-2015", "clip", "dinov2")
"""Extractors whose distances are published with 5,000 pictures or more."""


def preflight(run: Run, sampling: str = "", targets: Sequence[str] = ()) -> None:
    """Raise what a later stage would raise: for budgets that no map meets, targets whose quantizer is not installed,
    and export ``targets`` of which none holds the model.

    With ``sampling``, which says what samples are for: a model that cannot be sampled, an extractor, statistics of data
    or a scorer that are not there or do not fit the pictures, and what a rehearsal of the pipeline's loop and one
    decoded picture show (prompts, classes, arguments of the call, the scheduler).
    """
    _check_budgets(run)
    _check_targets(run, targets)
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
    extractor, c = run.extractor, run.config.evaluate
    if run.data_reference is None and extractor.name in PUBLISHED:
        run.say(
            "evaluate.reference names no statistics of data, so distances are to full precision alone: "
            "`mpqsearch reference FOLDER` makes a file of your pictures"
        )
    n = c.samples * math.prod(run.picture[:-3])
    if n <= extractor.dim and extractor.name in PUBLISHED:
        run.say(
            f"evaluate.samples: {n} pictures have no full covariance for the {extractor.dim} features of "
            f"{extractor.name}. Distances compare maps of this study, and no published numbers."
        )
    for scorer in run.scorers:
        _rehearse(run, scorer)


def _rehearse(run: Run, scorer: Scorer) -> None:
    """Raise `ConfigError` for a scorer that cannot score what the model draws, by one black picture."""
    import torch

    from mpqsearch.metrics.scorers import FULL_PRECISION as FULL_PICTURES

    assert run.picture is not None
    shape, labels = run.picture[-3:], run.denoiser.runner.labels([run.config.evaluate.first_seed])
    if scorer.against == "prompts" and not isinstance(labels[0], str):
        raise ConfigError(
            f"{scorer.name} (evaluate.scorers) compares pictures with their prompts, and {run.config.model.source} is "
            "given none: leave it out, or name a file of prompts (prompts.file)"
        )
    black = torch.zeros(1, *shape, dtype=torch.uint8)
    try:
        scores = scorer.score(black, labels, black if scorer.against == FULL_PICTURES else None)
    except Exception as error:
        raise ConfigError(
            f"{scorer.name} (evaluate.scorers) cannot score pictures {tuple(shape)} (channels, height, width): {error}"
        ) from error
    if tuple(getattr(scores, "shape", ())) != (1,):
        raise ConfigError(f"{scorer.name} (evaluate.scorers) must give a tensor [1] for one picture, gave {scores!r}")


def _refuse_without_pictures(run: Run) -> None:
    """Raise `ConfigError` for what needs features of samples that are no pictures."""
    c = run.config
    keys = {
        'search.error = "features" (use "latents")': c.search.trials > 0 and c.search.error == "features",
        "distill.check_every": c.distill.check_every > 0 and bool(c.distill.methods),
        "evaluate.reference": bool(c.evaluate.reference),
        "evaluate.scorers": bool(c.evaluate.scorers),
    }
    for key, asked in keys.items():
        if asked:
            raise ConfigError(f"{run.config.model.source} makes no pictures, so there are no features for {key}")


def _check_budgets(run: Run) -> None:
    """Raise `InfeasibleBudgetError` for a size that is below that of all searched layers at their smallest width, and
    `ConfigError` for one above full precision."""
    c, policy = run.config, run.config.policy
    tables = [run.table.part(name) for name in run.apart] or [run.table]
    budgets = [*c.allocate.parsed(), *c.allocate.parsed_within(), *map(Budget.parse, c.search.budgets)]
    methods = [m.in_format(name) for m in c.methods if m.allocator != "map" for name in m.format_names]
    formats = [replace(c.quantizer.format(), scheme=scheme) for scheme in {m.scheme for m in methods}]
    for table, budget in ((t, b) for t in tables for b in budgets if formats and b.unit == "bits stored"):
        smallest = [size_bits(table, uniform_map(table, policy, min(policy.widths), fmt)) for fmt in formats]
        limit, full = budget.limit_bits(table, policy), FULL_PRECISION * table.n_parameters
        if limit < min(smallest):
            raise InfeasibleBudgetError(
                f"the budget {budget.label()} allows {budget.amount(limit)}; the smallest attainable is "
                f"{budget.amount(min(smallest))} ({min(smallest) / table.n_parameters:.4f} bits a parameter): every "
                f"searched layer at {min(policy.widths)} bits. Raise the budget, or allow smaller widths "
                "(policy.widths)."
            )
        if limit > full and not run.apart:  # of a small part beside a large one
            raise ConfigError(
                f"the budget {budget.label()} ({budget.amount(limit)}) is above full precision, which takes "
                f"{budget.amount(full)}: there is nothing to quantize"
            )


def _check_targets(run: Run, exported: Sequence[str]) -> None:
    """Raise `ConfigError` for a target that can have no map of this model, or that errors are asked of and that is not
    installed; and when no target that is ``exported`` holds the model. One of several is only named: an export goes on
    with the others."""
    from mpqsearch.export import get_exporter

    for target in map(target_of, run.config.allocate.targets):
        require_parts(run, target)
        if target.asks_itself:
            target.require()
    refused = []
    for target in map(get_exporter, exported):
        try:
            require_parts(run, target)
        except ConfigError as error:
            refused.append(error)
    if refused and len(refused) == len(exported):
        raise refused[0]
    for one in refused:
        run.say(f"export: will fail: {one}")


def require_parts(run: Run, target: Target) -> None:
    """Raise `ConfigError` for a target that has no place for a part of the model, or none for a budget of each part."""
    target.check_parts(run.table)
    if run.apart and not target.holds_any_map:
        raise ConfigError(
            f"{target.name} would move bits between parts, of which each keeps to the budget (budget.combine = "
            '"max"): packed and neutral hold the map as it is'
        )


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
