"""What a profile of whole layers costs beside plain gradient scores, in processor seconds of one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/layer_scores_benchmark.py [model]

Both price every layer at every width in every format on the states of the same trajectories. The gradient scores are
those that automatic searches of other tools take: one forward and one backward pass a batch, squared gradients of every
weight, times the squared weight errors, summed over the layer (a diagonal Fisher matrix). They get their states for
nothing; ours runs the sampler for them.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch

from mpqsearch.core import LayerTable, Policy, QuantFormat
from mpqsearch.models import Call, Denoiser, discover
from mpqsearch.profile import CalibrationSpec, formats_of, profile_model
from mpqsearch.quant import rows_of, width_errors
from mpqsearch.sampling import each_call, load_model
from mpqsearch.specs import SamplerSpec

REPEATS = 3
SPEC = CalibrationSpec(granularity="layer")
SAMPLER = SamplerSpec(steps=10, guidance=1.0)


def gradient_scores(
    denoiser: Denoiser, table: LayerTable, widths: tuple[int, ...], states: list[Call]
) -> dict[str, np.ndarray]:
    """``sum (dL/dw)**2 (w_q - w)**2`` ``[L, W]`` by format; the loss is the mean square of the prediction."""
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    weights = {la.name: modules[la.name].weight for la in table}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for state in states:
        output = state.replay(denoiser.module)
        for (name, weight), grad in zip(
            weights.items(), torch.autograd.grad(output.square().mean(), list(weights.values())), strict=True
        ):
            squares[name] += grad.square()
            assert weight.grad is None
    for weight in weights.values():
        weight.requires_grad_(False)
    scores = {}
    for fmt_name, fmt in formats_of(SPEC, QuantFormat()).items():
        rows = []
        for layer in table:
            errors = width_errors(weights[layer.name], layer, widths, fmt, None)
            rows.append((errors.square() * rows_of(squares[layer.name], layer)).sum((1, 2)).numpy())
        scores[fmt_name] = np.stack(rows)
    return scores


def seconds(run: Any) -> float:
    """Processor seconds of the fastest of some runs."""
    found = []
    for _ in range(REPEATS):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    """Print both times and their ratio."""
    torch.set_num_threads(1)
    denoiser = load_model(sys.argv[1] if len(sys.argv) > 1 else "fmnist-unet", sampler=SAMPLER)
    table, policy = discover(denoiser), Policy()
    seeds = range(SPEC.first_seed, SPEC.first_seed + SPEC.samples)
    states: list[Call] = []
    with torch.no_grad():
        each_call(denoiser, seeds, lambda call, _: states.append(call))
    widths = tuple(sorted(policy.widths))
    plain = seconds(lambda: gradient_scores(denoiser, table, widths, states))
    ours = seconds(lambda: profile_model(denoiser, table, policy, SPEC, QuantFormat()))
    n = sum(s.batch for s in states)
    sys.stdout.write(
        f"{n} states, {len(widths)} widths, {len(SPEC.schemes)} formats: gradient scores {plain:.2f} s, profile of "
        "layers "
        f"{ours:.2f} s, ratio {ours / plain:.2f}\n"
    )


if __name__ == "__main__":
    main()
