"""Contexts: models that are quantized already, so that what an error does among the errors of all others can be seen.

A channel that is dead at full precision need not be dead once its neighbours are quantized, and an integer program puts
every error where it believes that none is felt. So sensitivities of channels are measured twice: at full precision, and
here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpqsearch.core import LayerTable, Policy
from mpqsearch.models.calls import Call
from mpqsearch.profile.partial import Arrays
from mpqsearch.profile.probing import Probing
from mpqsearch.profile.recomputed import error_part, error_rows
from mpqsearch.profile.tables import WeightErrors, final_format
from mpqsearch.progress import Progress, silent
from mpqsearch.quant import weight_of
from mpqsearch.specs import CalibrationSpec


def latin_contexts(table: LayerTable, policy: Policy, widths: Sequence[int], *, seed: int = 0) -> NDArray[np.int64]:
    """As many maps ``[len(widths), L]`` as there are widths: each searched layer has each width once, in a random
    order, tied layers the same."""
    rng = np.random.default_rng(seed)
    order: dict[str, NDArray[np.int64]] = {}
    columns = []
    rules = policy.resolve(table)
    first_of = {name: group[0] for group in rules.groups for name in group}
    for layer in table:
        fixed = rules.fixed.get(layer.name)
        drawn = rng.permutation(np.asarray(widths, dtype=np.int64))
        if fixed is not None:
            columns.append(np.full(len(widths), fixed, dtype=np.int64))
        else:
            columns.append(order.setdefault(first_of.get(layer.name, layer.name), drawn))
    return np.stack(columns, 1)


def mixed_widths(spec: CalibrationSpec, policy: Policy) -> list[int]:
    """The searched ones among the widths that contexts mix."""
    return [b for b in spec.context_widths if b in policy.widths]


def context_sensitivity(
    probing: Probing,
    policy: Policy,
    spec: CalibrationSpec,
    steps: Sequence[Sequence[Call]],
    progress: Progress = silent,
) -> Arrays:
    """``context_sensitivity`` ``[C]``: that of `Probing.measure`, with every layer of the model quantized at one of the
    widths that contexts mix (the narrowest searched one where none of those is searched).

    Each context takes its part of the steps, so that all cost as many passes as full precision does.
    """
    widths = tuple(sorted(policy.widths))
    contexts = latin_contexts(probing.table, policy, mixed_widths(spec, policy) or widths[:1], seed=spec.seed)
    total, nothing = np.zeros(0), WeightErrors(probing.table, {})
    for number, context in enumerate(contexts[: len(steps)]):
        module = quantized_at(
            probing.denoiser.module, probing.table, context, widths, final_format(spec), probing.errors
        )
        there = replace(
            probing, denoiser=probing.denoiser.with_module(module), errors=nothing, seed=probing.seed + 1 + number
        )
        part = steps[number :: len(contexts)]
        found = there.measure(part, progress)["sensitivity"].astype(np.float64)
        total = found * len(part) + (total if total.size else 0.0)
    return {"context_sensitivity": (total / len(steps)).astype(np.float32)}


@torch.no_grad()
def quantized_at(
    module: nn.Module,
    table: LayerTable,
    context: NDArray[np.int64],
    widths: Sequence[int],
    fmt: str,
    errors: WeightErrors,
) -> nn.Module:
    """A copy with the errors of a context in its weights and their mean shift taken off its biases."""
    quantized = copy.deepcopy(module)
    column, by_layer = {b: j for j, b in enumerate(widths)}, errors.errors[fmt]
    for layer, bits in zip(table, context.tolist(), strict=True):
        if bits not in column:
            continue
        target: Any = quantized.get_submodule(layer.name)
        error = torch.cat([error_part(by_layer, layer.name, p)[column[bits]] for p in error_rows(by_layer, layer)])
        target.weight.add_(weight_of(error, layer).to(target.weight))
        shift = errors.shift.get(fmt, {}).get(layer.name)
        if shift is not None:
            target.bias.sub_(shift[column[bits]].to(target.bias))
    return quantized
