"""The allocation problem: numbers only, validated once, read-only afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.errors import ConfigError, NumericsError

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]

FREE = -1
"""Label of an item that belongs to no group."""

MAX_TOTAL = 2**62
"""Largest total cost that is accepted, so that no sum of int64 costs can overflow."""

MAX_LOSS = 1e300
"""Largest sum of the items' largest losses, so that no float64 total can overflow."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostBudget:
    """One budget, such as stored bits, BOPs or a measured latency in whole nanoseconds.

    Args:
        name: What is limited, used in messages and in ``AllocationResult.costs``.
        cost: ``[n, k]`` integers >= 0.
        limit: Largest total that is allowed, in the unit of ``cost``; a fraction is rounded down.
    """

    name: str
    cost: Integers
    limit: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", _whole(self.limit, self.name))

    def __repr__(self) -> str:
        return f"CostBudget({self.name} <= {self.limit}, cost {np.shape(self.cost)})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairwiseTerms:
    """Loss that two items cause together, added to the separable loss once for each pair.

    Args:
        first: ``[p]`` item indices.
        second: ``[p]`` item indices, different from ``first``.
        value: ``[p, k, k]``: loss of pair p when ``first`` takes choice a and ``second`` takes choice b; any sign.
    """

    first: Integers
    second: Integers
    value: Floats

    def __post_init__(self) -> None:
        first, second = np.asarray(self.first), np.asarray(self.second)
        value = np.asarray(self.value)
        if first.shape != second.shape or first.ndim != 1 or value.ndim != 3 or len(value) != len(first):
            raise ConfigError(
                f"PairwiseTerms needs first [p], second [p] and value [p, k, k], got {first.shape}, {second.shape} "
                f"and {value.shape}."
            )
        if bool((first == second).any()):
            raise ConfigError("PairwiseTerms: an item is paired with itself; add that loss to its row instead.")
        bad = ~np.isfinite(value).reshape(len(value), -1).all(axis=1) if value.size else np.zeros(len(value), bool)
        if bool(bad.any()):
            raise NumericsError(f"PairwiseTerms.value of pair {int(np.argmax(bad))} is not finite.")
        object.__setattr__(self, "first", _frozen(first))
        object.__setattr__(self, "second", _frozen(second))
        object.__setattr__(self, "value", _frozen(value))

    def __repr__(self) -> str:
        return f"PairwiseTerms({len(self.first)} pairs)"

    def total(self, choice: Integers) -> float:
        """Sum over all pairs under ``choice [n]``."""
        value = self.value[np.arange(len(self.first)), choice[self.first], choice[self.second]]
        return float(value.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllocationProblem:
    """Choose one format per item so that the total loss is least and no budget is exceeded.

    An item is a layer or an output channel; a choice is a format: a width, a scheme, a group size. Losses need not fall
    or be convex in the width. Tables are kept as given (no copy).

    Args:
        loss: ``[n, k]`` float32 or float64, finite and >= 0 wherever ``allowed``.
        budgets: One or more, of different names, which all hold at the same time.
        allowed: ``[n, k]`` booleans; a choice that is not allowed may hold any numbers, even NaN.
        groups: ``[n]`` integers: items of the same number >= 0 must share a choice; -1 means free.
        names: ``[n]`` item names, used in messages.
        choices: ``[k]`` choice names, used in messages.
        max_formats: At most so many different choices in the whole model.
        max_formats_per_layer: At most so many different choices among the items of one layer.
        layer: ``[n]`` integers >= 0: the layer of every item, needed by ``max_formats_per_layer`` only.
        pairwise: Losses of pairs of items.

    Raises:
        ConfigError: A table has the wrong shape or type, or a cost is negative.
        NumericsError: A loss is NaN, infinite, too large for float64 sums or negative.
    """

    loss: Floats
    budgets: tuple[CostBudget, ...]
    allowed: Mask | None = None
    groups: Integers | None = None
    names: Sequence[str] | None = None
    choices: Sequence[str] | None = None
    max_formats: int | None = None
    max_formats_per_layer: int | None = None
    layer: Integers | None = None
    pairwise: PairwiseTerms | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "loss", _loss_table(self.loss))
        for what, count in (("names", self.n_items), ("choices", self.n_choices)):
            listed = getattr(self, what)
            if listed is not None and len(listed) != count:
                raise ConfigError(f"{what} holds {len(listed)} entries; the loss table asks for {count}.")
        names = [b.name for b in self.budgets]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"a problem needs one budget or more, each with its own name; got {names}.")
        put(self, "budgets", tuple(self._checked_budget(b) for b in self.budgets))
        if self.allowed is not None:
            put(self, "allowed", _allowed_table(self.allowed, self.loss.shape))
        if self.groups is not None:
            put(self, "groups", self._labels("groups", self.groups, least=FREE))
        self._check_format_limits()
        self._check_pairs()
        self._check_losses()

    def __repr__(self) -> str:
        limits = ", ".join(f"{b.name} <= {b.limit}" for b in self.budgets)
        return f"AllocationProblem({self.n_items} items x {self.n_choices} choices, {limits})"

    @property
    def n_items(self) -> int:
        """Number of items, n."""
        return int(self.loss.shape[0])

    @property
    def n_choices(self) -> int:
        """Number of choices per item, k."""
        return int(self.loss.shape[1])

    @property
    def limits_formats(self) -> bool:
        """Whether a limit on the number of different formats is set."""
        return self.max_formats is not None or self.max_formats_per_layer is not None

    @property
    def constrained(self) -> bool:
        """Whether there is more than one budget, or a limit on the number of formats."""
        return len(self.budgets) > 1 or self.limits_formats

    def item_name(self, index: int) -> str:
        """How messages call item ``index``."""
        return repr(self.names[index]) if self.names is not None else f"item {index}"

    def choice_name(self, index: int) -> str:
        """How messages call choice ``index``."""
        return repr(self.choices[index]) if self.choices is not None else f"choice {index}"

    def evaluate(self, choice: Integers) -> tuple[float, tuple[int, ...]]:
        """Total loss (float64, losses of pairs included) and integer total of every budget of ``choice [n]``."""
        rows, picked = np.arange(self.n_items), np.asarray(choice)
        loss = float(self.loss[rows, picked].sum(dtype=np.float64))
        if self.pairwise is not None:
            loss += self.pairwise.total(picked)
        return loss, tuple(int(b.cost[rows, picked].sum(dtype=np.int64)) for b in self.budgets)

    def _checked_budget(self, budget: CostBudget) -> CostBudget:
        table, what = np.asarray(budget.cost), f"budget {budget.name!r}"
        if table.shape != self.loss.shape:
            raise ConfigError(f"{what}: cost has shape {table.shape}, loss has {self.loss.shape}.")
        if not np.issubdtype(table.dtype, np.integer):
            raise ConfigError(f"{what}: cost must be integers (bits, bytes, nanoseconds), got {table.dtype}.")
        if table.size and int(table.min()) < 0:
            item, choice = np.unravel_index(int(np.argmin(table)), table.shape)
            where = f"{self.item_name(int(item))}, {self.choice_name(int(choice))}"
            raise ConfigError(f"{what}: {where} has the negative cost {table[item, choice]}.")
        if table.size and int(table.max()) > MAX_TOTAL // len(table):
            raise ConfigError(f"{what}: the total cost may exceed {MAX_TOTAL}; use a larger unit.")
        table = table if table.dtype in (np.int32, np.int64) else table.astype(np.int64)
        return CostBudget(name=budget.name, cost=_frozen(table), limit=budget.limit)

    def _labels(self, what: str, values: Integers | None, least: int) -> Integers:
        labels = np.asarray([] if values is None else values)
        whole = np.issubdtype(labels.dtype, np.integer)
        if labels.shape != (self.n_items,) or not whole or (labels.size and int(labels.min()) < least):
            raise ConfigError(f"{what} must be an array of {self.n_items} integers >= {least}, one for each item.")
        return _frozen(labels)

    def _check_format_limits(self) -> None:
        for what in ("max_formats", "max_formats_per_layer"):
            most = getattr(self, what)
            if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
                raise ConfigError(f"{what} must be a whole number >= 1, got {most!r}.")
        if self.max_formats_per_layer is not None:
            what = "max_formats_per_layer needs the layer of every item: layer"
            object.__setattr__(self, "layer", self._labels(what, self.layer, least=0))

    def _check_pairs(self) -> None:
        if self.pairwise is None or not len(self.pairwise.first):
            object.__setattr__(self, "pairwise", None)
            return
        ends = np.concatenate([self.pairwise.first, self.pairwise.second])
        if not 0 <= ends.min() <= ends.max() < self.n_items:
            raise ConfigError(f"PairwiseTerms names an item outside 0 .. {self.n_items - 1}.")
        k = self.n_choices
        if self.pairwise.value.shape[1:] != (k, k):
            raise ConfigError(f"PairwiseTerms.value has shape {self.pairwise.value.shape}; [p, {k}, {k}] is asked for.")

    def _check_losses(self) -> None:
        loss = self.loss
        if self.allowed is not None:
            empty = np.flatnonzero(~self.allowed.any(axis=1))
            if empty.size:
                raise ConfigError(f"{self.item_name(int(empty[0]))} has no allowed choice.")
            loss = np.where(self.allowed, loss, 0)
        if loss.size == 0:
            return
        low, high = float(loss.min()), float(loss.max())  # NaN comes out of min, infinities out of either
        if not (low >= 0 and high < math.inf):
            bad = loss < 0 if math.isfinite(low + high) else ~np.isfinite(loss)
            item, choice = (int(index) for index in np.unravel_index(int(np.argmax(bad)), loss.shape))
            raise NumericsError(
                f"{self.item_name(item)}, {self.choice_name(choice)}: the loss is {loss[item, choice]}; losses must be "
                "finite and >= 0."
            )
        if high > MAX_LOSS / len(loss):
            raise NumericsError(
                f"a loss of {high:.6g} is too large: the total of {len(loss)} items may exceed {MAX_LOSS:g}. "
                "Divide all losses by one number; the best choice stays the same."
            )


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: the problem cannot change under its certificate."""
    view = array.view()
    view.flags.writeable = False
    return view


def _loss_table(values: Floats) -> Floats:
    table = np.asarray(values)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ConfigError(f"loss must be a table [items, choices] with at least one choice, got shape {table.shape}.")
    if table.dtype.kind not in "fiu":
        raise ConfigError(f"loss must hold real numbers, got {table.dtype}.")
    return _frozen(table if table.dtype in (np.float32, np.float64) else table.astype(np.float64))


def _allowed_table(values: Mask, shape: tuple[int, ...]) -> Mask:
    table = np.asarray(values)
    if table.dtype != np.bool_ or table.shape != shape:
        raise ConfigError(f"allowed must be booleans of shape {shape}, got {table.dtype} {table.shape}.")
    return _frozen(table)


def _whole(limit: object, name: str) -> int:
    if isinstance(limit, (int, np.integer)) and not isinstance(limit, bool):
        return int(limit)
    if isinstance(limit, (float, np.floating)) and math.isfinite(limit):
        return math.floor(limit)
    raise ConfigError(f"budget {name!r}: limit must be a finite whole number, got {limit!r}.")
