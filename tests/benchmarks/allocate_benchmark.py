"""What the allocator takes, and what it proves: ``python tests/benchmarks/allocate_benchmark.py``.

Losses are synthetic (weights x sensitivity x 4^-bits with noise); SD 1.5 means the 282 layers and 318,404 output
channels of its public configuration. Processor seconds of one thread, best of several runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mpqsearch.allocate import AllocationProblem, CostBudget, check_certificate, solve, solve_path

BITS = np.arange(2, 9)
Shape = tuple[int, int]
"""Output channels and weights per channel of one layer."""


def sd15_layers() -> list[Shape]:
    """The 282 convolutions and linear layers of the SD 1.5 denoiser."""
    layers: list[Shape] = [(320, 4 * 9), (1280, 320), (1280, 1280)]

    def resnet(into: int, out: int) -> None:
        layers.extend([(out, into * 9), (out, 1280), (out, out * 9)])
        if into != out:
            layers.append((out, into))

    def transformer(width: int) -> None:
        layers.append((width, width))
        layers.extend([(width, width)] * 4)
        layers.extend([(width, width), (width, 768), (width, 768), (width, width)])
        layers.extend([(8 * width, width), (width, 4 * width), (width, width)])

    widths, skips, at = (320, 640, 1280, 1280), [320], 320
    for level, width in enumerate(widths):
        for _ in range(2):
            resnet(at, width)
            at = width
            skips.append(at)
            if level < 3:
                transformer(width)
        if level < 3:
            layers.append((width, width * 9))
            skips.append(width)
    resnet(1280, 1280)
    transformer(1280)
    resnet(1280, 1280)
    for level, width in enumerate(reversed(widths)):
        for _ in range(3):
            resnet(at + skips.pop(), width)
            at = width
            if level > 0:
                transformer(width)
        if level < 3:
            layers.append((width, width * 9))
    layers.append((4, 320 * 9))
    assert (len(layers), sum(out for out, _ in layers)) == (282, 318_404)
    return layers


def channel_problem(layers: list[Shape], average: float = 4.4, noise: float = 0.1, seed: int = 0) -> AllocationProblem:
    """One item per output channel."""
    rng = np.random.default_rng(seed)
    counts = [out for out, _ in layers]
    weights = np.repeat([w for _, w in layers], counts)
    sensitivity = np.repeat(rng.lognormal(0, 2, len(layers)), counts) * rng.lognormal(0, 0.7, weights.size)
    loss = (sensitivity * weights)[:, None] * 4.0**-BITS * (1 + noise * rng.random((weights.size, 7)))
    layer = np.repeat(np.arange(len(layers)), counts)
    bits = CostBudget(name="bits", cost=weights[:, None] * BITS, limit=int(average * weights.sum()))
    return AllocationProblem(loss=loss, budgets=(bits,), layer=layer)


def layer_problem(count: int, seed: int = 0, average: float = 4.37) -> AllocationProblem:
    """One item per layer: eight decades of losses, group-64 scales in the costs."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([320, 640, 1280, 2560], count) * rng.choice([320, 768, 1280, 2880, 5760, 11520], count)
    loss = 10.0 ** rng.uniform(-8, 0, count)[:, None] * 4.0 ** -(BITS - 2.0) * rng.lognormal(0, 0.3, (count, 7))
    cost = weights[:, None] * BITS + (weights // 64 * 32)[:, None]
    bits = CostBudget(name="bits", cost=cost, limit=int((average + 0.5) * weights.sum()))
    return AllocationProblem(loss=loss, budgets=(bits,))


def with_bops(problem: AllocationProblem, share: float = 1.9) -> AllocationProblem:
    """A second budget: BOPs of at most ``share`` of what they can fall to."""
    rng = np.random.default_rng(5)
    positions = np.repeat(rng.integers(1, 400, problem.n_items // 100 + 1), 100)[: problem.n_items]
    bops = problem.budgets[0].cost.astype(np.int64) * positions[:, None] * 8
    budget = CostBudget(name="BOPs", cost=bops, limit=int(bops.min(axis=1).sum() * share))
    return replace(problem, budgets=(*problem.budgets, budget))


ROWS: dict[str, Callable[[], AllocationProblem]] = {
    "282 layers": lambda: layer_problem(282),
    "794 layers": lambda: layer_problem(794),
    "SD 1.5 channels": lambda: channel_problem(sd15_layers()),
    "282 layers, two budgets": lambda: with_bops(layer_problem(282)),
    "794 layers, two budgets": lambda: with_bops(layer_problem(794)),
    "282 layers, three formats": lambda: replace(layer_problem(282), max_formats=3),
    "SD 1.5 channels, two budgets": lambda: with_bops(channel_problem(sd15_layers())),
    "SD 1.5 channels, three formats": lambda: replace(channel_problem(sd15_layers()), max_formats=3),
    "SD 1.5 channels, two formats a layer": lambda: replace(channel_problem(sd15_layers()), max_formats_per_layer=2),
}


def spent(work: Callable[[], object], times: int) -> float:
    """Least processor seconds of several runs."""
    seconds = []
    for _ in range(times):
        before = time.process_time()
        work()
        seconds.append(time.process_time() - before)
    return min(seconds)


def main() -> None:
    """Print the table as Markdown; with arguments the rows whose names contain one of them."""
    sys.stdout.write("| problem | status | proof | certified gap | seconds | check, s |\n|---|---|---|---|---|---|\n")
    for name, make in ROWS.items():
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        problem = make()
        result = solve(problem)
        seconds = spent(lambda: solve(problem), 3 if result.seconds < 2 else 1)  # noqa: B023
        started = time.process_time()
        check = check_certificate(result.certificate(problem), problem, result.choice)
        checked = time.process_time() - started
        assert check.valid, check
        line = f"| {name} | {result.status} | {result.proof} | {check.gap:.1e} | {seconds:.3f} | {checked:.2f} |\n"
        sys.stdout.write(line)
        sys.stdout.flush()
    channels = channel_problem(sd15_layers())
    sys.stdout.write(f"\nSD 1.5 channels, the whole path: {spent(lambda: solve_path(channels), 2):.2f} s\n")


if __name__ == "__main__":
    main()
