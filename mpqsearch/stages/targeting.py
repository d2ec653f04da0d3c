"""Maps for one target: solved over its own formats, with its true stored cost and the error of its own quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, Policy
from mpqsearch.core.policy import HELD_BITS
from mpqsearch.errors import ConfigError, InfeasibleBudgetError
from mpqsearch.methods import MethodSpec, Programs
from mpqsearch.specs.targets import FULL
from mpqsearch.stages.base import Run, same_model, slug
from mpqsearch.stages.preflight import require_parts, target_of
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.reuse import ALLOCATION, SavedAllocation, reuse_or_make
from mpqsearch.stages.selecting import HELD, can_select, candidate_file, race, say_selection, selection_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mpqsearch.allocate import PairwiseTerms
    from mpqsearch.export import Target
    from mpqsearch.export.allocation import Floats, TargetAllocation
    from mpqsearch.search.surrogate import Candidate

PROBES = 2
"""Random projections of each probed trajectory; half of those that the profile takes by default."""

SLIGHT = 0.002
"""Share of a budget below which names and shapes are not counted."""

TENSORS, DESCRIPTION = 5, 200
"""Tensors that a layer may have in a file, and bytes that describe one beside its name: more than any format has."""

SHRINKAGES = (1.0, 0.5)
"""How far the prices of layers are shrunk in the maps that are tried beside the plain one, safest first."""

PRACTICE = {"gguf": "k-quant", "sdnq": "sdnq-dynamic"}
"""The rule by which users of a target mix widths (`mpqsearch.methods.baselines`); of all others ``first-last-high``."""

SIZES = 4
"""Sizes at which a rule is tried, so that the formats of its widths fill the budget."""


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
    inputs |= run.digests("policy") | selection_inputs(run)
    path = run.path("allocations", slug(f"target-{name}", budget), "allocation.json")
    solved = reuse_or_make(run, ALLOCATION, path, inputs, lambda: _solve(run, target, budget))
    return solved.bit_map, solved.data


def _solve(run: Run, target: Target, budget: Budget) -> SavedAllocation:
    """The best of some maps for a target, by samples of what its consumer decodes from their files where that can be
    measured here; else the `plain_map`."""
    from mpqsearch.export import neutral_extra

    made, more = plain_map(run, target, budget), dict[str, Any]()
    names = names_bits(run, target, budget, made)
    if names:
        made = plain_map(run, target, budget, names)
    if target.decodes and not target.missing() and can_select(run):
        made, more = _selected(run, target, budget, made)
    data = made.to_data() | {"budget": budget.label(), "limit": made.limit + names, "names_bits": names} | more
    provenance = {k: data[k] for k in ("target", "choices", "stored_bits", "size_bits", "predicted_loss", "budget")}
    extra = neutral_extra(run.table, made.bit_map, provenance=provenance)
    return SavedAllocation(bit_map=made.bit_map, data=data, extra=extra)


def plain_map(run: Run, target: Target, budget: Budget, names: int = 0) -> TargetAllocation:
    """The map of least predicted loss over the formats of a target, unmeasured, whose tensors leave room for ``names``
    bits in the budget."""
    require_parts(run, target)
    limit = budget.limit_bits(run.table, run.config.policy) - names
    return _solved(run, target, limit, run.config.policy, *losses_for(run, target))


def names_bits(run: Run, target: Target, budget: Budget, made: TargetAllocation) -> int:
    """Bits of names and shapes in the file of a map, which a budget counts as it counts tensors; 0 where they cannot
    matter, or where no file can be written here."""
    names = [*run.table.by_name, *(k.name for k in run.table.kept)]
    most = 8 * sum(TENSORS * (len(name) + DESCRIPTION) for name in names)
    written = target.payload and not target.missing() and not run.dry_run and not run.profile.weights_only
    if not written or most < SLIGHT * made.limit:
        return 0
    try:
        with candidate_file(run, _candidate(run, target, budget, made)) as (_, folder):
            return 8 * target.sizes(folder)["header_bytes"]
    except ConfigError:
        return 0  # the export will say why


def _solved(
    run: Run,
    target: Target,
    limit: int,
    policy: Policy,
    losses: Mapping[str, Floats],
    pairs: PairwiseTerms | None = None,
) -> TargetAllocation:
    from mpqsearch.export.allocation import allocate_for

    with run.timed("allocate"):
        return allocate_for(target, run.table, losses, limit, policy, fmt=run.config.quantizer.format(), pairs=pairs)


def _selected(
    run: Run, target: Target, budget: Budget, plain: TargetAllocation
) -> tuple[TargetAllocation, dict[str, Any]]:
    """The map whose file is nearest to full precision, and all that was measured; the plain one where the target cannot
    write the model."""
    maps = _variants(run, target, plain)
    candidates = {label: _candidate(run, target, budget, made) for label, made in maps.items()}
    try:
        found = race(run, candidates)
    except ConfigError as error:
        run.say(f"select: maps for {target.name} are not measured: {error}")
        return plain, {}
    say_selection(run, f"{budget.label()} for {target.name}", found)
    return maps[found.chosen.label], {"selection": found.to_data()}


def _candidate(run: Run, target: Target, budget: Budget, made: TargetAllocation) -> Candidate:
    from mpqsearch.core import average_bits
    from mpqsearch.search.surrogate import Candidate

    return Candidate(
        bit_map=made.bit_map,
        budget=budget,
        bias_correction=True,  # as `export` does for a map of the target's own
        predicted=made.loss,
        size_bytes=-(-made.stored.total // 8),
        average_bits=average_bits(run.table, made.bit_map),
        target=target.name,
        choices=made.choices,
    )


def _variants(run: Run, target: Target, plain: TargetAllocation) -> dict[str, TargetAllocation]:
    """The different maps that are tried, safest first: uniform types, the rule of practice, then maps by layer whose
    prices are believed more and more. Losses are those of the plain map's prices, for all.

    The widths of first and last layer are a choice too where the policy is the one that nobody wrote.
    """
    from mpqsearch.export.allocation import formats_of, shrunk_losses, uniform_maps

    policy, (losses, squared) = run.config.policy, _priced(run, target)
    free = replace(policy, roles={"unused": HELD_BITS}) if policy == Policy(widths=policy.widths) else policy
    columns = {name: j for j, name in enumerate(formats_of(target, run.table))}

    def priced(made: TargetAllocation) -> TargetAllocation:
        return replace(made, loss=sum(float(losses[n][columns[c]]) for n, c in made.choices.items()))

    uniform = uniform_maps(target, run.table, None if free is not policy else policy, fmt=plain.bit_map.format)
    fitting = {f"uniform {n}": priced(m) for n, m in uniform.items() if m.stored.total <= plain.limit}
    tried: dict[str, TargetAllocation] = {}
    if fitting:  # the largest, and the one of least predicted loss
        for name in (max(fitting, key=lambda n: fitting[n].stored.total), min(fitting, key=lambda n: fitting[n].loss)):
            tried[name] = fitting[name]
    tried |= _practice(run, target, plain)
    for share in SHRINKAGES:
        label = f"by layer, prices shrunk by {share:g}"
        tried[label] = _solved(run, target, plain.limit, policy, shrunk_losses(losses, squared, share))
    tried["by layer"] = _solved(run, target, plain.limit, policy, losses)
    if free is not policy:
        tried["by layer, ends free"] = _solved(run, target, plain.limit, free, losses)
    if run.config.allocate.target_probes:
        tried["by layer, interactions"] = plain
    elif _can_probe(run, target):
        tried["by layer, interactions"] = _solved(run, target, plain.limit, policy, *_probes_of(run, target))
    different: dict[str, TargetAllocation] = {}
    for label, made in tried.items():
        if all(made.choices != other.choices for other in different.values()):
            different[label] = priced(made)
    return different


def _practice(run: Run, target: Target, plain: TargetAllocation) -> dict[str, TargetAllocation]:
    """The largest map, no larger than the ``plain`` one may be, of the rule by which users of a target mix widths: each
    layer in the target's next format up. Empty where none fits, or the profile lacks what the rule looks at."""
    from mpqsearch.export import ExportJob
    from mpqsearch.export.allocation import allocation_of

    policy, fmt = run.config.policy, plain.bit_map.format
    widths = tuple(w for w in policy.widths if w in target.widths)
    rule = PRACTICE.get(target.name, "first-last-high")
    method = MethodSpec(name=rule, allocator=rule)
    found: dict[str, TargetAllocation] = {}
    size = plain.limit
    try:
        programs = Programs(table=run.table, profile=run.profile, policy=replace(policy, widths=widths), format=fmt)
        for _ in range(SIZES):
            bit_map = programs.allocate(method, Budget(quantity="bytes", limit=size / 8)).bit_map
            plan = target.plan(ExportJob(table=run.table, bit_map=bit_map))
            picked = {e.layer: e.choice or FULL for e in plan}
            made = allocation_of(target, run.table, picked, limit=plain.limit, fmt=fmt)
            room = plain.limit - made.stored.total
            if room >= 0 and (not found or made.stored.total > found[rule].stored.total):
                found[rule] = made
            size += room
    except (ConfigError, InfeasibleBudgetError):
        pass  # too small for the rule, above full precision, or without its statistics
    return found


def target_allocations(run: Run) -> list[tuple[str, Budget, BitMap, dict[str, Any]]]:
    """All targets of ``[allocate]`` at all its budgets."""
    c = run.config.allocate
    out = [(name, b, *target_allocation(run, name, b)) for b in c.parsed() for name in c.targets]
    if out:
        run.say(f"allocate: {len(out)} maps for {', '.join(c.targets)} in {run.path('allocations')}")
    return out


def losses_for(run: Run, target: Target) -> tuple[Mapping[str, Floats], PairwiseTerms | None]:
    """Losses of layers in the target's formats, and of pairs of layers where those are probed; made once a run for each
    target."""
    if run.config.allocate.target_probes:
        return _probes_of(run, target)
    return _priced(run, target)[0], None


def _priced(run: Run, target: Target) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Losses by the prices of the profile, and the squared errors that they price; made once a run for each target."""
    from mpqsearch.export.allocation import target_losses, target_squares

    weights_only = run.profile.weights_only

    def weight_of(name: str) -> Tensor:
        owner: Any = None if weights_only else run.denoiser.module.get_submodule(name)
        weight: Tensor = run.streamed.read(f"{name}.weight") if weights_only else owner.weight
        return weight

    def make() -> tuple[dict[str, Floats], dict[str, Floats]]:
        if target.asks_itself:
            target.require()
        if not weights_only:
            same_model(run)
        with run.timed("allocate"):
            squared = target_squares(target, run.table, weight_of, run.config.quantizer.format())
            return target_losses(squared, run.table, run.profile), squared

    return run.once(("losses", target.name), make)


def _can_probe(run: Run, target: Target) -> bool:
    """Whether a target's own errors can be probed as those of the profile were, and be held in memory."""
    formats = len({c.name for la in run.table for c in target.choices(la)})
    size = 4 * formats * sum(la.n_weights for la in run.table)
    return "layer_sampler_error" in run.profile.families and size <= HELD


def _probes_of(run: Run, target: Target) -> tuple[dict[str, Floats], PairwiseTerms]:
    return run.once(("probed", target.name), lambda: _probed(run, target))


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
    if target.asks_itself:
        target.require()
    same_model(run)
    errors = target_errors(target, run.table, run.denoiser.module, c.quantizer.format())
    first, n = c.calibration.first_seed, c.allocate.target_probes or c.calibration.sampler_seeds
    with run.timed("allocate"), bars_of() as progress:
        effects = projected_effects(
            run.denoiser,
            run.table,
            range(first, first + n),
            WeightErrors(run.table, {target.name: errors}),
            probes=PROBES,
            seed=c.calibration.seed,
            checkpoint=c.calibration.checkpoint,
            progress=progress,
        )
    uncorrected = effects[target.name][:, 0].astype(np.float64)  # of weights; biases are corrected in the file
    return probed_losses(uncorrected, run.table)
