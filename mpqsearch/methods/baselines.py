"""What the integer programs are compared with: uniform and random widths, and the rules by which people mix widths.

The rules of practice have no budget. Here each becomes an order in which layers ask for one more width (`urgency`), and
`WidthSteps.raised` grants what is asked until the budget is used up. They see what their tools see: positions,
names, kurtosis, errors of weights, errors of one layer at a time. The quantizer is that of the method, so rules are
compared and not tools. Figures are those of the tools at the commits named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import solve
from mpqsearch.core import BitMap
from mpqsearch.errors import InfeasibleBudgetError
from mpqsearch.methods.build import layer_program
from mpqsearch.methods.task import Choice

if TYPE_CHECKING:
    from mpqsearch.methods.task import Floats, Integers, Task


@dataclass(frozen=True, kw_only=True)
class WidthSteps:
    """The layers of a task (those that share their widths as one unit) and the widths that each may climb.

    A choice ``[u]`` is an index into ``widths`` for every unit, from ``low`` to ``high``. ``costs`` ``[u, k]`` and
    ``rooms`` are those of `Task.unit_costs`.
    """

    task: Task
    units: list[tuple[str, ...]]
    widths: list[int]
    costs: list[Integers]
    rooms: list[int]
    low: Integers
    high: Integers

    @classmethod
    def of(cls, task: Task) -> WidthSteps:
        """The steps of the searched layers."""
        widths = sorted(task.programs.policy.widths)
        costs, rooms, allowed = task.unit_costs([Choice(w) for w in widths])
        return cls(
            task=task,
            units=task.programs.rules.units(),
            widths=widths,
            costs=costs,
            rooms=rooms,
            low=allowed.argmax(axis=1),
            high=len(widths) - 1 - allowed[:, ::-1].argmax(axis=1),
        )

    def fits(self, choice: Integers) -> bool:
        """Whether a choice keeps to every budget."""
        rows = np.arange(len(choice))
        return all(cost[rows, choice].sum() <= room for cost, room in zip(self.costs, self.rooms, strict=True))

    def map_of(self, choice: Integers) -> BitMap:
        """The map of a choice."""
        picked = {
            n: np.uint8(self.widths[c]) for unit, c in zip(self.units, choice.tolist(), strict=True) for n in unit
        }
        return self.task.map_of(picked)

    def of_layers(self, values: Floats) -> Floats:
        """The greatest of ``values`` ``[L, ...]`` (in the order of the profile) among the layers of each unit."""
        index = self.task.programs.profile.index
        return np.stack([values[[index[n] for n in unit]].max(axis=0) for unit in self.units])

    def raised(self, urgency: Floats, start: Integers | None = None) -> BitMap:
        """The map when the unit of the greatest ``urgency`` ``[u, k]`` at its width is raised to the next one, again
        and again from ``start`` (None: all at their smallest) on, until no further raise fits."""
        choice = (self.low if start is None else start).copy()
        if not self.fits(choice):
            raise InfeasibleBudgetError(
                f"the smallest widths do not fit {' and '.join(li.budget.label() for li in self.task.limits)}"
            )
        waiting = np.flatnonzero(choice < self.high)
        while waiting.size:
            i = waiting[urgency[waiting, choice[waiting]].argmax()]
            choice[i] += 1
            fits = self.fits(choice)
            choice[i] -= not fits
            if not fits or choice[i] == self.high[i]:
                waiting = waiting[waiting != i]
        return self.map_of(choice)

    def below_a_tenth(self, rank: Floats) -> Integers:
        """The start ``[u]`` of a rule that keeps its first layers wide: all at the widest width beside which the tenth
        of the least ``rank`` fits at the widest of all."""
        first = rank < max(0.1, 1 / len(rank))
        for base in range(len(self.widths) - 1, 0, -1):
            start: Integers = np.clip(base, self.low, self.high)
            if self.fits(np.where(first, self.high, start)):
                return start
        return self.low


def uniform(task: Task) -> tuple[BitMap, str]:
    """The widest map of one width that fits every budget; layers with bounds take the nearest width within them."""
    for bits in sorted(task.programs.policy.widths, reverse=True):
        bit_map = task.map_of({n: np.uint8(task.programs.rules.nearest(n, bits)) for n in task.programs.rules.searched})
        if task.fits(bit_map):
            return bit_map, ""
    widths = ", ".join(map(str, sorted(task.programs.policy.widths)))
    budgets = " and ".join(limit.budget.label() for limit in task.limits)
    raise InfeasibleBudgetError(f"no uniform width of {widths} fits {budgets}")


def random(task: Task) -> tuple[BitMap, str]:
    """Random widths, repaired at random until every budget is met and no further bit fits."""
    rng = np.random.default_rng([task.method.seed, task.limits[0].limit % (2**31)])
    steps = WidthSteps.of(task)
    choice, rows = rng.integers(steps.low, steps.high + 1), np.arange(len(steps.units))
    while not steps.fits(choice):
        smaller = np.flatnonzero(choice > steps.low)
        if not smaller.size:
            raise InfeasibleBudgetError(
                f"random widths end at the smallest, which do not fit {task.limits[0].budget.label()}"
            )
        choice[rng.choice(smaller)] -= 1
    for i in rng.permutation(np.repeat(rows, len(steps.widths))):
        wider = choice + (rows == i)
        if wider[i] <= steps.high[i] and steps.fits(wider):
            choice = wider
    return steps.map_of(choice), ""


def first_last_high(task: Task) -> tuple[BitMap, str]:
    """The first and the last layers at the widest width, the others at one width.

    Source: presets of ComfyUI, SGLang-Diffusion, ModelOpt and AutoRound, and cards of Z-Image files, which keep first
    and last blocks at 16 bits. How many layers from either end are wide follows from the budget.
    """
    steps = WidthSteps.of(task)
    place = np.arange(len(steps.units))
    rank = _rank(-np.minimum(place, place[::-1]).astype(np.float64))
    return steps.raised(np.tile(-rank[:, None], len(steps.widths)), steps.below_a_tenth(rank)), ""


K_QUANT = {1: 2, 2: 3, 3: 4, 4: 6, 5: 6}
"""Width of value projections and of the second layer of a feed-forward beside that of all others, from Q2_K, Q3_K_M,
Q4_K_M and Q5_K_M; above, all are alike."""

VALUE = re.compile(r"(^|[._])(to_v|add_v_proj|v_proj|attn_v|v)$")
DOWN = re.compile(r"(ff|ffn|ff_context|mlp)\.(net\.2|layer2|fc2|2)$|(^|\.)(w2|ffn_down|down_proj)$")
FUSED = re.compile(r"(^|[._])(to_)?qkv$")


def k_quant(task: Task) -> tuple[BitMap, str]:
    """The mixes of GGUF's K-quants: value projections and feed-forwards' second layers wider than the rest (`K_QUANT`),
    a fused projection of query, key and value one bit wider.

    Source: city96, ComfyUI-GGUF 795e451, ``lcpp.patch``. The largest mix that fits; what is left of the budget goes to
    the next one, value projections first, then feed-forwards, then the others from front to back. A model without such
    names gets widths by position.
    """
    steps, kinds = WidthSteps.of(task), (VALUE, DOWN, FUSED)
    wider: tuple[dict[int, int], ...] = (K_QUANT, K_QUANT, {b: b + 1 for b in range(1, 8)}, {})

    def asked(place: int, unit: tuple[str, ...]) -> list[float]:
        """The mixes, by their base widths, in which a unit is wider than each width."""
        kind = min((k for k, pattern in enumerate(kinds) if any(map(pattern.search, unit))), default=len(kinds))
        later = (kind + place / len(steps.units)) / len(wider)
        return [next(b for b in count(1) if wider[kind].get(b, b) > has) + later for has in steps.widths]

    return steps.raised(-np.array([asked(*unit) for unit in enumerate(steps.units)])), ""


def sdnq_dynamic(task: Task) -> tuple[BitMap, str]:
    """The smallest width of each layer whose weights' mean squared error, divided by their variance, keeps below one
    threshold, which is lowered until the budget is used up.

    Source: SDNQ 21d60c8, dynamic quantization (threshold 0.01 at 4 bits).
    """
    profile = task.programs.profile
    error = profile.layer_sum(profile.need(f"weight_error/{task.method.format_name}", "SDNQ's rule").astype(np.float64))
    fan_in = np.array([task.programs.table[n].weights_per_channel for n in profile.names])
    variance = profile.layer_sum(np.square(profile.need("weight_rms", "SDNQ's rule").astype(np.float64)))
    return _below_a_threshold(task, error / np.maximum(fan_in * variance, 1e-300)[:, None]), ""


def apple_threshold(task: Task) -> tuple[BitMap, str]:
    """The smallest width of each layer that alone loses less than one threshold, which is lowered until the budget is
    used up.

    Source: Apple, ml-stable-diffusion, mixed-bit palettization: every layer by itself at every width, judged by the
    PSNR of the output against one threshold. Here by the method's loss, which is of final samples where these were
    measured. A layer's size plays no part: that is what a knapsack adds.
    """
    return _below_a_threshold(task, task.programs.profile.layer_sum(task.channel_losses())), ""


KEPT, WIDE = 0.10, 0.25
"""quant_probe's shares of layers in BF16 and above NVFP4 (percentiles 90 and 75)."""


def quant_probe(task: Task) -> tuple[BitMap, str]:
    """Layers in the order of the kurtosis of their weights: the first at the widest width, the next at twice that of
    most.

    Source: quant_probe 25dfd91: BF16, FP8 and NVFP4 by percentiles (`KEPT`, `WIDE`) of a score that is mostly excess
    kurtosis. The ratio of the two shares is kept and both grow until the budget is used up. Its range and its aspect
    ratio (0.3 and 0.1 of the score, compared among layers of one kind) are left out: no profile has the range.
    """
    steps, profile = WidthSteps.of(task), task.programs.profile
    power = np.square(profile.need("weight_rms", "quant_probe's rule").astype(np.float64))
    fourth = profile.layer_sum(profile.need("kurtosis", "quant_probe's rule") * np.square(power))
    channels = np.array(profile.channels)
    rank = _rank(steps.of_layers(fourth * channels / np.maximum(profile.layer_sum(power), 1e-300) ** 2))
    start, widths = steps.below_a_tenth(rank), np.array(steps.widths)
    middle = 2 * widths[start][:, None] > widths  # [u, k]: whether a width is below that of the second share
    return steps.raised(-rank[:, None] / np.where(middle, 1.0, KEPT / WIDE), start), ""


def mixed_gguf(task: Task) -> tuple[BitMap, str]:
    """The least sum of the errors of the model's output with one layer quantized at a time: a knapsack over layers.

    Source: ChrisGoringe, mixed-gguf-converter df72dc5. Our measurement is the loss ``probe``, to first order.
    """
    program = layer_program(replace(task, method=replace(task.method, loss="probe")))
    return program.applied(task.map_of({}), solve(program.problem, solver=task.method.solver).choice), ""


def _below_a_threshold(task: Task, error: Floats) -> BitMap:
    """The map of the smallest widths whose ``error`` ``[L, W]`` is below one threshold for all layers: the layer with
    the greatest error is raised first."""
    steps, known = WidthSteps.of(task), task.programs.profile.widths
    return steps.raised(steps.of_layers(error)[:, [known.index(w) for w in steps.widths]])


def _rank(score: Floats) -> Floats:
    """Places ``[u]`` of scores as shares 0..1, that of the greatest first."""
    order: NDArray[np.float64] = np.argsort(np.argsort(-score, kind="stable"), kind="stable") / max(len(score), 1)
    return order
