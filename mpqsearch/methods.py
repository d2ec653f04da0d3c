"""Ways to allocate bits, all to the same noun: uniform, random, OMQ, and integer programs over layers or channels.

A method turns a profile and a budget into an `Allocation`. Losses are named transforms of the raw measurements
(`LOSSES`); the integer programs see numbers only. Every map is costed again from the map itself, in
`mpqsearch.core.budget`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import AllocationProblem, AllocationResult, PairwiseTerms, solve
from mpqsearch.core import (
    FULL_PRECISION,
    BitMap,
    Budget,
    LayerSpec,
    LayerTable,
    Policy,
    QuantFormat,
    SensitivityProfile,
    StorageModel,
    bops,
    size_bits,
)
from mpqsearch.core.budget import DEFAULT_STORAGE, uniform_map
from mpqsearch.core.formats import ROUNDINGS, WIDTHS, check_width
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, UnknownNameError

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
T = TypeVar("T")

KEPT_TASKS = 8
"""Tasks of one table whose costs are kept, the oldest dropped: a search over activation widths has a policy a trial,
and each has a cost table of all channels."""

LOSSES = ("weight", "output", "gain", "probe", "sampler", "slope", "context", "operating", "final")
"""``weight``: squared weight error. ``output``: exact layer-output error. ``gain``: output error times the channel's
mean squared gradient. ``probe``: the same inside a layer, with layer totals from first-order probes of the real weight
error. ``sampler``: layer totals from such probes of the final sample, through all steps. ``slope``: what a layer's
error does among the errors of the others, at maps that mix widths in balance (`mpqsearch.profile.contexts`): it
predicts what a whole map loses, at the widths that were mixed, and is not for choosing widths. ``context``: ``sampler``
and that slope, for maps beyond those widths. ``operating``: layer totals from slope and curvature of the final samples'
error at a given map, after `mpqsearch.profile.remeasure`. ``final``: layer totals from final samples with one layer
quantized at a time (where measured, else scaled from ``probe``)."""

BEST_LOSS = "auto"
"""The best of `LOSSES` that the profile can give: see `best_loss`."""

LEAST = 0.1
"""Share of a layer's own loss that the slope among the other layers' errors leaves at least: it cannot make an error a
gain."""

CAUTION = 2.0
"""Standard errors by which a change at an operating point is taken for worse than measured."""

ALLOCATORS = (
    "uniform",
    "random",
    "omq",
    "omq-paper",
    "omq-released",
    "omq-plus",
    "ilp-layer",
    "ilp-channel",
    "search",
    "map",
)
"""``omq-paper``, ``omq-released``, ``omq-plus``: MPQ-DM's allocation as its paper has it, as its code has it, and
promotion only (see `_omq_paper` and its neighbours); all three smooth. ``omq``: the search of ``omq-paper`` with the
method's own quantizer and full-precision inputs. ``search`` and ``map`` solve nothing: the map is that of an outer
search, or one from elsewhere."""

_OMQ = ("omq", "omq-paper", "omq-released", "omq-plus")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """One row of a comparison: how widths are chosen (``allocator``, ``loss``) and what they mean (``scheme``,
    ``bias_correction``).

    ``rounding`` is ``nearest`` or ``gptq`` (`QuantFormat.rounding`); stages price the latter with the errors that it
    leaves. ``order`` (OMQ only) ranks the channels of a layer: ``kurtosis`` of the smoothed rows as in MPQ-DM,
    ``random``, ``variance`` or ``output``. ``act_bits`` is the width of the inputs of searched layers (16: not
    quantized; other layers as `Policy.activations_of` says), with one scale a layer, or one for each timestep of the
    sampler with ``act_timesteps``. ``act_choices`` (``ilp-layer`` under a BOPs budget) lets the integer program choose
    the width of each searched layer's input among these instead. ``smooth_by_layer`` gives each layer whose input is
    quantized the alpha of smoothing with the least output error instead of 0.5 (`mpqsearch.profile.choose_alphas`: six
    runs of the sampler a map, no storage); the stages of a run do that, `allocate` by itself leaves 0.5.
    """

    name: str
    allocator: str
    loss: str = BEST_LOSS
    scheme: str = "asymmetric"
    bias_correction: bool = False
    smooth: bool = False
    smooth_by_layer: bool = False
    order: str = "kurtosis"
    solver: str = "auto"
    seed: int = 0
    act_bits: int = FULL_PRECISION
    act_timesteps: bool = False
    act_choices: tuple[int, ...] = ()
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.allocator in _OMQ[1:]:
            object.__setattr__(self, "smooth", True)
        check_width(self.act_bits, f"method {self.name!r}, act_bits")
        for bits in self.act_choices:
            check_width(bits, f"method {self.name!r}, act_choices")
        if self.act_choices and self.allocator != "ilp-layer":
            raise ConfigError(
                f"method {self.name!r}: act_choices go with the allocator ilp-layer, got {self.allocator!r}"
            )
        if self.smooth_by_layer and not (
            self.smooth and min(self.act_bits, *self.act_choices, FULL_PRECISION) < FULL_PRECISION
        ):
            raise ConfigError(
                f"method {self.name!r}: smooth_by_layer suits smoothing to quantized inputs, and needs smooth = true "
                "and act_bits "
                f"or act_choices below {FULL_PRECISION}; got smooth = {str(self.smooth).lower()}, act_bits = "
                f"{self.act_bits}"
            )
        for what, value, known in (
            ("allocator", self.allocator, ALLOCATORS),
            ("loss", self.loss, (BEST_LOSS, *LOSSES)),
            ("OMQ order", self.order, tuple(ORDERS)),
            ("rounding", self.rounding, ROUNDINGS),
        ):
            if value not in known:
                raise UnknownNameError(what, value, known, f"(method {self.name!r})")

    @property
    def granularity(self) -> str:
        """``channel`` when the method may mix widths inside a layer, whatever one map of it does."""
        return "channel" if self.allocator in (*_OMQ, "ilp-channel", "search", "map") else "layer"

    @property
    def variant(self) -> str:
        """The quantizer variant of the profile that prices this method."""
        return f"{self.scheme}+smooth" if self.smooth else self.scheme


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A bit map with what is known of it. ``result`` is None for methods that solve nothing."""

    method: MethodSpec
    budget: Budget
    bit_map: BitMap
    limit: int
    size_bits: int
    bops: int
    predicted_loss: float
    result: AllocationResult | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def within_budget(self) -> bool:
        """False when a method cannot keep to the budget, such as OMQ with the tags of its mixed channels."""
        return (self.bops if self.budget.quantity == "bops" else self.size_bits) <= self.limit

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data (the bit map has a file of its own)."""
        from dataclasses import asdict

        solved = None
        if self.result is not None:
            r = self.result
            finite = {k: float(v) for k, v in (("lower_bound", r.lower_bound), ("gap", r.gap)) if np.isfinite(v)}
            solved = {
                "status": r.status,
                "solver": r.solver,
                "seconds": round(r.seconds, 4),
                "loss": float(r.loss),
                **finite,
            }
        return {
            "method": asdict(self.method),
            "budget": self.budget.label(),
            "limit": self.limit,
            "size_bits": self.size_bits,
            "bops": self.bops,
            "within_budget": self.within_budget,
            "predicted_loss": self.predicted_loss,
            "bit_map_digest": self.bit_map.digest,
            "result": solved,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Program:
    """The integer program behind an ``ilp-*`` method: its numbers, and what they stand for.

    An item is a layer or a channel: ``item_layer`` ``[n]`` says to which of ``layers`` it belongs. ``widths`` are the
    bits of every choice, ``inputs`` those of the layer's input where these are chosen too. ``fixed_cost`` is what the
    whole-model budget pays for all that is no item.
    """

    problem: AllocationProblem
    layers: tuple[str, ...]
    item_layer: NDArray[np.int64]
    widths: tuple[int, ...]
    fixed_cost: int
    inputs: tuple[int, ...] = ()

    def activations(self, choice: NDArray[np.int32]) -> dict[str, int]:
        """Width of the input of every layer under a choice ``[n]``, for a program that chooses them."""
        return {n: self.inputs[int(c)] for n, c in zip(self.layers, choice, strict=True)}

    def weights(self, choice: NDArray[np.int32]) -> dict[str, NDArray[np.uint8]]:
        """Width (or vector of widths) of every layer under a choice ``[n]`` of every item."""
        chosen = np.array(self.widths, dtype=np.uint8)[choice]
        if len(self.item_layer) == len(self.layers):
            return dict(zip(self.layers, chosen, strict=True))
        cuts = [0, *np.cumsum(np.bincount(self.item_layer, minlength=len(self.layers))).tolist()]
        return {n: chosen[a:b] for n, a, b in zip(self.layers, cuts, cuts[1:], strict=False)}

    def choice(self, bit_map: BitMap) -> NDArray[np.int32]:
        """Choice ``[n]`` of every item in a bit map; one that this program made, or one of the same widths."""
        counts = np.bincount(self.item_layer, minlength=len(self.layers))
        bits = np.concatenate(
            [np.broadcast_to(bit_map.weights[n], int(c)) for n, c in zip(self.layers, counts, strict=True)]
        )
        if not self.inputs:
            return np.searchsorted(self.widths, bits).astype(np.int32)
        pairs = list(zip(self.widths, self.inputs, strict=True))
        acts = [bit_map.activations.get(n, FULL_PRECISION) for n in self.layers]
        return np.array([pairs.index((int(w), a)) for w, a in zip(bits, acts, strict=True)], dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class _Task:
    table: LayerTable
    profile: SensitivityProfile
    policy: Policy
    budget: Budget
    method: MethodSpec
    format: QuantFormat
    storage: StorageModel
    limit: int
    activation_steps: int = 1
    losses: Floats | None = None
    pairs: PairwiseTerms | None = None

    @cached_property
    def _known(self) -> dict[Any, Any]:
        m = self.method
        widths = (m.act_bits, m.act_choices, self.activation_steps)
        key = (self.policy.key, self.format, self.storage, self.budget.quantity, *widths)
        tasks = cast("dict[Any, dict[Any, Any]]", self.table.memo.setdefault("tasks", {}))
        if key not in tasks and len(tasks) >= KEPT_TASKS:
            del tasks[next(iter(tasks))]
        return tasks.setdefault(key, {})

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What follows from table, policy, format and prices alone, whatever losses and limit are: made once, and not
        to be changed."""
        known = self._known
        if key not in known:
            made = make()
            if isinstance(made, np.ndarray):
                made.setflags(write=False)
            known[key] = made
        return cast("T", known[key])

    def of_losses(self, key: Any, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What follows from losses that were handed in, whatever the limit: kept for the next budget until others come,
        and not to be changed."""
        if self.losses is None or self.losses.flags.writeable:
            return make()
        memo = self.profile.memo
        if memo.get("of losses", (None,))[0] is not self.losses:
            memo["of losses"] = (self.losses, {})
        known: dict[Any, NDArray[Any]] = memo["of losses"][1]
        key = (key, self.policy.key, self.method.act_choices)
        if key not in known:
            known[key] = make()
            known[key].setflags(write=False)
        return known[key]

    def channel_losses(self) -> Floats:
        if self.losses is not None:
            return self.losses
        m = self.method
        # Errors of quantized inputs were measured on one prediction; they may be added to losses of that unit only.
        loss = "probe" if m.act_choices and m.loss == BEST_LOSS else m.loss
        if m.act_choices and loss in ("sampler", "operating", "final"):
            raise ConfigError(f"method {m.name!r}: act_choices go with the losses 'gain' and 'probe', got {loss!r}")
        return channel_losses(self.profile, self.table, m.variant, loss, bias_correction=m.bias_correction)

    @property
    def row_error(self) -> str:
        """The errors that split the channels of a layer: those of its output, or what there is."""
        return "output_error" if f"output_error/{self.method.variant}" in self.profile.arrays else "weight_error"

    @property
    def searched(self) -> tuple[str, ...]:
        return self.once("searched", lambda: tuple(la.name for la in self.table if self.policy.fixed_width(la) is None))

    def cost(self, bit_map: BitMap) -> int:
        return (
            bops(self.table, bit_map)
            if self.budget.quantity == "bops"
            else size_bits(self.table, bit_map, self.storage)
        )

    def map_of(self, widths: Mapping[str, Any]) -> BitMap:
        base = self.once(
            "map",
            lambda: uniform_map(
                self.table,
                self.policy,
                min(self.policy.widths),
                self.format,
                act_bits=max(self.method.act_choices, default=self.method.act_bits),
                activation_steps=self.activation_steps,
            ),
        )
        return replace(base, weights={**base.weights, **widths})

    @property
    def least(self) -> int:
        """Cost of every searched layer at its cheapest choice."""
        return self.once("least", lambda: self.cost(_smallest(self)))

    @property
    def most(self) -> int:
        """Cost of every searched layer at full precision."""
        return self.once(
            "most", lambda: self.cost(self.map_of({n: np.uint8(FULL_PRECISION) for n in self.table.by_name}))
        )


def allocate(
    method: MethodSpec,
    budget: Budget,
    table: LayerTable,
    profile: SensitivityProfile,
    policy: Policy,
    fmt: QuantFormat,
    storage: StorageModel = DEFAULT_STORAGE,
    *,
    losses: Floats | None = None,
    pairs: PairwiseTerms | None = None,
) -> Allocation:
    """Choose widths under a budget on the whole model.

    ``losses`` ``[C, W]`` take the place of the method's own in the integer programs (an outer search builds them, see
    `mpqsearch.search.surrogate`). ``pairs`` add losses of pairs of searched layers, in the order of the table, to
    ``ilp-layer``.

    Raises `InfeasibleBudgetError` (with the smallest attainable value) when nothing fits, `ConfigError` when the budget
    is above what full use of the widest format takes, `UnknownNameError` when the profile lacks a quantizer variant
    that the method needs.
    """
    task = _task_of(method, budget, table, profile, policy, fmt, storage, losses=losses, pairs=pairs)
    _check_budget(_without_extras(task))
    bit_map, result, notes = _ALLOCATORS[method.allocator](task)
    return Allocation(
        method=method,
        budget=budget,
        bit_map=bit_map,
        limit=task.limit,
        size_bits=size_bits(table, bit_map, storage),
        bops=bops(table, bit_map),
        predicted_loss=predicted_loss(table, profile, bit_map, bias_correction=method.bias_correction),
        result=result,
        notes=notes,
    )


def _task_of(
    method: MethodSpec,
    budget: Budget,
    table: LayerTable,
    profile: SensitivityProfile,
    policy: Policy,
    fmt: QuantFormat,
    storage: StorageModel,
    *,
    losses: Floats | None = None,
    pairs: PairwiseTerms | None = None,
) -> _Task:
    """What is asked, checked against the profile."""
    if ("checked", policy.key) not in table.memo:
        policy.check(table)
        table.memo["checked", policy.key] = True
    if profile.memo.get("fits") is not table:
        table.require_same_names(set(profile.names), "the profile")
        profile.memo["fits"] = table
    if profile.model_digest != table.digest:
        raise ConfigError("the profile was measured on another model; profile this one")
    if method.variant not in profile.variants:
        raise UnknownNameError(
            "quantizer variant", method.variant, profile.variants, "Add its scheme to [calibration] and profile again."
        )
    if set(policy.widths) - set(profile.widths):
        raise ConfigError(
            f"the policy searches the widths {policy.widths}, the profile has {profile.widths}; profile again"
        )
    chosen = QuantFormat(
        scheme=method.scheme,
        criterion=fmt.criterion,
        p=fmt.p,
        n_candidates=fmt.n_candidates,
        smooth=method.smooth,
        rounding=method.rounding,
    )
    steps = _activation_steps(method, profile)
    limit = (
        int(budget.limit)
        if budget.quantity == "bops"
        else budget.limit_bits(table, policy, storage, act_bits=method.act_bits, activation_steps=steps)
    )
    task = _Task(
        table=table,
        profile=profile,
        policy=policy,
        budget=budget,
        method=method,
        format=chosen,
        storage=storage,
        limit=limit,
        activation_steps=steps,
        losses=losses,
        pairs=pairs,
    )
    if losses is not None and losses.shape != (sum(profile.channels), len(profile.widths)):
        raise ConfigError(
            f"losses must be {(sum(profile.channels), len(profile.widths))} as in the profile, got {losses.shape}"
        )
    return task


def channel_losses(
    profile: SensitivityProfile, table: LayerTable, variant: str, loss: str, *, bias_correction: bool
) -> Floats:
    """Loss ``[C, W]`` of every channel at every width of the profile."""
    loss = best_loss(profile, variant) if loss == BEST_LOSS else loss
    what = f"the loss {loss!r}"
    if loss == "weight":
        weight: Floats = profile.need(f"weight_error/{variant}", what).astype(np.float64)
        return weight
    if loss == "slope":
        return _slopes_of_rows(profile, table, variant, bias_correction=bias_correction)
    error: Floats = profile.need(f"output_error/{variant}", what).astype(np.float64)
    if bias_correction:
        has_bias = np.repeat(_has_bias(table, profile), profile.channels)
        error = np.where(has_bias[:, None], profile.need(f"output_error_corrected/{variant}", "bias correction"), error)
    if loss == "output":
        return error
    rows = profile.need("sensitivity", what).astype(np.float64)[:, None] * error
    if loss == "gain":
        return rows
    sums = profile.layer_sum(rows)
    if loss in ("sampler", "context"):
        if loss == "context":
            _context_slopes(profile, variant, loss)  # what is asked for is named first
        if f"layer_sampler_error/{variant}" in profile.arrays:
            totals = profile.arrays[f"layer_sampler_error/{variant}"].astype(np.float64)
        else:
            totals = sums * _sampler_ratio(profile, table, variant, bias_correction=bias_correction)
        if loss == "context":
            totals = _among_others(profile, variant, totals)
    else:
        totals = _layer_totals(profile, variant, loss, sums)
    factor = np.divide(totals, sums, out=np.zeros_like(totals), where=sums > 0)
    scaled: Floats = rows * np.repeat(factor, profile.channels, axis=0)
    return scaled


def _has_bias(table: LayerTable, profile: SensitivityProfile) -> tuple[bool, ...]:
    """Of every layer of a profile, whether it has a bias, which can take off the mean of its error."""
    key = ("has bias", profile.names)
    if key not in table.memo:
        table.memo[key] = tuple(table[n].has_bias for n in profile.names)
    known: tuple[bool, ...] = table.memo[key]
    return known


def available_losses(profile: SensitivityProfile, variant: str) -> tuple[str, ...]:
    """The losses of `LOSSES` for which a profile holds the measurements."""
    needs = dict.fromkeys(LOSSES, "sensitivity") | {
        "weight": f"weight_error/{variant}",
        "output": f"output_error/{variant}",
        "slope": f"weight_error/{variant}",
        "operating": f"layer_operating_error/{variant}",
    }
    families = {k.split("/")[0] for k in profile.arrays}  # of these, one variant gives the others, layer by layer
    once = {
        "sampler": {"layer_sampler_error"},
        "slope": {"layer_context_slope"},
        "context": {"layer_sampler_error", "layer_context_slope"},
        "final": {"layer_final_error"},
    }
    return tuple(k for k in LOSSES if needs[k] in profile.arrays and once.get(k, set()) <= families)


def best_loss(profile: SensitivityProfile, variant: str) -> str:
    """What ``auto`` stands for: ``sampler``, else ``final``, ``probe`` or ``weight``, by what the profile holds.

    That order is what ``studies/predictors`` measured. ``operating`` is never chosen: it belongs to one map; nor are
    ``slope`` and ``context``, which predict the losses of given maps best, and mislead a program that leaves the maps
    at which they were measured. Raises `ConfigError` for a profile that was made for predictions alone.
    """
    if profile.prediction_only:
        raise ConfigError(
            "the loss 'auto' was asked of a profile that was made for predictions alone "
            "(calibration.prediction_only): it says what a given map "
            "loses, and misleads when widths are chosen by it. Profile without --prediction-only in another "
            "--run-dir, or name the loss "
            f"({', '.join(available_losses(profile, variant))})."
        )
    found = available_losses(profile, variant)
    return next(k for k in ("sampler", "final", "probe", "weight") if k in found)


def prediction_loss(profile: SensitivityProfile, mean_width: float = 0.0) -> str:
    """The loss that predicts what a given map loses: what ``auto`` stands for in `predicted_loss`.

    mean_width
        Bits a weight of the map. ``slope`` up to the widest of those that were mixed (``context_widths``; rounded, so
        to 4.5 bits with 2, 3 and 4), where it was measured to be best whatever wider widths a map holds, or where
        nothing else was measured; above them ``context``.

    ``sampler`` where no slopes were measured, ``probe`` where neither was, or where errors of quantized inputs were,
    which are in its unit; ``weight`` from the weights alone. By ``studies/predictors``. Maps of one budget compare;
    those on the two sides of that width less so.
    """
    families = {k.split("/")[0] for k in profile.arrays}
    if profile.weights_only:
        return "weight"
    if "layer_activation_error" in families:
        return "probe"
    if "layer_context_slope" in families:
        mixed = profile.calibration.get("spec", {}).get("context_widths", profile.widths)
        beyond = mean_width > max(mixed) + 0.5 and "layer_sampler_error" in families
        return "context" if beyond else "slope"
    return "sampler" if "layer_sampler_error" in families else "probe"


def _mean_width(table: LayerTable, bit_map: BitMap) -> float:
    """Mean width of the weights that a map quantizes; 0 when it quantizes none."""
    mixed = bit_map.mixed_layers
    means = dict(zip(mixed.names, (mixed.counts @ np.arange(FULL_PRECISION + 1) / mixed.sizes).tolist(), strict=True))
    bits = np.array([means[n] if n in means else float(bit_map.weights[n]) for n in table.by_name])
    if "weights" not in table.memo:
        table.memo["weights"] = np.array([la.n_weights for la in table])
    count = table.memo["weights"] * (bits < FULL_PRECISION)
    return float((bits * count).sum() / max(count.sum(), 1))


def predicted_loss(
    table: LayerTable, profile: SensitivityProfile, bit_map: BitMap, *, bias_correction: bool, loss: str = BEST_LOSS
) -> float:
    """Predicted loss of a whole map under one named loss, whatever method made it: comparable between methods.

    From a profile of the weights alone there is but one prediction, and it is given whatever ``loss`` says. ``auto`` is
    `prediction_loss`.
    """
    if profile.weights_only:
        loss = "weight"
    elif loss == BEST_LOSS:
        loss = prediction_loss(profile, _mean_width(table, bit_map))
    fmt = bit_map.format
    variant = f"{fmt.scheme}+smooth" if fmt.smooth else fmt.scheme
    column = {b: j for j, b in enumerate(profile.widths)}
    # Most layers hold one width: their losses are summed once, and the table of all channels is not even made where all
    # do.
    key = ("layer losses", variant, loss, bias_correction, _has_bias(table, profile))
    whole: dict[tuple[str, int], float] = profile.memo.setdefault(key, {})

    def losses() -> Floats:
        """Those of all channels, kept for the next map, which mostly asks for the same."""
        if profile.memo.get("losses of") != key:
            profile.memo["losses of"] = key
            profile.memo["losses"] = channel_losses(profile, table, variant, loss, bias_correction=bias_correction)
        kept: Floats = profile.memo["losses"]
        return kept

    total = 0.0
    with_inputs = profile.arrays.get("layer_activation_error") if bit_map.activations else None
    for name in table.by_name:
        widths = bit_map.weights[name]
        if (
            not widths.ndim and (bits := int(widths)) in column
        ):  # those that were not profiled cost nothing that is known
            one = (name, bits)
            if one not in whole:
                whole[one] = float(losses()[profile.rows(name), column[bits]].copy().sum())
            total += whole[one]
        if with_inputs is not None and (act := bit_map.activations.get(name)) in column:
            total += float(with_inputs[profile.index[name], column[act]])
    mixed = bit_map.mixed_layers
    if mixed.names:
        place = np.full(FULL_PRECISION + 1, -1)
        place[list(column)] = list(column.values())
        columns = place[mixed.widths]
        first = profile.offsets[[profile.index[n] for n in mixed.names]]
        rows = np.repeat(first - mixed.starts, mixed.sizes) + np.arange(len(columns))
        known = columns >= 0
        total += float(losses()[rows[known], columns[known]].sum())
    return total


def _sampler_ratio(profile: SensitivityProfile, table: LayerTable, variant: str, *, bias_correction: bool) -> Floats:
    """``[L, W]``: effect on the final sample over gain × error, of a variant that was probed; it belongs to the layer
    and carries over."""
    known = sorted(k.split("/")[1] for k in profile.arrays if k.startswith("layer_sampler_error/"))
    if not known:
        raise _lacks(profile, variant, "sampler", "calibration.sampler_seeds")
    source = variant.split("+", maxsplit=1)[0] if variant.split("+", maxsplit=1)[0] in known else known[0]
    base = profile.layer_sum(channel_losses(profile, table, source, "gain", bias_correction=bias_correction))
    through: Floats = profile.arrays[f"layer_sampler_error/{source}"].astype(np.float64)
    return np.divide(through, base, out=np.zeros_like(base), where=base > 0)


def _slopes_of_rows(profile: SensitivityProfile, table: LayerTable, variant: str, *, bias_correction: bool) -> Floats:
    """``2 r'J e`` ``[C, W]``: what the error of a row makes of the mean squared error of the final samples, given those
    of the others.

    Twice the share of a row in the error of a context, since a mean over contexts holds a row's own part only in those
    in which it has that width: summed over a map it comes to about the error of its samples (studies/predictors).
    Inside a layer by gain × error where these were measured, else by the errors of the weights, which also carry the
    slopes of one variant over to another, layer by layer.
    """
    source, slope = _context_slopes(profile, variant, "slope")
    shares = {}
    for name in {variant, source}:
        by = "gain" if f"output_error/{name}" in profile.arrays and "sensitivity" in profile.arrays else "weight"
        shares[name] = channel_losses(profile, table, name, by, bias_correction=bias_correction)
    sums = profile.layer_sum(shares[source])
    factor = np.divide(slope, sums, out=np.zeros_like(sums), where=sums > 0)
    found: Floats = shares[variant] * np.repeat(factor, profile.channels, axis=0)
    return found


def _context_slopes(profile: SensitivityProfile, variant: str, loss: str) -> tuple[str, Floats]:
    """Slopes ``[L, W]`` of a variant, or of another that was measured, and of which."""
    known = sorted(k.split("/")[1] for k in profile.arrays if k.startswith("layer_context_slope/"))
    if not known:
        raise _lacks(profile, variant, loss, "calibration.context_seeds")
    source = next((v for v in (variant, variant.split("+", maxsplit=1)[0]) if v in known), known[0])
    return source, profile.arrays[f"layer_context_slope/{source}"].astype(np.float64)


def _lacks(profile: SensitivityProfile, variant: str, loss: str, setting: str) -> ConfigError:
    """What to raise for a loss that was not measured."""
    there = ", ".join(available_losses(profile, variant))
    calls = profile.calibration.get("recorded_calls")
    if calls:
        return ConfigError(
            f"the loss {loss!r} was asked for, which is measured on final samples; this profile was measured on "
            f"{calls} recorded calls, which bring "
            f"no sampler. It allows {there}: choose one of these as the loss of the method, or 'auto'."
        )
    return ConfigError(
        f"the loss {loss!r} needs {setting} in the profile, which allows {there}; set it and profile again"
    )


def _among_others(profile: SensitivityProfile, variant: str, own: Floats) -> Floats:
    """Layer totals ``[L, W]`` with the slope among the errors of the others, given those of layers alone.

    A slope belongs to the errors that the others had where it was measured. In a map of wider widths they are smaller,
    so above the middle of ``context_widths`` it is taken down with the square root of the whole model's loss. A variant
    that was not measured takes another's ratio.
    """
    source, slope = _context_slopes(profile, variant, "context")
    if source != variant:
        alone = profile.arrays[f"layer_sampler_error/{source}"].astype(np.float64)
        slope = slope * np.divide(own, alone, out=np.zeros_like(own), where=alone > 0)
    mixed = [b for b in profile.calibration.get("spec", {}).get("context_widths", ()) if b in profile.widths]
    whole = own.sum(axis=0)
    middle = whole[profile.widths.index(sorted(mixed)[len(mixed) // 2])] if mixed else whole[0]
    share = np.sqrt(np.divide(whole, middle, out=np.ones_like(whole), where=middle > 0)).clip(max=1.0)
    among: Floats = np.maximum(own + share * slope, LEAST * own)
    return among


def _layer_totals(profile: SensitivityProfile, variant: str, loss: str, fallback: Floats) -> Floats:
    """Loss ``[L, W]`` of whole layers: from probes, or from final samples where those were measured."""
    probes = profile.arrays.get(f"layer_probe_error/{variant}")
    totals = fallback if probes is None else probes.astype(np.float64)
    if loss == "probe":
        return totals
    if loss == "operating":
        found = profile.arrays.get(f"layer_operating_error/{variant}")
        if found is None:
            raise ConfigError(
                f"the loss 'operating' needs a profile measured at a bit map of the scheme {variant!r}: see "
                "profile.remeasure"
            )
        # Changes of either sign: counted from the best width of each layer, which moves every map by the same constant.
        # A gain that is not clear of the noise is none, and the further a width is from the present one the more noise
        # it has: so this also keeps the answer where the linearisation holds (studies/predictors).
        doubt = profile.arrays[f"layer_operating_std_error/{variant}"].astype(np.float64)
        change = found.astype(np.float64) + CAUTION * doubt
        counted: Floats = change - change.min(axis=1, keepdims=True)
        return counted
    measured = [k for k in profile.arrays if k.startswith("layer_final_error/")]
    if not measured:
        raise _lacks(profile, variant, "final", "calibration.final_widths")
    # One scheme is measured; the ratio of final to first-order error belongs to the layer and carries over to the
    # others.
    source = measured[0].split("/")[1]
    final = profile.arrays[measured[0]].astype(np.float64)
    known = np.isfinite(final)
    base = profile.arrays.get(f"layer_probe_error/{source}", totals).astype(np.float64)
    ratio = np.divide(final, base, out=np.full_like(base, np.nan), where=known & (base > 0))
    return totals * _fill_ratio(ratio, profile.widths)


def _fill_ratio(ratio: Floats, widths: tuple[int, ...]) -> Floats:
    """Interpolate the logarithm of a ratio ``[L, W]`` over the widths where it is NaN; rows that are all NaN get the
    median."""
    out = np.empty_like(ratio)
    usable = np.isfinite(ratio) & (ratio > 0)
    middle = float(np.median(ratio[usable])) if usable.any() else 1.0
    for i, row in enumerate(ratio):
        ok = usable[i]
        out[i] = np.exp(np.interp(widths, np.array(widths)[ok], np.log(row[ok]))) if ok.any() else middle
    return out


def _check_budget(task: _Task) -> None:
    least = task.least
    if least > task.limit:
        unit = "BOPs" if task.budget.quantity == "bops" else "bits stored"
        per = (
            ""
            if task.budget.quantity == "bops"
            else f" ({least / task.table.n_parameters:.4f} bits a parameter, {-(-least // 8)} bytes)"
        )
        raise InfeasibleBudgetError(
            f"the budget {task.budget.label()} allows {task.limit} {unit}; the smallest attainable is {least}{per}: "
            "every searched layer "
            f"at {min(task.policy.widths)} bits ({task.policy.describe()}). Raise the budget, or allow smaller widths."
        )
    if task.limit > task.most:
        raise ConfigError(
            f"the budget {task.budget.label()} is above full precision, which takes {task.most}: there is nothing to "
            "quantize"
        )


def _activation_steps(method: MethodSpec, profile: SensitivityProfile) -> int:
    """Scales that a quantized input has: one, or one for each step of the sampler that the profile was measured
    with."""
    if not method.act_timesteps or (method.act_bits == FULL_PRECISION and not method.act_choices):
        return 1
    steps = profile.calibration.get("sampler", {}).get("steps")
    if not steps:
        raise ConfigError(
            f"method {method.name!r}: act_timesteps needs a profile that was measured with a sampler of known steps"
        )
    return int(steps)


def _smallest(task: _Task) -> BitMap:
    """Every searched layer at its cheapest choice."""
    bit_map = task.map_of({n: np.uint8(min(task.policy.widths)) for n in task.searched})
    if not task.method.act_choices:
        return bit_map
    least = min(task.method.act_choices)
    inputs = dict(bit_map.activations) | dict.fromkeys(task.searched, least)
    return replace(bit_map, activations={n: a for n, a in inputs.items() if a != FULL_PRECISION})


_Outcome = tuple[BitMap, AllocationResult | None, tuple[str, ...]]


def _uniform(task: _Task) -> _Outcome:
    for bits in sorted(task.policy.widths, reverse=True):
        bit_map = task.map_of({n: np.uint8(bits) for n in task.searched})
        if task.cost(bit_map) <= task.limit:
            return bit_map, None, ()
    raise InfeasibleBudgetError(f"no uniform width of {task.policy.widths} fits the budget {task.budget.label()}")


def _random(task: _Task) -> _Outcome:
    """Random widths, repaired at random until the budget is met and no further bit fits."""
    rng = np.random.default_rng([task.method.seed, int(task.limit) % (2**31)])
    names, _, each = _layer_table_costs(task)
    unit = _units(_layer_labels(task, names))  # tied layers move together
    cost = np.zeros((int(unit.max(initial=-1)) + 1, each.shape[1]), dtype=np.int64)
    np.add.at(cost, unit, each)
    choice = rng.integers(0, cost.shape[1], len(cost))
    room = task.limit - _fixed_cost(task, each)
    rows = np.arange(len(cost))
    while cost[rows, choice].sum() > room:
        choice[rng.choice(np.flatnonzero(choice > 0))] -= 1
    for i in rng.permutation(np.repeat(rows, cost.shape[1])):
        if (
            choice[i] + 1 < cost.shape[1]
            and cost[rows, choice].sum() - cost[i, choice[i]] + cost[i, choice[i] + 1] <= room
        ):
            choice[i] += 1
    widths = sorted(task.policy.widths)
    return task.map_of({n: np.uint8(widths[c]) for n, c in zip(names, choice[unit], strict=True)}), None, ()


def _omq(task: _Task) -> _Outcome:
    """MPQ-DM's search with the method's own quantizer, priced by the output error with full-precision inputs."""
    return _split_search(task, f"{task.row_error}/{task.method.variant}", range(6))


def _omq_paper(task: _Task) -> _Outcome:
    """OMQ of the paper: in each layer as many channels one bit up as one bit down, in the order of the kurtosis of
    smoothed rows.

    The split, 0 to 50 % of the channels in steps of a tenth, is the one with the least output error of the layer,
    measured with the deployed quantizer and, when the method quantizes activations, with quantized (static) inputs.
    """
    act = task.method.act_bits
    array = (
        f"{task.row_error}/{task.method.variant}"
        if act == FULL_PRECISION
        else f"quantized_input_error/{task.method.variant}@a{act}"
    )
    return _split_search(task, array, range(6))


def _omq_released(task: _Task) -> _Outcome:
    """OMQ of the released code: splits of 0 and 10 % only, searched with min-max ranges (which are not deployed) and
    full-precision inputs."""
    return _split_search(task, f"{task.row_error}/{task.method.variant}+minmax", range(2))


def _omq_plus(task: _Task) -> _Outcome:
    """Promotion only (the "+" of MPQ-DM): the top tenth of each layer's channels one bit up and nobody down, over the
    uniform size."""
    base, _, _ = _uniform(_without_extras(task))
    widths: dict[str, Any] = {}
    for names in _tied_layers(task):
        n = int(base.weights[names[0]])
        found = np.full(task.table[names[0]].n_channels, n, dtype=np.uint8)
        if n < max(WIDTHS) and len({task.table[name].n_channels for name in names}) == 1:
            score = np.stack([ORDERS[task.method.order](task, name) for name in names]).sum(0)
            found[np.argsort(-score, kind="stable")[: len(found) // 10]] = n + 1
        widths |= {name: found if len(found) == task.table[name].n_channels else np.uint8(n) for name in names}
    return (
        task.map_of(widths),
        None,
        ("a bit more for a tenth of the channels, channel tags and smoothing factors come on top of the uniform size",),
    )


def _without_extras(task: _Task) -> _Task:
    """For OMQ, which starts from the uniform map of the budget whatever its smoothing factors cost: the task without
    them."""
    if task.method.allocator not in _OMQ:
        return task
    return replace(task, format=replace(task.format, smooth=False))


def _split_search(task: _Task, array: str, groups: range) -> _Outcome:
    if array not in task.profile.arrays and ("@" in array or array.endswith("+minmax")):
        family, _, variant = array.partition("/")
        known = [k.partition("/")[2] for k in task.profile.arrays if k.startswith(f"{family}/")]
        raise UnknownNameError(
            f"{family.replace('_', ' ')} of the quantizer variant",
            variant,
            known,
            f"Set calibration.smooth{' and calibration.activation_bits' if '@' in variant else ''} and profile again.",
        )
    base, _, _ = _uniform(_without_extras(task))
    widths: dict[str, Any] = {}
    error = task.profile.need(array, "OMQ")
    column = {b: j for j, b in enumerate(task.profile.widths)}
    for names in _tied_layers(task):
        n = int(base.weights[names[0]])
        if n - 1 not in column or n + 1 not in column or len({task.table[name].n_channels for name in names}) > 1:
            widths |= dict.fromkeys(names, np.uint8(n))
            continue
        rows = np.stack([error[task.profile.rows(name)] for name in names]).sum(0, dtype=np.float64)
        down, keep, up = (rows[:, column[b]] for b in (n - 1, n, n + 1))
        score = np.stack([ORDERS[task.method.order](task, name) for name in names]).sum(0)
        split = _best_split(np.argsort(-score, kind="stable"), n, down, keep, up, groups)
        widths |= dict.fromkeys(names, split)
    notes = (
        (
            "the channel tags of mixed layers and smoothing factors come on top of the uniform size: OMQ has no means to "
            "pay for them"
        ),
    )
    return task.map_of(widths), None, notes


def _best_split(
    order: NDArray[np.intp], n: int, down: Floats, keep: Floats, up: Floats, groups: range
) -> NDArray[np.uint8]:
    """Promote the head and demote the tail of ``order`` by 0, 10, ..., 50 % of the channels; the split with the least
    error."""
    group = max(1, len(order) // 10)
    best, found = np.inf, np.full(len(order), n, dtype=np.uint8)
    for count in groups:
        k = count * group
        if 2 * k > len(order):
            break
        head, tail = order[:k], order[len(order) - k :]
        total = keep.sum() + (up[head] - keep[head]).sum() + (down[tail] - keep[tail]).sum()
        if total < best:
            best, found = total, np.full(len(order), n, dtype=np.uint8)
            found[head], found[tail] = n + 1, n - 1
    return found


ORDERS: dict[str, Callable[[Any, str], Floats]] = {
    "kurtosis": lambda task, name: task.profile.need(
        "kurtosis" if task.profile.weights_only else "kurtosis_smoothed", "OMQ by kurtosis"
    )[task.profile.rows(name)],
    "random": lambda task, name: np.random.default_rng([task.method.seed, task.profile.index[name]]).random(
        task.table[name].n_channels
    ),
    "variance": lambda task, name: task.profile.need("output_power", "OMQ by variance")[task.profile.rows(name)],
    "output": lambda task, name: task.profile.need(f"output_error/{task.method.variant}", "OMQ by output error")[
        task.profile.rows(name), 0
    ],
}
"""Scores that rank the channels of a layer for OMQ; the highest are promoted."""


def program_of(
    method: MethodSpec,
    budget: Budget,
    table: LayerTable,
    profile: SensitivityProfile,
    policy: Policy,
    fmt: QuantFormat,
    storage: StorageModel = DEFAULT_STORAGE,
    *,
    by_layer: bool = False,
    overrides: bool = False,
    losses: Floats | None = None,
) -> Program:
    """The integer program that `allocate` solves for an ``ilp-*`` method, for those who want more of it than one map.

    ``by_layer`` gives the program over layers for ``ilp-channel`` too. ``overrides`` takes in the layers whose width
    the policy fixes, as fixed items, where that width is among the searched ones; they do not change the optimum, and
    can be priced. ``losses`` as in `allocate`.

    Raises `ConfigError` for methods that solve no program, and as `allocate` does.
    """
    if method.allocator not in ("ilp-layer", "ilp-channel"):
        raise ConfigError(
            f"method {method.name!r} ({method.allocator}) solves no integer program; ilp-layer and ilp-channel do"
        )
    task = _task_of(method, budget, table, profile, policy, fmt, storage, losses=losses)
    return (
        _layer_program(task, overrides=overrides)
        if by_layer or method.allocator == "ilp-layer"
        else _channel_program(task)
    )


def _ilp_layer(task: _Task) -> _Outcome:
    program = _layer_program(task)
    result = solve(program.problem, solver=task.method.solver)
    return _map_of(task, program, result), result, ()


def _map_of(task: _Task, program: Program, result: AllocationResult) -> BitMap:
    """What a program's answer says."""
    bit_map = task.map_of(program.weights(result.choice))
    if not program.inputs:
        return bit_map
    widths = dict(bit_map.activations) | program.activations(result.choice)
    return replace(bit_map, activations={n: a for n, a in widths.items() if a != FULL_PRECISION})


def _choices(task: _Task) -> list[tuple[int, int | None]]:
    """What each searched layer may take: weight widths, or pairs with the width of the input."""
    if not task.method.act_choices:
        return [(w, None) for w in sorted(task.policy.widths)]
    if task.budget.quantity != "bops":
        raise ConfigError(
            f"method {task.method.name!r}: act_choices need a BOPs budget; a size does not depend on them enough to "
            "choose"
        )
    return [(w, a) for w in sorted(task.policy.widths) for a in sorted(task.method.act_choices)]


def _ilp_channel(task: _Task) -> _Outcome:
    """Exact over all channels of all layers at once; channels of a mixed layer pay for their tags."""
    program = _channel_program(task)
    if program.problem.limit < task.once("least by channel", lambda: int(program.problem.cost.min(axis=1).sum())):
        bit_map, result, _ = _ilp_layer(task)
        return bit_map, result, ("the budget does not hold the channel tags; widths are by layer",)
    result = solve(program.problem, solver=task.method.solver)
    if _least_by_layer(task, result.multipliers[0]) < result.loss:  # mostly it is not, and one solve is enough
        bit_map, of_layers, _ = _ilp_layer(task)
        if of_layers is not None and of_layers.loss < result.loss:
            return (
                bit_map,
                of_layers,
                ("widths by layer predict a smaller loss than widths by channel with their tags",),
            )
    return _map_of(task, program, result), result, ()


def _least_by_layer(task: _Task, rate: float) -> float:
    """Lagrangian lower bound of the loss of widths by layer, for any multiplier >= 0; none where pairs have a say."""
    if task.pairs is not None:
        return float("-inf")
    _, loss, cost = _layer_table_costs(task)
    return float((loss + rate * cost).min(axis=1).sum() - rate * (task.limit - _fixed_cost(task, cost)))


def _layer_program(task: _Task, *, overrides: bool = False) -> Program:
    choices = _choices(task)
    widths = [w for w, _ in choices]
    names, loss, cost = _layer_table_costs(task)
    paid = _fixed_cost(task, cost)
    fixed: dict[int | str, int | str] = {}
    if overrides and not task.method.act_choices:
        held = {la.name: task.policy.fixed_width(la) for la in task.table}
        priced = {n: widths.index(b) for n, b in held.items() if b in widths}
        more_loss, more_cost = _layer_losses(task, list(priced)), _layer_costs(task, list(priced))
        names, loss, cost = (*names, *priced), np.concatenate([loss, more_loss]), np.concatenate([cost, more_cost])
        fixed.update(priced)
        paid -= int(more_cost[np.arange(len(priced)), list(priced.values())].sum())
    problem = AllocationProblem(
        loss=loss,
        cost=cost,
        limit=task.limit - paid,
        names=names,
        choices=tuple(f"{w} bits" if a is None else f"W{w}A{a}" for w, a in choices),
        budget_name=_unit(task),
        groups=task.once(("ties", names), lambda: _any(_layer_labels(task, names))),
        fixed=fixed or None,
        pairwise=task.pairs,
    )
    return Program(
        problem=problem,
        layers=names,
        item_layer=np.arange(len(names)),
        widths=tuple(widths),
        fixed_cost=paid,
        inputs=tuple(a for _, a in choices if a is not None),
    )


def _channel_program(task: _Task) -> Program:
    if task.budget.quantity == "bops":
        raise ConfigError("ilp-channel takes a size budget; a BOPs budget needs ilp-layer")
    widths = sorted(task.policy.widths)
    layers = [task.table[n] for n in task.searched]
    item_layer = task.once("item layers", lambda: np.repeat(np.arange(len(layers)), [la.n_channels for la in layers]))
    cost = task.once("channel costs", lambda: np.asfortranarray(_channel_costs(task, layers)[item_layer]))
    beside = task.once("beside channels", lambda: sum(task.storage.fixed_bits(la, task.format) for la in layers))
    paid = _fixed_cost(task, _layer_costs(task, task.searched)) + beside
    problem = AllocationProblem(
        loss=task.of_losses("channels", lambda: _channel_losses_at(task, layers, widths)),
        cost=cost,
        limit=task.limit - paid,
        choices=tuple(f"{b} bits" for b in widths),
        budget_name=_unit(task),
        groups=task.once("row ties", lambda: _any(_row_labels(task))),
    )
    return Program(
        problem=problem,
        layers=tuple(la.name for la in layers),
        item_layer=item_layer,
        widths=tuple(widths),
        fixed_cost=paid,
    )


def _channel_losses_at(task: _Task, layers: Sequence[LayerSpec], widths: Sequence[int]) -> Floats:
    """Losses ``[n, k]`` of the channels of some layers at some widths, column by column in memory."""
    rows = np.concatenate([np.arange(r.start, r.stop) for r in (task.profile.rows(la.name) for la in layers)])
    columns = np.array([task.profile.widths.index(b) for b in widths])
    losses: Floats = task.channel_losses().T[columns[:, None], rows].T
    return losses


def _channel_costs(task: _Task, layers: Sequence[LayerSpec]) -> NDArray[np.int64]:
    """Cost ``[l, k]`` of one channel of each layer at each width, with its tag."""
    widths = sorted(task.policy.widths)
    return np.array(
        [[task.storage.channel_bits(la, b, task.format, mixed=True) for b in widths] for la in layers], dtype=np.int64
    )


def _unit(task: _Task) -> str:
    return "BOPs" if task.budget.quantity == "bops" else "bits stored"


def _layer_table_costs(task: _Task) -> tuple[tuple[str, ...], Floats, NDArray[np.int64]]:
    """Names, losses ``[n, k]`` and costs ``[n, k]`` of the searched layers at their choices, the first of which is the
    cheapest."""
    losses = task.of_losses("layers", lambda: _layer_losses(task, task.searched))
    return task.searched, losses, _layer_costs(task, task.searched)


def _layer_losses(task: _Task, names: Sequence[str]) -> Floats:
    """Loss ``[n, k]`` of each layer at each choice."""
    choices = _choices(task)
    losses = task.profile.layer_sum(task.channel_losses())
    rows = np.array([task.profile.index[n] for n in names], dtype=np.int64)
    loss = losses[rows][:, [task.profile.widths.index(w) for w, _ in choices]]
    if task.method.act_choices:
        loss = loss + _activation_losses(task.profile)[rows][:, [_column(task.profile, a) for _, a in choices]]
    return loss


def _layer_costs(task: _Task, names: Sequence[str]) -> NDArray[np.int64]:
    """Cost ``[n, k]`` of each layer at each choice."""
    return task.once(("layer costs", tuple(names)), lambda: _costs_of_layers(task, names, _choices(task)))


def _costs_of_layers(task: _Task, names: Sequence[str], choices: Sequence[tuple[int, int | None]]) -> NDArray[np.int64]:
    inputs = task.policy.activations_of(task.table, task.method.act_bits)
    if task.budget.quantity == "bops":
        cost = [[task.table[n].macs * w * (a or inputs.get(n, FULL_PRECISION)) for w, a in choices] for n in names]
    else:
        cost = [
            [task.storage.layer_total(task.table[n], np.array(w, dtype=np.uint8), task.format) for w, _ in choices]
            for n in names
        ]
    return np.array(cost, dtype=np.int64).reshape(len(names), len(choices))


def _activation_losses(profile: SensitivityProfile) -> Floats:
    """Loss ``[L, W + 1]`` of quantizing each layer's input, the last column for full precision."""
    measured = profile.arrays.get("layer_activation_error")
    if measured is None:
        raise ConfigError(
            "act_choices need the errors of quantized inputs: set calibration.activation_bits and profile again"
        )
    return np.concatenate([measured.astype(np.float64), np.zeros((len(measured), 1))], axis=1)


def _column(profile: SensitivityProfile, bits: int | None) -> int:
    if bits == FULL_PRECISION:
        return len(profile.widths)
    if bits not in profile.widths:
        raise ConfigError(f"act_choices name {bits} bits, the profile has the widths {profile.widths}")
    return profile.widths.index(int(bits or 0))


def _fixed_cost(task: _Task, cost: NDArray[np.int64]) -> int:
    """What the budget pays before anything is searched, given the searched layers' costs: fixed layers and what is no
    weight layer."""
    return task.least - int(cost[:, 0].sum())


def _tied_layers(task: _Task) -> list[list[str]]:
    """Searched layers in groups that share their widths; most groups have one member."""
    groups: dict[str, list[str]] = {}
    for name in task.searched:
        groups.setdefault(task.policy.tie_of(task.table[name]) or f"\0{name}", []).append(name)
    return list(groups.values())


def _layer_labels(task: _Task, names: Sequence[str]) -> Labels:
    """Tie label of each layer, -1 for those that are free."""
    labels = np.full(len(names), -1, dtype=np.int64)
    index = {n: i for i, n in enumerate(names)}
    for label, group in enumerate(g for g in _tied_layers(task) if len(g) > 1):
        labels[[index[n] for n in group]] = label
    return labels


def _row_labels(task: _Task) -> Labels:
    """Tie label of each row of the searched layers. Tied layers share widths row for row; with unequal row counts, one
    width for all rows."""
    counts = {n: task.table[n].n_channels for n in task.searched}
    starts = dict(zip(counts, np.cumsum([0, *counts.values()])[:-1].tolist(), strict=True))
    labels = np.full(sum(counts.values()), -1, dtype=np.int64)
    used = 0
    for group in (g for g in _tied_layers(task) if len(g) > 1):
        n = counts[group[0]]
        equal = all(counts[name] == n for name in group)
        for name in group:
            labels[starts[name] : starts[name] + counts[name]] = used + np.arange(n) if equal else used
        used += n if equal else 1
    return labels


def _any(labels: Labels) -> Labels | None:
    """None when nothing is tied."""
    return labels if (labels >= 0).any() else None


def _units(labels: Labels) -> Labels:
    """Number of the group of each layer: tied ones share it, free ones have their own."""
    keys = np.where(labels < 0, np.arange(len(labels)) + labels.max(initial=-1) + 1, labels)
    _, first, unit = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[unit]  # numbered in the order of the layers


def _searched(task: _Task) -> _Outcome:
    raise ConfigError(
        f"the maps of {task.method.name!r} come out of the outer search, not of one solve; run the stage 'search'"
    )


def _given(task: _Task) -> _Outcome:
    raise ConfigError(
        f"the map of {task.method.name!r} is a file, not what one solve gives; name it in [allocate.maps]"
    )


_ALLOCATORS: dict[str, Callable[[_Task], _Outcome]] = {
    "uniform": _uniform,
    "random": _random,
    "omq": _omq,
    "omq-paper": _omq_paper,
    "omq-released": _omq_released,
    "omq-plus": _omq_plus,
    "ilp-layer": _ilp_layer,
    "ilp-channel": _ilp_channel,
    "search": _searched,
    "map": _given,
}
