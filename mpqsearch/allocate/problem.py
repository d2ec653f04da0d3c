"""The allocation problem and its result: numbers only, validated once, read-only afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpqsearch.errors import ConfigError, NumericsError, UnknownNameError

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]

Status = Literal["optimal", "feasible", "time_limit", "heuristic"]
"""``optimal``: proven. ``feasible``: stopped early, ``gap`` certified. ``time_limit``: the same, because time ran out.
``heuristic``: no useful bound is known (``gap`` is 1 or more)."""

FREE = -1
"""Label of an item that belongs to no tie group, or of an item that is not fixed."""

WIDTH_SLIP = 1e-9
"""Mean widths in bits are compared up to this; one channel of a million moves a mean by more."""

MAX_TOTAL = 2**62
"""Largest total cost that is accepted, so that no sum of int64 costs can overflow."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostBudget:
    """One more budget beside the main one, such as BOPs or a measured latency in whole nanoseconds.

    Args:
        name: What is limited, used in messages and in ``AllocationResult.costs``.
        cost: ``[n, k]`` integers >= 0.
        limit: Largest total that is allowed.
    """

    name: str
    cost: Integers
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerRules:
    """Constraints on the items (channels) of one layer taken together.

    Args:
        layer: ``[n]`` integers: the layer of every item, 0 .. L-1. width: ``[k]`` numbers: the width in bits that a
        choice stands for in the averages below. average: ``[L]`` or one number: the mean width of a layer's items is
        exactly this (MPQ-DM's per-layer budget). average_step: the mean width of every layer is a multiple of this (1:
        some integer, chosen per layer). average_min: ``[L]`` or one number: lower bound of a layer's mean width.
        average_max: ``[L]`` or one number: upper bound of a layer's mean width. max_distinct: at most so many different
        choices inside one layer. max_widths: at most so many different widths inside one layer; choices of one width
        (schemes, say) count once. mixed_overhead: ``[L]`` or one integer: cost that a layer pays once if it uses more
        than one choice (channel tags). choice_overhead: ``[L, k]`` integers: cost that a layer pays once for every
        choice that it uses.
    """

    layer: Integers
    width: Floats
    average: Floats | float | None = None
    average_step: float | None = None
    average_min: Floats | float | None = None
    average_max: Floats | float | None = None
    max_distinct: int | None = None
    max_widths: int | None = None
    mixed_overhead: Integers | int | None = None
    choice_overhead: Integers | None = None

    def __post_init__(self) -> None:
        layer = np.asarray(self.layer)
        if layer.ndim != 1 or not np.issubdtype(layer.dtype, np.integer) or (layer.size and int(layer.min()) < 0):
            raise ConfigError(f"LayerRules.layer must be a vector of integers >= 0, got {layer.dtype} {layer.shape}.")
        object.__setattr__(self, "layer", _frozen(layer))
        object.__setattr__(self, "width", _frozen(np.asarray(self.width, dtype=np.float64)))
        for what in ("average", "average_min", "average_max", "mixed_overhead"):
            given = getattr(self, what)
            if given is not None and np.shape(given) not in ((), (self.n_layers,)):
                raise ConfigError(
                    f"LayerRules.{what} must be one number or {self.n_layers}, got shape {np.shape(given)}."
                )
        overhead = self.choice_overhead
        if overhead is not None and np.shape(overhead) != (self.n_layers, len(self.width)):
            raise ConfigError(
                f"LayerRules.choice_overhead must have shape {(self.n_layers, len(self.width))}, got "
                f"{np.shape(overhead)}."
            )
        if any(given is not None and np.min(given) < 0 for given in (self.mixed_overhead, overhead)):
            raise ConfigError("LayerRules: overheads must be >= 0.")
        if self.average_step is not None and not self.average_step > 0:
            raise ConfigError(f"LayerRules.average_step must be > 0, got {self.average_step}.")
        for what in ("max_distinct", "max_widths"):
            given = getattr(self, what)
            if given is not None and given < 1:
                raise ConfigError(f"LayerRules.{what} must be >= 1, got {given}.")

    @property
    def n_layers(self) -> int:
        """Number of layers, L."""
        return int(self.layer.max()) + 1 if self.layer.size else 0

    def average_bounds(self) -> tuple[Floats, Floats]:
        """``[L]`` smallest and ``[L]`` largest mean width that a layer may have."""
        low = self.average_min if self.average is None else self.average
        high = self.average_max if self.average is None else self.average
        spread = (self.n_layers,)
        return (
            np.broadcast_to(np.asarray(-np.inf if low is None else low, dtype=np.float64), spread),
            np.broadcast_to(np.asarray(np.inf if high is None else high, dtype=np.float64), spread),
        )

    def permits(self, choice: Integers) -> bool:
        """Whether every layer's mean width and numbers of different choices and widths obey the rules."""
        count = np.bincount(self.layer, minlength=self.n_layers)
        present = count > 0
        mean = np.bincount(self.layer, weights=self.width[choice], minlength=self.n_layers)[present] / count[present]
        low, high = (bound[present] for bound in self.average_bounds())
        if bool(((mean < low - WIDTH_SLIP) | (mean > high + WIDTH_SLIP)).any()):
            return False
        if self.average_step is not None:
            steps = mean / self.average_step
            if bool((np.abs(steps - np.round(steps)) > WIDTH_SLIP).any()):
                return False
        values, which = np.unique(self.width, return_inverse=True)
        return self._few(choice, len(self.width), self.max_distinct) and self._few(
            which[choice], len(values), self.max_widths
        )

    def _few(self, used_by_item: Integers, kinds: int, most: int | None) -> bool:
        """Whether no layer's items use more than ``most`` different kinds of something."""
        if most is None:
            return True
        used = np.zeros((self.n_layers, kinds), dtype=bool)
        used[self.layer, used_by_item] = True
        return bool((used.sum(axis=1) <= most).all())


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllocationProblem:
    """Choose one format per item so that the total loss is least and no budget is exceeded.

    An item is a layer or a channel; a choice is a format: a width, a scheme, a group size. Losses may be
    non-monotone and non-convex in the width; only their sum matters. Tables are kept as given (no copy), so a
    Fortran-ordered ``[n, k]`` table, float32 losses and int32 costs are the fastest input for millions of items.

    Args:
        loss: ``[n, k]`` float32 or float64, finite and >= 0 wherever ``allowed``.
        cost: ``[n, k]`` integers >= 0, usually bits.
        limit: Largest total cost that is allowed, in the unit of ``cost``.
        allowed: ``[n, k]`` booleans; a choice that is not allowed may hold any numbers, even NaN.
        ties: Groups of items that must share a choice: a list of groups of indices or names, or ``[n]`` integer labels
            where -1 means free.
        fixed: Items whose choice is given: item index or name -> choice index or name, or ``[n]`` choice indices
            where -1 means free.
        names: Item names, used in messages; unique.
        choices: Choice names, used in messages; unique.
        budget_name: What ``cost`` counts.
        more_budgets: Further budgets that hold at the same time.
        layers: Constraints on all items of a layer together.
        pairwise: Losses of pairs of items.
        signed_loss: Accept negative losses (differences of noisy measurements).

    Raises:
        ConfigError: A table has the wrong shape or type, a cost is negative, a name is unknown, ties or overrides
        contradict. NumericsError: A loss is NaN, infinite or (unless ``signed_loss``) negative.
    """

    loss: Floats
    cost: Integers
    limit: int
    allowed: Mask | None = None
    ties: Iterable[Sequence[int | str]] | Integers | None = None
    fixed: Mapping[int | str, int | str] | Integers | None = None
    names: Sequence[str] | None = None
    choices: Sequence[str] | None = None
    budget_name: str = "cost"
    more_budgets: tuple[CostBudget, ...] = ()
    layers: LayerRules | None = None
    pairwise: PairwiseTerms | None = None
    signed_loss: bool = False
    tie_labels: Integers | None = field(init=False, default=None)
    fixed_choice: Integers | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        loss = _loss_table(self.loss)
        put = object.__setattr__
        put(self, "loss", loss)
        put(self, "names", _checked_names("names", self.names, loss.shape[0]))
        put(self, "choices", _checked_names("choices", self.choices, loss.shape[1]))
        put(self, "cost", _cost_table(self, self.cost, self.budget_name))
        put(self, "limit", _whole(self.limit, self.budget_name))
        put(self, "more_budgets", tuple(self._checked_budget(budget) for budget in self.more_budgets))
        if self.allowed is not None:
            put(self, "allowed", _allowed_table(self.allowed, loss.shape))
        put(self, "fixed_choice", self._resolved_fixed())
        put(self, "fixed", self.fixed_choice)  # arrays from here on, so that dataclasses.replace can pass them on
        put(self, "tie_labels", self._resolved_ties())
        put(self, "ties", self.tie_labels)
        _check_every_item_has_a_choice(self)
        _check_losses(self)
        self._check_parts()

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

    def item_name(self, index: int) -> str:
        """How messages call item ``index``."""
        return repr(self.names[index]) if self.names is not None else f"item {index}"

    def choice_name(self, index: int) -> str:
        """How messages call choice ``index``."""
        return repr(self.choices[index]) if self.choices is not None else f"choice {index}"

    def evaluate(self, choice: Integers) -> tuple[float, tuple[int, ...]]:
        """Exact total loss (float64, pairwise terms included) and integer costs of ``choice [n]``."""
        from mpqsearch.allocate import passes

        picked = np.asarray(choice)
        loss, main_cost = passes.totals(self.loss, self.cost, picked)
        if self.pairwise is not None and len(self.pairwise.first):
            pairs = self.pairwise
            values = pairs.value[np.arange(len(pairs.first)), picked[pairs.first], picked[pairs.second]]
            loss += float(np.sum(values, dtype=np.float64))
        totals = [main_cost]
        totals += [
            int(np.sum(budget.cost[np.arange(self.n_items), picked], dtype=np.int64)) for budget in self.more_budgets
        ]
        if self.layers is not None:
            totals[0] += layer_overhead(self.layers, picked, self.n_choices)
        return loss, tuple(totals)

    def choice_index(self, choice: int | str) -> int:
        """Index of a choice given by index or name."""
        return _index(choice, _positions(self.choices), self.n_choices, "choice")

    def permits(self, choice: Integers) -> bool:
        """Whether ``choice [n]`` obeys the allowed choices, overrides, ties and layer rules (not the budgets)."""
        picked = np.asarray(choice)
        if picked.shape != (self.n_items,) or (picked.size and not 0 <= picked.min() <= picked.max() < self.n_choices):
            return False
        if self.allowed is not None and not bool(self.allowed[np.arange(self.n_items), picked].all()):
            return False
        if self.fixed_choice is not None and bool(((self.fixed_choice != FREE) & (self.fixed_choice != picked)).any()):
            return False
        if self.layers is not None and not self.layers.permits(picked):
            return False
        if self.tie_labels is None:
            return True
        tied = self.tie_labels != FREE
        first = np.full(int(self.tie_labels.max(initial=FREE)) + 1, FREE, dtype=np.int64)
        first[self.tie_labels[tied]] = picked[tied]
        return bool((first[self.tie_labels[tied]] == picked[tied]).all())

    def _checked_budget(self, budget: CostBudget) -> CostBudget:
        if budget.name == self.budget_name:
            raise ConfigError(f"two budgets are called {budget.name!r}; give each its own name.")
        cost = _cost_table(self, budget.cost, budget.name)
        return CostBudget(name=budget.name, cost=cost, limit=_whole(budget.limit, budget.name))

    def _resolved_fixed(self) -> Integers | None:
        if self.fixed is None:
            return None
        if isinstance(self.fixed, Mapping):
            fixed = np.full(self.n_items, FREE, dtype=np.int32)
            positions = _positions(self.names)
            for item, choice in self.fixed.items():
                fixed[_index(item, positions, self.n_items, "item")] = self.choice_index(choice)
        else:
            fixed = np.asarray(self.fixed)
            if fixed.shape != (self.n_items,) or not np.issubdtype(fixed.dtype, np.integer):
                raise ConfigError(f"fixed must hold {self.n_items} integers, got {fixed.dtype} {fixed.shape}.")
            if fixed.size and not FREE <= fixed.min() <= fixed.max() < self.n_choices:
                raise ConfigError(f"fixed holds a choice outside -1 .. {self.n_choices - 1}.")
        if self.allowed is not None:
            rows = np.flatnonzero(fixed != FREE)
            bad = rows[~self.allowed[rows, fixed[rows]]]
            if bad.size:
                item = int(bad[0])
                raise ConfigError(
                    f"{self.item_name(item)} is fixed to {self.choice_name(int(fixed[item]))}, which is not allowed "
                    "for it."
                )
        return _frozen(fixed)

    def _resolved_ties(self) -> Integers | None:
        if self.ties is None:
            return None
        if isinstance(self.ties, np.ndarray) and self.ties.ndim == 1 and np.issubdtype(self.ties.dtype, np.integer):
            if self.ties.shape != (self.n_items,):
                raise ConfigError(f"ties holds {self.ties.size} labels for {self.n_items} items.")
            if self.ties.size and self.ties.min() < FREE:
                raise ConfigError("ties: labels must be -1 (free) or a group number >= 0.")
            return _frozen(self.ties)
        labels = np.full(self.n_items, FREE, dtype=np.int64)
        positions = _positions(self.names)
        for number, group in enumerate(self.ties):
            for item in group:
                index = _index(item, positions, self.n_items, "item")
                if labels[index] not in (FREE, number):
                    raise ConfigError(f"{self.item_name(index)} is in two tie groups; join the groups into one.")
                labels[index] = number
        return _frozen(labels)

    def _check_parts(self) -> None:
        if self.layers is not None:
            if self.layers.layer.shape != (self.n_items,):
                raise ConfigError(f"LayerRules.layer has {self.layers.layer.size} entries for {self.n_items} items.")
            if self.layers.width.shape != (self.n_choices,):
                raise ConfigError(
                    f"LayerRules.width has shape {self.layers.width.shape}; {self.n_choices} choices are asked for."
                )
        if self.pairwise is not None and len(self.pairwise.first):
            ends = np.concatenate([self.pairwise.first, self.pairwise.second])
            if not 0 <= ends.min() <= ends.max() < self.n_items:
                raise ConfigError(f"PairwiseTerms names an item outside 0 .. {self.n_items - 1}.")
            if self.pairwise.value.shape[1:] != (self.n_choices, self.n_choices):
                raise ConfigError(
                    f"PairwiseTerms.value has shape {self.pairwise.value.shape}; "
                    f"[p, {self.n_choices}, {self.n_choices}] is asked for."
                )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllocationResult:
    """A solved allocation. ``loss`` and ``cost`` are recomputed from ``choice``, never taken from a solver.

    Attributes:
        status: What is proven about the answer, see ``Status``.
        choice: ``[n]`` choice index per item.
        loss: Total loss of ``choice``.
        cost: Total of the main budget, never above the limit.
        costs: Total of every budget by name.
        lower_bound: No admissible choice has a smaller loss (up to float64 rounding).
        gap: ``(loss - lower_bound) / |loss|``; 0 when proven optimal.
        multipliers: Lagrange multiplier of every budget: loss that one more unit of that budget would save.
        dual_bound: The lower bound that the multipliers prove by themselves in one pass over the tables.
        solver: Name of the solver that found ``choice``.
        seconds: Wall time of the solve.
    """

    status: Status
    choice: NDArray[np.int32]
    loss: float
    cost: int
    costs: Mapping[str, int]
    lower_bound: float
    gap: float
    multipliers: tuple[float, ...]
    dual_bound: float
    solver: str
    seconds: float

    @property
    def multiplier(self) -> float:
        """Multiplier of the main budget: the marginal rate in loss per unit of cost."""
        return self.multipliers[0] if self.multipliers else 0.0


def relative_gap(loss: float, bound: float) -> float:
    """Relative distance of ``loss`` from a lower ``bound``; 0 when they are equal, infinite without a bound."""
    if loss <= bound:
        return 0.0
    if loss == 0 or not math.isfinite(bound):
        return float("inf")
    return (loss - bound) / abs(loss)


def whole_units(values: Floats, unit: float) -> NDArray[np.int64]:
    """Measured costs as whole multiples of ``unit``, rounded up, so that a budget in units is never exceeded in truth.

    Args:
        values: Finite measurements >= 0 of any shape, such as latencies in seconds.
        unit: Size of one unit, such as 1e-9; the rounding adds less than this per cell.

    Raises:
        NumericsError: A value is NaN, infinite or negative.
        ConfigError: The unit is not positive, or a value is too large for it.
    """
    table = np.asarray(values, dtype=np.float64)
    if not unit > 0:
        raise ConfigError(f"unit must be > 0, got {unit}.")
    if not bool((np.isfinite(table) & (table >= 0)).all()):
        raise NumericsError("measured costs must be finite and >= 0.")
    units = np.ceil(table / unit)
    if table.size and float(units.max()) >= 2**53:
        raise ConfigError(f"a cost is {units.max():.3g} units of {unit}; use a larger unit.")
    return units.astype(np.int64)


def layer_overhead(rules: LayerRules, choice: Integers, n_choices: int) -> int:
    """Cost that layers pay once for the choices they use (tags of mixed layers, per-choice overheads)."""
    if rules.mixed_overhead is None and rules.choice_overhead is None:
        return 0
    used = np.zeros((rules.n_layers, n_choices), dtype=bool)
    used[rules.layer, choice] = True
    total = 0
    if rules.mixed_overhead is not None:
        tags = np.broadcast_to(np.asarray(rules.mixed_overhead, dtype=np.int64), (rules.n_layers,))
        total += int(tags[used.sum(axis=1) > 1].sum())
    if rules.choice_overhead is not None:
        total += int(np.asarray(rules.choice_overhead, dtype=np.int64)[used].sum())
    return total


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
        raise ConfigError(
            f"budget {name!r}: cost must be integers (bits, bytes, nanoseconds), got {table.dtype}; "
            "see allocate.whole_units for measured values."
        )
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


def _positions(names: Sequence[str] | None) -> dict[str, int]:
    return {name: position for position, name in enumerate(names or ())}


def _index(asked: int | str, positions: Mapping[str, int], count: int, what: str) -> int:
    if isinstance(asked, str):
        if asked not in positions:
            raise UnknownNameError(what, asked, positions)
        return positions[asked]
    if not 0 <= int(asked) < count:
        raise ConfigError(f"{what} {asked} is outside 0 .. {count - 1}.")
    return int(asked)


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
    if np.isfinite(low) and np.isfinite(high) and (low >= 0 or problem.signed_loss):
        return
    bad = ~np.isfinite(loss) if not (np.isfinite(low) and np.isfinite(high)) else loss < 0
    item, choice = (int(index) for index in np.unravel_index(int(np.argmax(bad)), loss.shape))
    raise NumericsError(
        f"{problem.item_name(item)}, {problem.choice_name(choice)}: the loss is {loss[item, choice]}; losses must be "
        "finite" + ("." if problem.signed_loss else " and >= 0 (set signed_loss=True to allow negative ones).")
    )
