"""What a profile for predictions costs as a whole, in parts of one layer at a time, measured in one run.

    python studies/predictors/cost.py [--layers 6]

Processor seconds of one thread. One layer at a time (final samples of 8 seeds at 2, 3 and 4 bits) runs on evenly spaced
layers, and its time is scaled up to all that are searched; the profile for predictions is the whole of what `mpqsearch
profile --prediction-only` measures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mpqsearch.core import Policy, QuantFormat
from mpqsearch.models import discover, load_model
from mpqsearch.profile import CalibrationSpec, final_errors, profile_slopes
from mpqsearch.sampling import SamplerSpec

SAMPLER = SamplerSpec(steps=10, guidance=2.0, batch=32)
WIDTHS = (2, 3, 4)
SEEDS = 8


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def costs(model: str, layers: int) -> tuple[dict[str, float], float]:
    """Processor seconds of profiles for predictions, by schemes, and of one layer at a time."""
    policy, fmt = Policy(widths=WIDTHS), QuantFormat()
    denoiser = load_model(model)
    table = discover(denoiser)
    searched = [la.name for la in table if policy.fixed_width(la) is None]
    spec = CalibrationSpec(prediction_only=True, schemes=("auto",), smooth=False)
    warm = replace(spec, samples=1, context_seeds=3)  # compiles the kernels
    profile = profile_slopes(denoiser, table, policy, replace(SAMPLER, steps=1), warm, fmt)

    def predict(schemes: tuple[str, ...]) -> Any:
        return profile_slopes(denoiser, table, policy, SAMPLER, replace(spec, schemes=schemes), fmt)

    took = {" and ".join(c): seconds(lambda c=c: predict(c)) for c in (("auto",), ("asymmetric", "auto"))}
    slow = CalibrationSpec(schemes=("auto",), final_widths=WIDTHS, final_seeds=SEEDS)
    part = searched[:: max(1, len(searched) // layers)]
    one = seconds(lambda: final_errors(denoiser, table, profile, SAMPLER, slow, fmt, wanted=dict.fromkeys(part, SEEDS)))
    return took, one * len(searched) / len(part)


def main(say: Callable[..., None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=6, help="layers that one layer at a time runs on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    say("| model | schemes | profile for predictions | one layer at a time | share |\n|---|---|---|---|---|")
    for model in ("fmnist-unet", "fmnist-dit"):
        took, whole = costs(model, args.layers)
        for schemes, mine in took.items():
            say(f"| {model} | {schemes} | {mine:.1f} s | {whole:.0f} s | {mine / whole:.1%} |")


if __name__ == "__main__":
    main()
