"""What a finished search hands to other stages: its results, and the map that it found at each budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget, bops, size_bits
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.stages.base import Run
from mpqsearch.stages.profiling import profile_inputs
from mpqsearch.stages.reuse import SEARCH, current


def results_file(run: Run) -> Path:
    """Where the results of the search are."""
    return run.path("search", "search.json")


def map_file(run: Run, budget: Budget) -> Path:
    """Where the map of the search at a budget is."""
    return run.path("search", "maps", f"{budget.label().replace(':', '-')}.json")


def search_inputs(run: Run) -> dict[str, str]:
    """Digests of all that the result of a search depends on."""
    c = run.config.to_data()
    c["search"]["budgets"] = [b.label() for b in budgets_of(run)]
    parts = {
        "methods": [m for m in c["methods"] if m["allocator"] != "map"],
        "evaluate": run.evaluation_inputs,
        "search": c["search"],
    }
    inputs = profile_inputs(run) | run.digests("policy", "quantizer")
    return inputs | {name: artifacts.digest_of(part) for name, part in parts.items()}


def budgets_of(run: Run) -> tuple[Budget, ...]:
    """The budget grid of the search."""
    texts = run.config.search.budgets or run.config.allocate.budgets
    return tuple(Budget.parse(t) for t in texts)


def search_results(run: Run) -> dict[str, Any] | None:
    """What ``search.json`` holds, when this run has a search and it is finished; one that is not is said."""
    if not run.config.search.trials:
        return None
    found = current(SEARCH, results_file(run), search_inputs(run)) if results_file(run).exists() else None
    if found is None:
        run.say(f"report: the search is left out, {results_file(run)} is not there or not whole: mpqsearch search")
    return found


def searched_map(run: Run, budget: Budget) -> tuple[BitMap, dict[str, Any]]:
    """The map that a finished search hands out at a budget, with what ``allocation.json`` would hold."""
    path = results_file(run)
    if not artifacts.is_current(path, SEARCH.schema, search_inputs(run)):
        raise ArtifactError(f"{path} does not exist: run `mpqsearch search` first (or `mpqsearch run`, which does)")
    entries = {b["budget"]: b for b in SEARCH.load(path)["budgets"]}
    if budget.label() not in entries:
        raise ConfigError(
            f"the search has no map at the budget {budget.label()}; it has {', '.join(entries)}. Add it to "
            "search.budgets."
        )
    entry = entries[budget.label()]
    row = next(r for r in entry["rows"] if r["arm"] == "search")
    bit_map = artifacts.load_bit_map(map_file(run, budget))
    if bit_map.digest != row["bit_map"]:
        raise ArtifactError(
            f"the map of the search at {budget.label()} is not the one that search.json names; search again"
        )
    stored, operations = size_bits(run.table, bit_map), bops(run.table, bit_map)
    in_bops = budget.quantity == "bops"
    limit = int(budget.limit) if in_bops else budget.limit_bits(run.table, run.config.policy)
    return bit_map, {
        "budget": budget.label(),
        "limit": limit,
        "size_bits": stored,
        "bops": operations,
        "within_budget": (operations if in_bops else stored) <= limit,
        "predicted_loss": row["predicted"],
        "bit_map_digest": bit_map.digest,
        "bias_correction": row["bias_correction"],
        "result": None,
        "notes": ["it measures worse than the uniform map of the same size"] if entry["worse_than_uniform"] else [],
        "trial": row["trial"],
        "params": row["params"],
    }
