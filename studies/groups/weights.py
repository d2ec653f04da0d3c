"""What scales for groups of inputs are worth by the weights alone, at equal stored bits.

    python -m studies.groups.weights fmnist-dit fmnist-t2i fmnist-flow

One uniform width for all layers with at least 16 inputs a channel, the better scheme of each scale, ranges searched by
squared error. A ratio is the squared error with groups over that of one scale a channel *at the same stored bits*: of
that error a bit more takes three quarters, so ``error(r) = error(r0) * 4**(r0 - r)``. Below 1 groups pay.
"""

from __future__ import annotations

import argparse

import torch

import mpqsearch as mpq
from mpqsearch.core import QuantFormat
from mpqsearch.core.stored import channel_bits
from mpqsearch.models import Denoiser
from mpqsearch.quant import decode, encode, fit_rows, rows_of

WIDTHS = (2, 3, 4)
GROUPS = (128, 64, 32, 16)


@torch.no_grad()
def measured(model: Denoiser, width: int, group: int) -> tuple[float, float]:
    """Stored bits a weight, and the squared error of the weights as a share of their squares."""
    fmt, modules = QuantFormat(scheme="auto", p=2.0, group=group), dict(model.module.named_modules())
    bits = error = power = weights = 0.0
    for layer in mpq.discover(model):
        rows = rows_of(modules[layer.name].weight.float(), layer)
        if rows.shape[1] < GROUPS[-1]:
            continue
        quantizer = fit_rows(rows, width, fmt)
        error += float((decode(encode(rows, quantizer), quantizer) - rows).square().sum())
        power += float(rows.square().sum())
        bits += layer.n_channels * channel_bits(layer, width, fmt)
        weights += rows.numel()
    return bits / weights, error / power


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="embedded names, folders, or package.module:function")
    print("| model | bits | " + " | ".join(f"groups of {g}" for g in GROUPS) + " |")
    print("|---|---|" + "---|" * len(GROUPS))
    for name in parser.parse_args().models:
        model = mpq.load(name)
        for width in WIDTHS:
            rate, error = measured(model, width, 0)
            ratios = []
            for group in GROUPS:
                stored, found = measured(model, width, group)
                ratios.append(f"{found / error * 4 ** (stored - rate):.2f} (+{stored - rate:.2f} bits)")
            print(f"| {model.name} | {width} | " + " | ".join(ratios) + " |", flush=True)


if __name__ == "__main__":
    main()
