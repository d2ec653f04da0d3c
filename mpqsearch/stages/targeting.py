"""Maps for one target: solved over its own formats, with its true stored cost and the error of its own quantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, LayerTable, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.stages.base import Run, same_model, slug
from mpqsearch.stages.profiling import profile_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mpqsearch.allocate import PairwiseTerms
    from mpqsearch.export import Target
    from mpqsearch.export.allocation import Floats

PROBES = 2
"""Random projections of each probed trajectory."""


def target_of(name: str) -> Target:
    """The target of that name. Raises `UnknownNameError` for an unknown one, `ConfigError` for one that has no formats
    of its own."""
    from mpqsearch.export import get_exporter

    target = get_exporter(name)
    if target.holds_any_map:
        raise ConfigError(f"the target {name!r} holds every map as it is: leave out --target (or allocate.targets)")
    return target


def target_allocation(
    run: Run, table: LayerTable, measured: SensitivityProfile, name: str, budget: Budget
) -> tuple[BitMap, dict[str, Any]]:
    """Solve over the formats of a target at one budget, or reuse its folder. Returns the map and what
    ``allocation.json`` holds.

    The folder is ``allocations/target-<name>@<budget>``; ``bitmap.json`` names the target's format of every layer in
    its provenance. Raises `InfeasibleBudgetError`, with the size of the target's smallest file, when nothing fits.
    """
    target = target_of(name)
    folder = run.path("allocations", slug(f"target-{name}", budget))
    inputs = profile_inputs(run, table) | {
        "target": artifacts.digest_of([name, [c.name for c in target.all_choices()]]),
        "budget": artifacts.digest_of(budget.label()),
        "policy": artifacts.digest_of(run.config.to_data()["policy"]),
        "probes": artifacts.digest_of(run.config.allocate.target_probes),
    }
    path, map_path = folder / "allocation.json", folder / "bitmap.json"
    if artifacts.is_current(path, "mpqsearch/allocation", inputs, overwrite=run.overwrite):
        return artifacts.load_bit_map(map_path), artifacts.read_json(path, "mpqsearch/allocation").data
    from mpqsearch.export import neutral_extra
    from mpqsearch.export.allocation import allocate_for

    limit = budget.limit_bits(table, run.config.policy)
    losses, pairs = losses_for(run, table, measured, target)
    with run.timed("allocate"):
        solved = allocate_for(
            target, table, losses, limit, run.config.policy, fmt=run.config.quantizer.format(), pairs=pairs
        )
    data = solved.to_data() | {"budget": budget.label()}
    if not run.dry_run:
        provenance = {k: data[k] for k in ("target", "choices", "stored_bits", "size_bits", "predicted_loss", "budget")}
        artifacts.save_bit_map(
            map_path, solved.bit_map, inputs, neutral_extra(table, solved.bit_map, provenance=provenance)
        )
        artifacts.write_json(path, "mpqsearch/allocation", data, inputs)
    return solved.bit_map, data


def target_allocations(
    run: Run, table: LayerTable, measured: SensitivityProfile
) -> list[tuple[str, Budget, BitMap, dict[str, Any]]]:
    """All targets of ``[allocate]`` at all its budgets."""
    c = run.config.allocate
    out = [(name, b, *target_allocation(run, table, measured, name, b)) for b in c.parsed() for name in c.targets]
    if out:
        run.say(f"allocate: {len(out)} maps for {', '.join(c.targets)} in {run.path('allocations')}")
    return out


def losses_for(
    run: Run, table: LayerTable, measured: SensitivityProfile, target: Target
) -> tuple[dict[str, Floats], PairwiseTerms | None]:
    """Losses of layers in the target's formats, and of pairs of layers where those are probed; made once a run for each
    target."""
    if target.name not in run.target_losses:
        if target.asks_itself:
            target.require()
        probed = run.config.allocate.target_probes
        with run.timed("allocate"):
            run.target_losses[target.name] = (
                _probed(run, table, target) if probed else (_priced(run, table, measured, target), None)
            )
    losses: tuple[dict[str, Floats], PairwiseTerms | None] = run.target_losses[target.name]
    return losses


def _priced(run: Run, table: LayerTable, measured: SensitivityProfile, target: Target) -> dict[str, Floats]:
    from mpqsearch.export.allocation import target_losses

    if not measured.weights_only:
        same_model(run, table)
        modules: dict[str, Any] = dict(run.denoiser.module.named_modules())

    def weight_of(name: str) -> Tensor:
        weight: Tensor = run.streamed.read(f"{name}.weight") if measured.weights_only else modules[name].weight
        return weight

    return target_losses(target, table, weight_of, measured, run.config.quantizer.format())


def _probed(run: Run, table: LayerTable, target: Target) -> tuple[dict[str, Floats], PairwiseTerms]:
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
    same_model(run, table)
    errors = target_errors(target, table, run.denoiser.module, c.quantizer.format())
    first = c.calibration.first_seed
    with bars_of() as progress:
        effects = projected_effects(
            run.denoiser,
            table,
            c.sampler,
            range(first, first + c.allocate.target_probes),
            WeightErrors(table, {target.name: errors}),
            probes=PROBES,
            seed=c.calibration.seed,
            checkpoint=c.calibration.checkpoint,
            progress=progress,
        )
    uncorrected = effects[target.name][:, 0].astype(np.float64)  # no export corrects a bias
    return probed_losses(uncorrected, table)
