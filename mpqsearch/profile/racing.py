"""When is a profile good enough? When its noise no longer changes what the integer program answers.

A standard error alone does not say so: a layer whose loss is known to 50 % may be decided at every budget, another
known to 5 % may not. So the integer program is solved again for profiles drawn within the standard errors; where the
answers differ, more is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import Budget, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.methods import BEST_LOSS, MethodSpec, allocate, best_loss, predicted_loss

Floats = NDArray[np.float64]

TOTALS = {
    "probe": ("layer_probe_error", "layer_probe_std_error"),
    "sampler": ("layer_sampler_error", "layer_sampler_std_error"),
    "final": ("layer_final_error", "layer_final_std_error"),
}
"""Loss -> arrays of its layer totals and their standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """How far the noise of a profile reaches into the allocation, over ``draws`` profiles within its standard errors.

    ``undecided`` ``[L]``: share of (draw, budget) in which the layer gets another width than from the profile itself.
    ``agreement`` ``[B]``: share of the weights whose width stays, for each budget. ``regret`` ``[B]``: mean relative
    excess of the loss, under the profile itself, of the maps that the draws choose: what the noise can cost. All in
    ``[0, 1]`` but ``regret``, which is >= 0.
    """

    undecided: Floats
    agreement: Floats
    regret: Floats

    def settled(self, tolerance: float) -> bool:
        """True when at no budget the noise costs more than ``tolerance`` of the predicted loss."""
        return bool((self.regret <= tolerance).all())


def stability(
    profile: SensitivityProfile,
    table: LayerTable,
    policy: Policy,
    method: MethodSpec,
    budgets: Sequence[Budget],
    fmt: QuantFormat,
    *,
    draws: int = 16,
    seed: int = 0,
) -> Stability:
    """Solve ``method``, with widths by layer, for the profile and for ``draws`` draws of it.

    A draw multiplies every layer total by a log-normal factor with the mean 1 and the relative standard error of that
    total, at least that of the median layer; the widths of one layer share their probes, so they share the draw. Raises
    `ConfigError` for a loss without standard errors.
    """
    if method.loss == BEST_LOSS:
        method = replace(method, loss=best_loss(profile, method.variant))
    totals_key, error_key = _keys(profile, method.loss, method.variant)
    by_layer = replace(method, allocator="ilp-layer")
    totals = profile.arrays[totals_key].astype(np.float64)
    spread = np.divide(profile.arrays[error_key], totals, out=np.zeros_like(totals), where=totals > 0)
    # A few samples may agree by chance: no layer counts as better known than the middle one.
    spread = np.maximum(np.nan_to_num(spread), np.median(np.nan_to_num(spread), axis=0, keepdims=True))
    sigma = np.sqrt(np.log1p(np.square(spread)))
    rng = np.random.default_rng(seed)
    sizes = np.array([table[n].n_weights for n in profile.names], dtype=np.float64)
    changed = np.zeros((len(budgets), len(profile.names)))
    regret = np.zeros(len(budgets))

    def solve(measured: SensitivityProfile, budget: Budget) -> tuple[NDArray[np.uint8], float]:
        found = allocate(by_layer, budget, table, measured, policy, fmt).bit_map
        widths = np.array([found.weights[n] for n in profile.names], dtype=np.uint8)
        return widths, predicted_loss(table, profile, found, bias_correction=method.bias_correction, loss=method.loss)

    best = [solve(profile, budget) for budget in budgets]
    for _ in range(draws):
        factor = np.exp(rng.standard_normal((len(totals), 1)) * sigma - sigma**2 / 2)
        drawn = replace(profile, arrays={**profile.arrays, totals_key: (totals * factor).astype(np.float32)})
        for i, budget in enumerate(budgets):
            widths, loss = solve(drawn, budget)
            changed[i] += widths != best[i][0]
            regret[i] += max(0.0, loss / best[i][1] - 1) if best[i][1] > 0 else 0.0
    share = changed / draws
    return Stability(undecided=share.mean(0), agreement=1 - share @ sizes / sizes.sum(), regret=regret / draws)


def relative_error(profile: SensitivityProfile, loss: str = "probe", variant: str = "") -> float:
    """`relative_spread` of the layer totals of a profile. Raises `ConfigError` for a loss without standard errors."""
    totals, spread = _keys(profile, loss, variant)
    return relative_spread(profile.arrays[totals], profile.arrays[spread])


def relative_spread(totals: NDArray[Any], spread: NDArray[Any]) -> float:
    """Relative standard error of layer totals ``[L, W]``: a root mean square over layers and widths, weighted by each
    layer's share.

    The shares are taken at each width by itself, so it is the layers that make up the loss that have to be known, at
    any width. NaN (not measured) is left out; 0 when every total is 0.
    """
    totals = np.asarray(totals, dtype=np.float64)
    known = np.isfinite(totals) & np.isfinite(spread) & (totals > 0)
    share = np.where(known, totals, 0.0)
    share = share / np.maximum(share.sum(0), 1e-300)
    if not known.any():
        return 0.0
    ratio = np.divide(spread, totals, out=np.zeros_like(totals), where=known)
    return float(np.sqrt((share * ratio**2).sum() / share.sum()))


def _keys(profile: SensitivityProfile, loss: str, variant: str) -> tuple[str, str]:
    """Names of the arrays of totals and standard errors; another variant's where this one was not measured."""
    if loss not in TOTALS:
        raise ConfigError(f"the loss {loss!r} has no standard errors; those that have: {', '.join(TOTALS)}")
    family, spread = TOTALS[loss]
    found = sorted(k.split("/")[1] for k in profile.arrays if k.startswith(f"{spread}/"))
    if not found:
        raise ConfigError(f"the profile holds no standard errors for the loss {loss!r}; profile again")
    chosen = variant if variant in found else found[-1]
    return f"{family}/{chosen}", f"{spread}/{chosen}"
