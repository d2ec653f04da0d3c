"""Maps for one target: solved over its own formats, with its true stored cost and the error of its own quantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget
from mpqsearch.errors import ConfigError
from mpqsearch.stages.base import Run, same_model, slug
from mpqsearch.stages.preflight import target_of
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.reuse import ALLOCATION, SavedAllocation, reuse_or_make

if TYPE_CHECKING:
    from torch import Tensor

    from mpqsearch.allocate import PairwiseTerms
    from mpqsearch.export import Target
    from mpqsearch.export.allocation import Floats

PROBES = 2
"""Random projections of each probed trajectory."""


def target_allocation(run: Run, name: str, budget: Budget) -> tuple[BitMap, dict[str, Any]]:
    """Solve over the formats of a target at one budget, or reuse its folder. Returns the map and what
    ``allocation.json`` holds.

    The folder is ``allocations/target-<name>@<budget>``; ``bitmap.json`` names the target's format of every layer in
    its provenance. Raises `InfeasibleBudgetError`, with the size of the target's smallest file, when nothing fits.
    """
    target = target_of(name)
    inputs = profile_inputs(run) | {
        "target": artifacts.digest_of([name, [c.name for c in target.all_choices()]]),
        "budget": artifacts.digest_of(budget.label()),
        "probes": artifacts.digest_of(run.config.allocate.target_probes),
    }
    inputs |= run.digests("policy")
    path = run.path("allocations", slug(f"target-{name}", budget), "allocation.json")
    solved = reuse_or_make(run, ALLOCATION, path, inputs, lambda: solved_for(run, target, budget))
    return solved.bit_map, solved.data


def solved_for(run: Run, target: Target, budget: Budget) -> SavedAllocation:
    """Solve over the formats of a target at one budget; see `target_allocation`."""
    from mpqsearch.export import neutral_extra
    from mpqsearch.export.allocation import allocate_for

    policy, fmt = run.config.policy, run.config.quantizer.format()
    limit = budget.limit_bits(run.table, policy)
    losses, pairs = losses_for(run, target)
    with run.timed("allocate"):
        solved = allocate_for(target, run.table, losses, limit, policy, fmt=fmt, pairs=pairs)
    data = solved.to_data() | {"budget": budget.label()}
    provenance = {k: data[k] for k in ("target", "choices", "stored_bits", "size_bits", "predicted_loss", "budget")}
    extra = neutral_extra(run.table, solved.bit_map, provenance=provenance)
    return SavedAllocation(bit_map=solved.bit_map, data=data, extra=extra)


def target_allocations(run: Run) -> list[tuple[str, Budget, BitMap, dict[str, Any]]]:
    """All targets of ``[allocate]`` at all its budgets."""
    c = run.config.allocate
    out = [(name, b, *target_allocation(run, name, b)) for b in c.parsed() for name in c.targets]
    if out:
        run.say(f"allocate: {len(out)} maps for {', '.join(c.targets)} in {run.path('allocations')}")
    return out


def losses_for(run: Run, target: Target) -> tuple[dict[str, Floats], PairwiseTerms | None]:
    """Losses of layers in the target's formats, and of pairs of layers where those are probed; made once a run for each
    target."""
    return run.once(("losses", target.name), lambda: _losses(run, target))


def _losses(run: Run, target: Target) -> tuple[dict[str, Floats], PairwiseTerms | None]:
    if target.asks_itself:
        target.require()
    with run.timed("allocate"):
        if run.config.allocate.target_probes:
            return _probed(run, target)
        return _priced(run, target), None


def _priced(run: Run, target: Target) -> dict[str, Floats]:
    from mpqsearch.export.allocation import target_losses

    if not run.profile.weights_only:
        same_model(run)
        modules: dict[str, Any] = dict(run.denoiser.module.named_modules())

    def weight_of(name: str) -> Tensor:
        weight: Tensor = run.streamed.read(f"{name}.weight") if run.profile.weights_only else modules[name].weight
        return weight

    return target_losses(target, run.table, weight_of, run.profile, run.config.quantizer.format())


def _probed(run: Run, target: Target) -> tuple[dict[str, Floats], PairwiseTerms]:
    import numpy as np

    from mpqsearch.export.allocation import probed_losses, target_errors
    from mpqsearch.profile import WeightErrors, projected_effects
    from mpqsearch.progress import bars_of

    c = run.config
    if c.calibration.weights_only or c.calibration.captured:
        raise ConfigError(
            "allocate.target_probes needs our own sampler on a loaded model; leave it out to price errors with the "
            "profile"
        )
    same_model(run)
    errors = target_errors(target, run.table, run.denoiser.module, c.quantizer.format())
    first = c.calibration.first_seed
    with bars_of() as progress:
        effects = projected_effects(
            run.denoiser,
            run.table,
            range(first, first + c.allocate.target_probes),
            WeightErrors(run.table, {target.name: errors}),
            probes=PROBES,
            seed=c.calibration.seed,
            checkpoint=c.calibration.checkpoint,
            progress=progress,
        )
    uncorrected = effects[target.name][:, 0].astype(np.float64)  # no export corrects a bias
    return probed_losses(uncorrected, run.table)
