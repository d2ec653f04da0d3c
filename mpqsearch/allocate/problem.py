"""The allocation problem: numbers only, validated once, read-only afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
    """One more budget beside the main one, such as BOPs or a measured latency in whole nanoseconds.

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
        cost: ``[n, k]`` integers >= 0, usually bits.
        limit: Largest total cost that is allowed, in the unit of ``cost``.
        allowed: ``[n, k]`` booleans; a choice that is not allowed may hold any numbers, even NaN.
        groups: Items that must share a choice: a list of groups of indices, or ``[n]`` integer labels where -1 means
            free. Labels after construction.
        names: Item names, used in messages; unique.
        choices: Choice names, used in messages; unique.
        budget_name: What ``cost`` counts.
        more_budgets: Further budgets that hold at the same time.
        max_formats: At most so many different choices in the whole model.
        max_formats_per_layer: At most so many different choices among the items of one layer.
        layer: ``[n]`` integers: the layer of every item, needed by ``max_formats_per_layer`` only.
        pairwise: Losses of pairs of items.

    Raises:
        ConfigError: A table has the wrong shape or type, a cost is negative, or groups overlap.
        NumericsError: A loss is NaN, infinite, too large for float64 sums or negative.
    """

    loss: Floats
    cost: Integers
    limit: int
    allowed: Mask | None = None
    groups: Iterable[Sequence[int]] | Integers | None = None
    names: Sequence[str] | None = None
    choices: Sequence[str] | None = None
    budget_name: str = "cost"
    more_budgets: tuple[CostBudget, ...] = ()
    max_formats: int | None = None
    max_formats_per_layer: int | None = None
    layer: Integers | None = None
    pairwise: PairwiseTerms | None = None
    group_labels: Integers | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        put = object.__setattr__
        loss = _loss_table(self.loss)
        put(self, "loss", loss)
        put(self, "names", _checked_names("names", self.names, loss.shape[0]))
        put(self, "choices", _checked_names("choices", self.choices, loss.shape[1]))
        put(self, "cost", _cost_table(self, self.cost, self.budget_name))
        put(self, "limit", _whole(self.limit, self.budget_name))
        put(self, "more_budgets", self._checked_budgets())
        if self.allowed is not None:
            put(self, "allowed", _allowed_table(self.allowed, loss.shape))
        put(self, "group_labels", self._resolved_groups())
        put(self, "groups", self.group_labels)  # labels from here on, so that dataclasses.replace can pass them on
        self._check_format_limits()
        self._check_pairs()
        _check_every_item_has_a_choice(self)
        _check_losses(self)

    def __repr__(self) -> str:
        limits = ", ".join(f"{b.name} <= {limit}" for b, limit in zip(self.budgets, self.limits, strict=True))
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
    def budgets(self) -> tuple[CostBudget, ...]:
        """All budgets, the main one first."""
        return (CostBudget(name=self.budget_name, cost=self.cost, limit=self.limit), *self.more_budgets)

    @property
    def limits(self) -> tuple[int, ...]:
        """The limits of all budgets, the main one first."""
        return (self.limit, *(b.limit for b in self.more_budgets))

    @property
    def limits_formats(self) -> bool:
        """Whether a limit on the number of different formats is set."""
        return self.max_formats is not None or self.max_formats_per_layer is not None

    def item_name(self, index: int) -> str:
        """How messages call item ``index``."""
        return repr(self.names[index]) if self.names is not None else f"item {index}"

    def choice_name(self, index: int) -> str:
        """How messages call choice ``index``."""
        return repr(self.choices[index]) if self.choices is not None else f"choice {index}"

    def permitted(self) -> Mask:
        """``[n, k]``: the choices that ``allowed`` leaves."""
        return np.ones(self.loss.shape, dtype=bool) if self.allowed is None else self.allowed

    def evaluate(self, choice: Integers) -> tuple[float, tuple[int, ...]]:
        """Total loss (float64, losses of pairs included) and integer total of every budget of ``choice [n]``."""
        rows, picked = np.arange(self.n_items), np.asarray(choice)
        loss = float(self.loss[rows, picked].sum(dtype=np.float64))
        if self.pairwise is not None:
            loss += self.pairwise.total(picked)
        return loss, tuple(int(b.cost[rows, picked].sum(dtype=np.int64)) for b in self.budgets)

    def permits(self, choice: Integers) -> bool:
        """Whether ``choice [n]`` obeys everything but the budgets: permitted choices, groups, numbers of formats."""
        picked = np.asarray(choice)
        if picked.shape != (self.n_items,) or (picked.size and not 0 <= picked.min() <= picked.max() < self.n_choices):
            return False
        if not bool(self.permitted()[np.arange(self.n_items), picked].all()):
            return False
        return self._shares_choices(picked) and self._few_formats(picked)

    def _shares_choices(self, picked: Integers) -> bool:
        if self.group_labels is None:
            return True
        grouped = self.group_labels != FREE
        labels = self.group_labels[grouped]
        first = np.full(int(labels.max(initial=FREE)) + 1, FREE, dtype=np.int64)
        first[labels] = picked[grouped]
        return bool((first[labels] == picked[grouped]).all())

    def _few_formats(self, picked: Integers) -> bool:
        if self.max_formats is not None and len(np.unique(picked)) > self.max_formats:
            return False
        if self.max_formats_per_layer is None or self.layer is None or not self.n_items:
            return True
        number = np.unique(self.layer, return_inverse=True)[1]
        used = np.zeros((int(number.max()) + 1, self.n_choices), dtype=bool)
        used[number, picked] = True
        return int(used.sum(axis=1).max()) <= self.max_formats_per_layer

    def _checked_budgets(self) -> tuple[CostBudget, ...]:
        names = [self.budget_name, *(b.name for b in self.more_budgets)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two budgets are called {name!r}; give each its own name.")
        return tuple(
            CostBudget(name=b.name, cost=_cost_table(self, b.cost, b.name), limit=b.limit) for b in self.more_budgets
        )

    def _check_format_limits(self) -> None:
        for what in ("max_formats", "max_formats_per_layer"):
            most = getattr(self, what)
            if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
                raise ConfigError(f"{what} must be a whole number >= 1, got {most!r}.")
        if self.max_formats_per_layer is None:
            return
        layer = None if self.layer is None else np.asarray(self.layer)
        if layer is None or layer.shape != (self.n_items,) or not np.issubdtype(layer.dtype, np.integer):
            raise ConfigError(f"max_formats_per_layer needs layer: one integer >= 0 for each of {self.n_items} items.")
        if layer.size and int(layer.min()) < 0:
            raise ConfigError("layer must hold integers >= 0.")
        object.__setattr__(self, "layer", _frozen(layer))

    def _check_pairs(self) -> None:
        if self.pairwise is None or not len(self.pairwise.first):
            return
        ends = np.concatenate([self.pairwise.first, self.pairwise.second])
        if not 0 <= ends.min() <= ends.max() < self.n_items:
            raise ConfigError(f"PairwiseTerms names an item outside 0 .. {self.n_items - 1}.")
        k = self.n_choices
        if self.pairwise.value.shape[1:] != (k, k):
            raise ConfigError(f"PairwiseTerms.value has shape {self.pairwise.value.shape}; [p, {k}, {k}] is asked for.")

    def _resolved_groups(self) -> Integers | None:
        if self.groups is None:
            return None
        if isinstance(self.groups, np.ndarray):
            if self.groups.shape != (self.n_items,) or not np.issubdtype(self.groups.dtype, np.integer):
                raise ConfigError(f"groups needs {self.n_items} integer labels, got {self.groups.shape}.")
            if self.groups.size and self.groups.min() < FREE:
                raise ConfigError("groups: labels must be -1 (free) or a group number >= 0.")
            return _frozen(self.groups)
        labels = np.full(self.n_items, FREE, dtype=np.int64)
        for number, group in enumerate(self.groups):
            for item in group:
                if not 0 <= item < self.n_items:
                    raise ConfigError(f"groups: item {item} is outside 0 .. {self.n_items - 1}.")
                if labels[item] not in (FREE, number):
                    raise ConfigError(f"{self.item_name(item)} is in two groups; join them into one.")
                labels[item] = number
        return _frozen(labels)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: the problem cannot change under its certificate."""
    view = array.view()
    view.flags.writeable = False
    return view


def _loss_table(values: Floats) -> Floats:
    table = np.asarray(values)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ConfigError(f"loss must be a table [items, choices] with at least one choice, got shape {table.shape}.")
    if table.dtype not in (np.float32, np.float64):
        if not (np.issubdtype(table.dtype, np.integer) or np.issubdtype(table.dtype, np.floating)):
            raise ConfigError(f"loss must hold real numbers, got {table.dtype}.")
        table = table.astype(np.float64)
    return _frozen(table)


def _cost_table(problem: AllocationProblem, values: Integers, name: str) -> Integers:
    table = np.asarray(values)
    if table.shape != problem.loss.shape:
        raise ConfigError(f"budget {name!r}: cost has shape {table.shape}, loss has {problem.loss.shape}.")
    if not np.issubdtype(table.dtype, np.integer):
        raise ConfigError(f"budget {name!r}: cost must be integers (bits, bytes, nanoseconds), got {table.dtype}.")
    if table.size == 0:
        return _frozen(table.astype(np.int64))
    if table.dtype == np.uint64 and int(table.max()) >= 2**63:
        raise ConfigError(f"budget {name!r}: a cost is above 2**63 - 1; use a larger unit.")
    if int(table.min()) < 0:
        item, choice = np.unravel_index(int(np.argmin(table)), table.shape)
        raise ConfigError(
            f"budget {name!r}: {problem.item_name(int(item))}, {problem.choice_name(int(choice))} "
            f"has the negative cost {table[item, choice]}."
        )
    if int(table.max()) > MAX_TOTAL // table.shape[0]:
        raise ConfigError(f"budget {name!r}: the total cost may exceed {MAX_TOTAL}; use a larger unit.")
    return _frozen(table if table.dtype in (np.int32, np.int64) else table.astype(np.int64))


def _whole(limit: object, name: str) -> int:
    if isinstance(limit, bool) or not isinstance(limit, (int, float, np.integer, np.floating)):
        raise ConfigError(f"budget {name!r}: limit must be a whole number, got {limit!r}.")
    if isinstance(limit, (float, np.floating)):
        if not np.isfinite(limit):
            raise ConfigError(f"budget {name!r}: limit must be finite, got {limit}.")
        return int(np.floor(limit))
    return int(limit)


def _allowed_table(values: Mask, shape: tuple[int, ...]) -> Mask:
    table = np.asarray(values)
    if table.dtype != np.bool_ or table.shape != shape:
        raise ConfigError(f"allowed must be booleans of shape {shape}, got {table.dtype} {table.shape}.")
    return _frozen(table)


def _checked_names(what: str, names: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    listed = tuple(names)
    if len(listed) != count:
        raise ConfigError(f"{what} holds {len(listed)} entries; the loss table asks for {count}.")
    if len(set(listed)) != count:
        seen: set[str] = set()
        twice = next(name for name in listed if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ConfigError(f"{what}: {twice!r} appears twice.")
    return listed


def _check_every_item_has_a_choice(problem: AllocationProblem) -> None:
    if problem.allowed is None:
        return
    empty = ~problem.allowed.any(axis=1)
    if bool(empty.any()):
        raise ConfigError(f"{problem.item_name(int(np.argmax(empty)))} has no allowed choice.")


def _check_losses(problem: AllocationProblem) -> None:
    loss = problem.loss if problem.allowed is None else np.where(problem.allowed, problem.loss, 0)
    if loss.size == 0:
        return
    low, high = float(loss.min()), float(loss.max())  # NaN comes out of min, infinities out of either
    finite = bool(np.isfinite(low) and np.isfinite(high))
    if finite and max(-low, high) > MAX_LOSS / len(loss):
        raise NumericsError(
            f"a loss of {max(-low, high):.6g} is too large: the total of {len(loss)} items may exceed {MAX_LOSS:g}. "
            "Divide all losses by one number; the best choice stays the same."
        )
    if finite and low >= 0:
        return
    bad = loss < 0 if finite else ~np.isfinite(loss)
    item, choice = (int(index) for index in np.unravel_index(int(np.argmax(bad)), loss.shape))
    raise NumericsError(
        f"{problem.item_name(item)}, {problem.choice_name(choice)}: the loss is {loss[item, choice]}; losses must be "
        "finite and >= 0."
    )
