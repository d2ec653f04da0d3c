"""The allocation algorithms of other systems, written anew, on the same tables: ``python
tests/benchmarks/peers_benchmark.py``.

Tables: widths 2, 3, 4, 5, 6, 8, 16 with a 32-bit scale and zero point for every 64 weights, scores over eight decades
that fall about fourfold a bit, a budget of 4.5 stored bits a weight. Every row is one algorithm at one scale of the
scores: its loss over the optimum, the share of the budget it uses, what it says of itself, processor seconds.

- ``pulp``: one binary per layer and format, raw scores, PuLP's bundled CBC with its defaults (as NVIDIA ModelOpt's and
  Sony MCT's allocators do).
- ``dictionary DP``: exact totals of bits as keys of a dictionary, dominated states dropped (as auto-round's).
- ``greedy``: the layer with the best gain per bit takes one step up until nothing fits (as exllamav3's).
- ``ours``: ``mpqsearch.allocate.solve``.

Only the algorithms are compared; the systems themselves do more, and may have changed since.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mpqsearch.allocate import AllocationProblem, CostBudget, solve

BITS = np.array([2, 3, 4, 5, 6, 8, 16])
Answer = tuple[np.ndarray | None, str]
"""Choice of every layer (None: did not finish) and what the algorithm says of it."""


def instance(layers: int, seed: int = 0) -> AllocationProblem:
    """Scores over eight decades; sizes of transformer and convolution layers."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([320, 640, 1280, 2560], layers) * rng.choice([320, 640, 1280, 2880, 5760, 11520], layers)
    loss = (
        10.0 ** rng.uniform(-8, 0, layers)[:, None] * 4.0 ** -(BITS - 2.0) * rng.lognormal(0, 0.3, (layers, len(BITS)))
    )
    cost = weights[:, None] * BITS + (weights // 64 * 32)[:, None]
    return AllocationProblem(loss=loss, budgets=(CostBudget(name="bits", cost=cost, limit=int(4.5 * weights.sum())),))


def pulp_raw(problem: AllocationProblem, scale: float, limit_s: float) -> Answer:
    """The plain model in the unit of the scores."""
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    n, k = problem.loss.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picks = [[pulp.LpVariable(f"x_{i}_{j}", cat="Binary") for j in range(k)] for i in range(n)]
        cells = [(i, j) for i in range(n) for j in range(k)]
        model += pulp.lpSum(float(problem.loss[i, j] * scale) * picks[i][j] for i, j in cells)
        for row in picks:
            model += pulp.lpSum(row) == 1
        cost, limit = problem.budgets[0].cost, problem.budgets[0].limit
        model += pulp.lpSum(int(cost[i, j]) * picks[i][j] for i, j in cells) <= limit
        model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=limit_s))
    return np.array([int(np.argmax([v.value() or 0 for v in row])) for row in picks]), pulp.LpStatus[model.status]


def dictionary_dp(problem: AllocationProblem, scale: float, limit_s: float) -> Answer:
    """Total cost -> (loss, choices), dominated totals dropped after every layer."""
    began = time.process_time()
    states: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for losses, costs in zip((problem.loss * scale).tolist(), problem.budgets[0].cost.tolist(), strict=True):
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (total, choices) in states.items():
            for j, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
                size, value = used + cost, total + loss
                if size <= problem.budgets[0].limit and (size not in grown or value < grown[size][0]):
                    grown[size] = (value, (*choices, j))
        states, least = {}, float("inf")
        for size in sorted(grown):
            if grown[size][0] < least:
                least, states[size] = grown[size][0], grown[size]
        if time.process_time() - began > limit_s:
            return None, f"not finished after {limit_s:.0f} s"
    return np.array(min(states.values())[1]), "exact"


def greedy(problem: AllocationProblem, scale: float, limit_s: float) -> Answer:
    """One step up for the best gain per bit, from the cheapest map."""
    loss, cost = problem.loss * scale, problem.budgets[0].cost
    rows = np.arange(len(loss))
    choice = np.zeros(len(loss), dtype=int)
    left = problem.budgets[0].limit - int(cost[:, 0].sum())
    while True:
        following = np.minimum(choice + 1, loss.shape[1] - 1)
        extra = cost[rows, following] - cost[rows, choice]
        gain = loss[rows, choice] - loss[rows, following]
        rate = np.where((extra > 0) & (extra <= left), gain / np.maximum(extra, 1), -np.inf)
        best = int(np.argmax(rate))
        if not rate[best] > 0:
            return choice, "-"
        left -= int(extra[best])
        choice[best] += 1


def ours(problem: AllocationProblem, scale: float, limit_s: float) -> Answer:
    """The certified optimum."""
    result = solve(replace(problem, loss=problem.loss * scale))
    return result.choice, f"{result.status}, gap {result.gap:.1e}"


ALGORITHMS: dict[str, Callable[[AllocationProblem, float, float], Answer]] = {
    "ours": ours,
    "pulp": pulp_raw,
    "dictionary DP": dictionary_dp,
    "greedy": greedy,
}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="16,120,794")
    parser.add_argument(
        "--limit-s", type=float, default=60.0, help="processor seconds for the dictionary, wall seconds for CBC"
    )
    arguments = parser.parse_args()
    sys.stdout.write(
        "| layers | scores x | algorithm | loss / optimum | budget used | it says | CPU s "
        "|\n|---|---|---|---|---|---|---|\n"
    )
    for count in (int(text) for text in arguments.layers.split(",")):
        problem = instance(count)
        optimum = solve(problem)
        assert optimum.status == "optimal"
        for name, algorithm in ALGORITHMS.items():
            for scale in (1.0, 1e-9) if name in ("ours", "pulp") else (1.0,):
                before, children = time.process_time(), os.times()
                choice, says = algorithm(problem, scale, arguments.limit_s)
                after = os.times()
                spent = time.process_time() - before + after.children_user - children.children_user
                ratio, fill = "-", "-"
                if choice is not None:
                    loss, costs = problem.evaluate(choice)
                    ratio, fill = f"{loss / optimum.loss:.4g}", f"{costs[0] / problem.budgets[0].limit:.4f}"
                sys.stdout.write(f"| {count} | {scale:g} | {name} | {ratio} | {fill} | {says} | {spent:.3g} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
