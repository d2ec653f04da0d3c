"""Speed and proof of the allocator, as a Markdown table: ``python tests/benchmarks/allocate_benchmark.py [--rows a,b]
[--json F]``.

Losses are synthetic (rate-distortion law weights * gain * 4^-bits with noise); the SD 1.5 shapes are those of its
public configuration, the other large tables are drawn. One warm thread; every time is the best of a few runs, as
processor time and as wall time (they differ on a busy machine); ``reads`` is the processor time in units of one reading
of both tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

import numpy as np  # noqa: E402  (threads are limited before the libraries load)

from mpqsearch.allocate import (  # noqa: E402
    AllocationProblem,
    AllocationResult,
    CostBudget,
    LayerRules,
    PairwiseTerms,
    solve,
    solve_alternatives,
    solve_path,
    use_backend,
    verify_certificate,
    warm_up,
)

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


def drawn_layers(channels: int, seed: int) -> list[Shape]:
    """Layers of usual sizes until there are so many channels."""
    rng = np.random.default_rng(seed)
    layers: list[Shape] = []
    while channels > 0:
        out = min(int(rng.choice([320, 640, 1280, 3072])), channels)
        layers.append((out, int(rng.choice([640, 1280, 2880, 3072, 11520]))))
        channels -= out
    return layers


def channel_problem(layers: list[Shape], average: float = 4.4, noise: float = 0.1, seed: int = 0) -> AllocationProblem:
    """One item per output channel; column-major float32 and int32, the fastest layout."""
    rng = np.random.default_rng(seed)
    weights = np.repeat([w for _, w in layers], [out for out, _ in layers]).astype(np.int32)
    gain = np.repeat(rng.lognormal(0, 2, len(layers)), [out for out, _ in layers]) * rng.lognormal(0, 0.7, weights.size)
    loss = np.empty((len(BITS), weights.size), dtype=np.float32)
    cost = np.empty((len(BITS), weights.size), dtype=np.int32)
    for row, bits in enumerate(BITS.tolist()):
        loss[row] = gain * weights * 4.0**-bits * (1 + noise * rng.random(weights.size))
        cost[row] = weights * bits
    return AllocationProblem(loss=loss.T, cost=cost.T, limit=int(average * weights.sum(dtype=np.int64)))


def layer_problem(count: int, seed: int = 0, average: float = 4.37) -> AllocationProblem:
    """One item per layer: eight decades of losses, group-64 scales in the costs."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([320, 640, 1280, 2560], count) * rng.choice([320, 768, 1280, 2880, 5760, 11520], count)
    loss = 10.0 ** rng.uniform(-8, 0, count)[:, None] * 4.0 ** -(BITS - 2.0) * rng.lognormal(0, 0.3, (count, 7))
    cost = weights[:, None] * BITS + (weights // 64 * 32)[:, None]
    return AllocationProblem(loss=loss, cost=cost, limit=int((average + 0.5) * weights.sum()))


def with_budgets(problem: AllocationProblem, count: int, share: float = 1.9) -> AllocationProblem:
    """Add BOPs, at most ``share`` of what they can fall to, and then a latency."""
    rng = np.random.default_rng(5)
    positions = np.repeat(rng.integers(1, 400, problem.n_items // 100 + 1), 100)[: problem.n_items]
    bops = problem.cost.astype(np.int64) * positions[:, None] * 8
    latency = problem.cost.astype(np.int64) // 2 * rng.integers(1, 20, problem.n_items)[:, None] + 3
    tables = [("bops", bops, share), ("latency", latency, 2.3)][: count - 1]
    more = tuple(
        CostBudget(name=name, cost=table, limit=int(table.min(axis=1).sum() * times)) for name, table, times in tables
    )
    return replace(problem, more_budgets=more)


def constrained_layers() -> AllocationProblem:
    """700 layers, q/k/v ties, two budgets, smallest widths for some and largest for others."""
    problem = with_budgets(layer_problem(700, seed=3), 2)
    allowed = np.ones(problem.loss.shape, dtype=bool)
    allowed[::17, :2] = False
    allowed[5::23, 5:] = False
    return replace(problem, allowed=allowed, ties=[[i, i + 1, i + 2] for i in range(0, 600, 10)])


def coupled_layers(count: int = 282, coupling: float = 0.5) -> AllocationProblem:
    """Squared sum of error vectors in sixteen dimensions."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=16)
    own = (rng.normal(size=(count, 1, 16)) + rng.normal(size=(count, 7, 16))) / np.sqrt(32)
    size = np.sqrt(rng.lognormal(0, 1.5, count)[:, None] * 4.0**-BITS)[:, :, None]
    errors = size * (np.sqrt(1 - coupling) * own + np.sqrt(coupling) * common / np.linalg.norm(common))
    first, second = np.triu_indices(count, 1)
    pairs = PairwiseTerms(
        first=first, second=second, value=2 * np.einsum("par,pbr->pab", errors[first], errors[second])
    )
    weights = rng.integers(288, 11520, count)
    return AllocationProblem(
        loss=(errors**2).sum(axis=2),
        cost=weights[:, None] * BITS,
        limit=int(weights.sum() * 3.4),
        pairwise=pairs,
    )


def averaged_channels(budgets: int = 1) -> AllocationProblem:
    """SD 1.5's channels, every layer's mean width an integer, convex losses; a second budget of BOPs on request."""
    layers = sd15_layers()
    problem = channel_problem(layers, noise=0.0)
    layer = np.repeat(np.arange(len(layers)), [out for out, _ in layers])
    ruled = replace(problem, layers=LayerRules(layer=layer, width=BITS.astype(float), average_step=1))
    if budgets == 1:
        return ruled
    positions = np.random.default_rng(5).integers(1, 400, len(layers))[layer]
    bops = problem.cost.astype(np.int64) * positions[:, None] * 8
    return replace(ruled, more_budgets=(CostBudget(name="bops", cost=bops, limit=int(bops.min(axis=1).sum() * 1.9)),))


def alternatives() -> dict[str, object]:
    """Five maps of 700 layers, every two of them different in ten layers at least."""
    problem = layer_problem(700, seed=3)
    solve(problem)
    found: list[AllocationResult] = []
    processor, wall = best_of(
        1, lambda: found.extend(solve_alternatives(problem, 5, min_distance=10, gap_tolerance=1e-6))
    )
    last = found[-1]
    return {
        "instance": f"{len(found)} maps of 700 layers that differ in 10 layers",
        "status": last.status,
        "gap": max(one.gap for one in found),
        "cpu_s": processor,
        "wall_s": wall,
        "last_over_first": last.loss / found[0].loss,
    }


@dataclass(frozen=True)
class Row:
    """One line of the table; ``target_s`` is what the project promises."""

    name: str
    build: Callable[[], AllocationProblem]
    gap_tolerance: float
    target_s: float
    repeats: int = 5


ROWS = {
    "layers": Row("282 layers x 7, proven", lambda: layer_problem(282), 0.0, 0.005, 9),
    "sdxl": Row("794 layers x 7, proven", lambda: layer_problem(794, seed=1), 0.0, 2.0),
    "sd15-gap": Row("SD 1.5, 318,404 channels, 1e-7", lambda: channel_problem(sd15_layers()), 1e-7, 0.04),
    "sd15": Row("SD 1.5, 318,404 channels, proven", lambda: channel_problem(sd15_layers()), 0.0, 0.2),
    "500k": Row("500,000 channels, 1e-6", lambda: channel_problem(drawn_layers(500_000, 1)), 1e-6, 0.05),
    "flux": Row("3,065,920 channels, 1e-7", lambda: channel_problem(drawn_layers(3_065_920, 2)), 1e-7, 0.25, 3),
    "5M": Row("5,000,000 channels, 1e-7", lambda: channel_problem(drawn_layers(5_000_000, 3)), 1e-7, 0.4, 3),
    "budgets": Row(
        "SD 1.5 channels, three budgets, 1e-6", lambda: with_budgets(channel_problem(sd15_layers()), 3), 1e-6, 3.0, 1
    ),
    "constrained": Row("700 layers, ties, two budgets, bounds, 1e-4", constrained_layers, 1e-4, 10.0, 1),
    "averages": Row("SD 1.5 channels, integer layer averages", averaged_channels, 0.0, 0.5, 3),
    "averages2": Row("the same under a second budget, 1e-4", lambda: averaged_channels(2), 1e-4, 3.0, 1),
    "pairwise": Row("282 layers x 7, pairwise, coupling 0.5, 1e-2", coupled_layers, 1e-2, 30.0, 1),
    "pairwise-bops": Row(
        "282 layers x 7, pairwise, coupling 0.5, two budgets, 1e-2",
        lambda: with_budgets(coupled_layers(), 2, 1.6),
        1e-2,
        30.0,
        1,
    ),
    "pairwise-weak": Row(
        "282 layers x 7, pairwise, coupling 0.1, 1e-2", lambda: coupled_layers(coupling=0.1), 1e-2, 30.0, 1
    ),
}


def processor_time() -> float:
    """Seconds of this process and of the solvers that it waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def best_of(repeats: int, function: Callable[[], object]) -> tuple[float, float]:
    """Least processor and wall time."""
    times = []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), processor_time()
        function()
        times.append((processor_time() - processor, time.perf_counter() - wall))
    return min(cpu for cpu, _ in times), min(wall for _, wall in times)


def reading(problem: AllocationProblem) -> float:
    """Processor time to read both tables once."""
    return best_of(3, lambda: (problem.loss.max(), problem.cost.max()))[0]


def measure(row: Row) -> dict[str, object]:
    """One line of the table."""
    started = time.perf_counter()
    problem = row.build()
    built = time.perf_counter() - started
    first = processor_time()
    result = solve(problem, gap_tolerance=row.gap_tolerance)  # loads or compiles what this layout needs
    first_s = processor_time() - first
    processor, wall = best_of(row.repeats, lambda: solve(problem, gap_tolerance=row.gap_tolerance))
    check = verify_certificate(problem, result)
    return {
        "instance": row.name,
        "status": result.status,
        "gap": result.gap,
        "cpu_s": processor,
        "wall_s": wall,
        "target_s": row.target_s,
        "first_cpu_s": first_s,
        "reads": processor / max(reading(problem), 1e-9),
        "build_s": built,
        "check": f"{bool(check)}, {check.proof}",
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


GROWTH = {10_000: 15, 30_000: 15, 100_000: 9, 300_000: 5, 1_000_000: 3, 5_000_000: 1}
"""Instances at each number of items: small ones differ by several times in how hard the last gap is to close."""


def growth() -> Iterator[dict[str, object]]:
    """Processor time per item from 10,000 to 5,000,000 items, certified to 1e-6 and proven: the median instance and the
    slowest."""
    for count, instances in GROWTH.items():
        times: dict[str, list[float]] = {"certified": [], "proven": []}
        for seed in range(instances):
            problem = channel_problem(drawn_layers(count, seed), seed=seed)
            for what, tolerance in (("certified", 1e-6), ("proven", 0.0)):
                solve(problem, gap_tolerance=tolerance)
                repeats = max(5, 1_000_000 // count)  # a millisecond is easily disturbed
                solve_it = partial(solve, problem, gap_tolerance=tolerance)
                times[what].append(best_of(repeats, solve_it)[0])
        line: dict[str, object] = {"instance": f"growth, {count:,} items, {instances} instances"}
        for what, measured in times.items():
            line |= {
                f"{what}_ms": median(measured) * 1e3,
                f"{what}_ns_per_item": median(measured) / count * 1e9,
                f"{what}_slowest_ns": max(measured) / count * 1e9,
            }
        yield line


def sweep() -> dict[str, object]:
    """Fifty budgets on 794 layers: each proven, and all from one path."""
    problem = layer_problem(794, seed=1)
    path = solve_path(problem)
    limits = np.linspace(path.budgets[0], path.budgets[-1], 50).astype(np.int64).tolist()
    proven = 0

    def solve_all() -> None:
        nonlocal proven
        proven = sum(solve(replace(problem, limit=limit)).status == "optimal" for limit in limits)

    def answer_all() -> None:
        solved = solve_path(problem)
        for limit in limits:
            solved.at(limit)

    processor, wall = best_of(1, solve_all)
    path_cpu, _ = best_of(3, answer_all)
    return {
        "instance": f"794 layers, 50 budgets ({proven} proven)",
        "cpu_s": processor,
        "wall_s": wall,
        "target_s": 10.0,
        "path_cpu_s": path_cpu,
    }


def naive() -> Iterator[dict[str, object]]:
    """The plain integer program of the same layer table, for the ratio."""
    problem = layer_problem(282)
    core, _ = best_of(9, lambda: solve(problem))
    for solver in ("highs", "cbc"):
        processor, wall = best_of(1, lambda solver=solver: solve(problem, solver=solver))
        yield {
            "instance": f"282 layers by {solver}",
            "cpu_s": processor,
            "wall_s": wall,
            "times_core": processor / core,
        }


def cold_start() -> dict[str, object]:
    """Import and solve 700 layers in a fresh process, nothing warm."""
    code = (
        "import sys, numpy as np; from mpqsearch.allocate import AllocationProblem, solve;"
        "r = np.random.default_rng(0); w = r.integers(10**5, 10**7, 700);"
        "l = 10.0 ** r.uniform(-8, 0, 700)[:, None] * 4.0 ** -np.arange(7.0);"
        "x = solve(AllocationProblem(loss=l, cost=w[:, None] * np.arange(2, 9), limit=int(4.4 * w.sum())));"
        "assert x.status == 'optimal' and 'torch' not in sys.modules"
    )
    processor, wall = best_of(3, lambda: subprocess.run([sys.executable, "-c", code], check=True))
    return {"instance": "cold process, library only, 700 layers", "cpu_s": processor, "wall_s": wall, "target_s": 1.5}


EXTRAS: dict[str, Callable[[], Iterator[dict[str, object]]]] = {
    "sweep": lambda: iter([sweep()]),
    "alternatives": lambda: iter([alternatives()]),
    "cold": lambda: iter([cold_start()]),
    "naive": naive,
    "growth": growth,
}


def show(line: dict[str, object]) -> None:
    """Print one line."""
    words = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()]
    sys.stderr.write("  ".join(words) + "\n")
    sys.stderr.flush()


def as_markdown(lines: list[dict[str, object]]) -> str:
    """One table per kind of line."""
    parts = []
    for keys in dict.fromkeys(tuple(line) for line in lines):
        parts.append("| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
        for line in lines:
            if tuple(line) == keys:
                cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in line.values()]
                parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def machine() -> str:
    """Processor, system and versions."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "numba", "pulp", "highspy"))
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def main() -> None:
    """Measure the chosen rows; progress goes to stderr, the table to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join([*ROWS, *EXTRAS]))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--backend", choices=("auto", "numpy", "numba"), default="auto")
    arguments = parser.parse_args()
    use_backend(arguments.backend)
    started = time.process_time()
    compiled = warm_up()
    show({"instance": "load the compiled passes" if compiled else "numpy only", "cpu_s": time.process_time() - started})
    lines = []
    for name in arguments.rows.split(","):
        for line in [measure(ROWS[name])] if name in ROWS else EXTRAS[name]():
            lines.append(line)
            show(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1))
    sys.stdout.write(f"{machine()}\n\n{as_markdown(lines)}")


if __name__ == "__main__":
    main()
