"""Solve the methods of a study at its budgets."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget
from mpqsearch.errors import MpqsearchError
from mpqsearch.methods import Allocation, CostTable, MethodSpec, Programs
from mpqsearch.stages.base import Run, slug
from mpqsearch.stages.importing import given_map
from mpqsearch.stages.preflight import require_parts
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.reuse import ALLOCATION, SavedAllocation, reuse_or_make
from mpqsearch.stages.searched import searched_map
from mpqsearch.stages.selecting import can_select, plain_method, say_selection, selected, selection_inputs
from mpqsearch.stages.statistics import moment_inputs, priced, priced_file
from mpqsearch.stages.targeting import plain_map

if TYPE_CHECKING:
    from mpqsearch.export import Target
    from mpqsearch.search.selection import Selection


def programs_of(run: Run, method: MethodSpec) -> Programs:
    """The study's table and policy with the profile that prices a method."""
    costs = run.config.allocate.costs
    return Programs(
        table=run.table,
        profile=priced(run, method),
        policy=run.config.policy,
        format=run.config.quantizer.format(),
        costs=CostTable.read(costs) if costs else None,
        apart=run.apart,
    )


def study_methods(run: Run) -> list[MethodSpec]:
    """The methods of the study, without those that mix widths inside layers where a latency is a budget: latencies are
    measured for whole layers."""
    c = run.config.allocate
    timed = any(b.quantity == "latency" for b in (*c.parsed(), *c.parsed_within()))
    return [m for m in run.config.methods if not (timed and m.granularity == "channel")]


def allocation(run: Run, method: MethodSpec, budget: Budget) -> tuple[BitMap, dict[str, Any]]:
    """Solve one method at one budget, or reuse its folder. Returns the map and what ``allocation.json`` holds."""
    if method.allocator == "search":
        return searched_map(run, budget)
    if method.allocator == "map":
        return given_map(run, method)
    path = run.path("allocations", slug(method.name, budget), "allocation.json")
    inputs = allocation_inputs(run, method, budget)
    solved = reuse_or_make(run, ALLOCATION, path, inputs, lambda: _solve(run, method, budget))
    return solved.bit_map, solved.data


def allocated(run: Run, method: MethodSpec, budget: Budget) -> tuple[Allocation, Selection | None]:
    """Solve one method at one budget; where that is measured, the chosen map with all that was tried."""
    if method.allocator == "measured" and can_select(run):
        return selected(run, method, budget, partial(programs_of, run))
    plain = plain_method(method, run.profile) if method.allocator == "measured" else method
    with run.timed("allocate"):
        return programs_of(run, plain).allocate(plain, budget, run.config.allocate.parsed_within()), None


def _solve(run: Run, method: MethodSpec, budget: Budget) -> SavedAllocation:
    from mpqsearch.export import neutral_extra

    solved, found = allocated(run, method, budget)
    more = {}
    if found is not None:
        say_selection(run, budget.label(), found)
        more = {"selection": found.to_data(), "bias_correction": solved.method.bias_correction}
    data = solved.to_data() | {"made_from": _made_from(run, solved.method)} | more
    provenance = {"method": method.name, "budget": data["budget"], "predicted_loss": data["predicted_loss"]}
    extra = neutral_extra(run.table, solved.bit_map, provenance=provenance)
    return SavedAllocation(bit_map=solved.bit_map, data=data, extra=extra)


def allocation_inputs(run: Run, method: MethodSpec, budget: Budget) -> dict[str, str]:
    """Digests of all that one allocation depends on."""
    c = run.config.allocate
    inputs = profile_inputs(run) | {
        "method": artifacts.digest_of([asdict(method)]),
        "budget": artifacts.digest_of(budget.label()),
    }
    inputs |= run.digests("policy")
    if run.apart:
        inputs["apart"] = artifacts.digest_of(run.apart)
    if c.within:
        inputs["within"] = artifacts.digest_of([b.label() for b in c.parsed_within()])
    if c.costs:
        inputs["costs"] = artifacts.digest_file(Path(c.costs))
    if method.allocator == "measured":
        inputs |= selection_inputs(run)
    elif method.rounding != "nearest":
        inputs |= moment_inputs(run)
    return inputs


def _made_from(run: Run, method: MethodSpec) -> dict[str, Any]:
    """What `mpqsearch.stages.checking` needs to build the same tables again."""
    costs = run.config.allocate.costs
    return {
        "profile": priced_file(method, run.profile),
        "policy": run.config.policy.to_data(),
        "format": run.config.quantizer.format().to_data(),
        "apart": list(run.apart),
        "costs": {"file": costs, "sha256": artifacts.digest_file(Path(costs))} if costs else None,
    }


def allocations(run: Run) -> list[tuple[MethodSpec, Budget, BitMap, dict[str, Any]]]:
    """All methods at all budgets of the configuration; maps from elsewhere once, at their own size."""
    out = []
    methods = study_methods(run)
    for place, given in enumerate(run.config.allocate.parsed()):
        for method in methods:
            if method.allocator == "map" and place:
                continue
            bit_map, data = allocation(run, method, given)
            budget = Budget.parse(data["budget"]) if method.allocator == "map" else given
            corrected = replace(method, bias_correction=data.get("bias_correction", method.bias_correction))
            out.append((corrected, budget, bit_map, data))
    run.say(f"allocate: {len(out)} maps in {run.path('allocations')}")
    left_out = [m.name for m in run.config.methods if m not in methods]
    if left_out:
        run.say(f"allocate: {', '.join(left_out)} left out: a latency is measured for whole layers")
    for note in dict.fromkeys(note for *_, data in out for note in data["notes"]):
        if note.startswith(("held at", "each part")):
            run.say(f"allocate: {note}")
    return out


def offers(run: Run, budget: Budget) -> list[dict[str, Any]]:
    """What every installed target that holds weights would give at a budget, the least predicted loss first, those with
    no file that small last. Nothing is written.

    Rows have ``target``, ``bytes`` (headers apart), ``predicted_loss`` (in one unit for all: that of the best loss of
    the profile), ``map`` (for any target, or its own formats), and ``obstacle``, which is empty for a file that fits.
    """
    from mpqsearch.export import TARGETS, get_exporter

    rows = []
    for target in map(get_exporter, TARGETS):
        if not target.payload or target.missing():
            continue
        row = {"target": target.name, "bytes": None, "predicted_loss": float("nan"), "map": "", "obstacle": ""}
        try:
            row |= _offer(run, target, budget)
        except MpqsearchError as error:
            row["obstacle"] = str(error)
        rows.append(row)
    return sorted(rows, key=lambda row: (bool(row["obstacle"]), row["predicted_loss"]))


def _offer(run: Run, target: Target, budget: Budget) -> dict[str, Any]:
    """What `export` would write by default: a method's map where channels keep their widths, else the target's own."""
    from mpqsearch.export import ExportJob
    from mpqsearch.export.target import SIZE_TOLERANCE

    require_parts(run, target)
    if target.granularity == "channel":
        method = run.config.method(run.config.chosen_method(None))
        plain = plain_method(method, run.profile) if method.allocator == "measured" else method
        made = programs_of(run, plain).allocate(plain, budget, run.config.allocate.parsed_within())
        job = ExportJob(table=run.table, bit_map=made.bit_map)
        size = target.promise(job, target.plan(job)).total
        loss = made.predicted_loss if made.result is None else float(made.result.loss)
        over = budget.unit == "bits stored" and size > (1 + SIZE_TOLERANCE) * made.limit
        obstacle = f"the map fits ({made.size_bytes} bytes), this file of it does not" if over else ""
        of = f"of {plain.allocator}, widths as they are"
        return {"bytes": -(-size // 8), "predicted_loss": loss, "map": of, "obstacle": obstacle}
    own = plain_map(run, target, budget)
    used = Counter(own.choices.values())
    formats = ", ".join(f"{n} {name}" for name, n in used.most_common())
    return {"bytes": -(-own.stored.total // 8), "predicted_loss": own.loss, "map": formats}
