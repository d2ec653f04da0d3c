"""What a method is, and what one gives: `MethodSpec` and `Allocation`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpqsearch.allocate import AllocationResult
from mpqsearch.core import FULL_PRECISION, BitMap, Budget
from mpqsearch.core.formats import ACT_SCALES, GROUPS, ROUNDINGS, check_width, format_name, named_format
from mpqsearch.core.shown import Shown
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.methods.losses import BEST_LOSS, CHOOSING, LOSSES

if TYPE_CHECKING:
    import pandas as pd

ALLOCATORS = (
    "uniform",
    "random",
    "omq",
    "omq-paper",
    "omq-released",
    "omq-plus",
    "ilp-layer",
    "ilp-channel",
    "measured",
    "search",
    "map",
    "first-last-high",
    "k-quant",
    "sdnq-dynamic",
    "quant-probe",
    "mixed-gguf",
    "apple-threshold",
)
"""``omq-paper``, ``omq-released``, ``omq-plus``: MPQ-DM's allocation as its paper has it, as its code has it, and
promotion only (see `mpqsearch.methods.omq`); all three smooth. ``omq``: the search of ``omq-paper`` with the method's
own quantizer and full-precision inputs. ``measured``: the best of maps that differ in kind (uniform, by layer, by
channel, each with several roundings, formats by layer), by what their samples show. ``search`` and ``map`` solve
nothing: the map is that of an outer search, or one from elsewhere. The last six are rules of practice
(`mpqsearch.methods.baselines`)."""

PROGRAMS = ("ilp-layer", "ilp-channel")
"""Allocators that solve an integer program."""

CHOOSE_FORMATS = (*PROGRAMS, "measured")
"""Allocators that choose formats layer by layer."""

OMQ = ("omq", "omq-paper", "omq-released", "omq-plus")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MethodSpec(Shown):
    """One row of a comparison: how widths are chosen and what they mean.

    name
        What tables and files call it. Example: ``"by-layer"``.
    allocator
        ``measured`` (the best of several maps, by samples), ``ilp-channel``, ``ilp-layer``, ``uniform``, ``random``,
        ``omq-paper``, ``omq-released``, ``omq-plus``, ``omq`` (MPQ-DM), ``search`` or ``map``. Example:
        ``"measured"``.
    loss
        What the integer program minimises: ``auto`` for the best that was measured, or one of
        `mpqsearch.methods.CHOOSING`.
    scheme
        ``asymmetric``, ``symmetric``, ``auto`` (the better one of each channel), or ``ternary``: symmetric, with three
        levels in place of 2 bits, five codes a byte.
    bias_correction
        Take the mean output error of each channel off its bias.
    smooth
        Smooth weights and inputs first (SmoothQuant).
    solver
        ``auto``, or a solver of PuLP by name.
    seed
        Of random widths.
    act_bits [bits]
        Width of the inputs of searched layers; 16: not quantized. Other layers as `Policy.activations_of` says.
    act_scales
        Scales of quantized inputs: one a ``token``, which is found while the model runs and takes no storage (inputs of
        convolutions then have one a timestep), one for each ``timestep`` of the sampler, or one a ``layer``.
    act_choices [bits]
        Of ``ilp-layer`` and ``ilp-channel`` under a budget in BOPs or of a latency: the program over layers chooses the
        width of each searched layer's input among these, and the one over channels keeps them. Example: ``[4, 8]``.
    rounding
        ``nearest``, ``gptq`` or ``kfac`` (`QuantFormat.rounding`); stages price the latter two with the errors that
        GPTQ leaves. ``measured`` tries all of them.
    group [inputs]
        Inputs that share a scale: 16, 32, 64, 128, or 0 for all of a channel (`QuantFormat.group`). The profile needs
        it in ``calibration.groups``. Example: ``64``.
    formats
        Of ``ilp-layer``, ``ilp-channel`` and ``measured``, in place of ``scheme`` and ``group``: formats of the profile
        among which each searched layer gets one; others have the first. Example: ``["auto", "auto+g64",
        "ternary+g128"]``.
    shrinkage
        Of the sensitivities of channels towards the mean of their layer, from 0 (as measured) to 1 (all alike). Not
        set: as the data say (`mpqsearch.methods.shrinkage`). Example: ``0.3``.

    Raises `ConfigError` for what contradicts and `UnknownNameError` for an unknown name.
    """

    name: str
    allocator: str
    loss: str = BEST_LOSS
    scheme: str = "asymmetric"
    bias_correction: bool = False
    smooth: bool = False
    solver: str = "auto"
    seed: int = 0
    act_bits: int = FULL_PRECISION
    act_scales: str = "token"
    act_choices: tuple[int, ...] = ()
    rounding: str = "nearest"
    group: int = 0
    formats: tuple[str, ...] = ()
    shrinkage: float | None = None

    def __post_init__(self) -> None:
        if self.allocator in OMQ[1:]:
            object.__setattr__(self, "smooth", True)
        self._check_names()
        check_width(self.act_bits, f"method {self.name!r}, act_bits")
        if self.group not in GROUPS:
            raise ConfigError(f"method {self.name!r}: group must be one of {GROUPS}, got {self.group}")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"method {self.name!r}: shrinkage must lie in 0..1, got {self.shrinkage}")
        self._check_formats()
        for bits in self.act_choices:
            check_width(bits, f"method {self.name!r}, act_choices")
        if self.act_choices and self.allocator not in PROGRAMS:
            raise ConfigError(
                f"method {self.name!r}: act_choices go with the allocators {' and '.join(PROGRAMS)}, got "
                f"{self.allocator!r}"
            )

    def _check_formats(self) -> None:
        for name in self.formats:
            named_format(name)
        if self.formats and self.allocator not in CHOOSE_FORMATS:
            raise ConfigError(
                f"method {self.name!r}: formats are chosen layer by layer by {', '.join(CHOOSE_FORMATS)}, got "
                f"{self.allocator!r}; give scheme and group instead"
            )
        if self.formats and (self.group or self.smooth or len(set(self.formats)) < len(self.formats)):
            raise ConfigError(
                f"method {self.name!r}: formats take the place of group, do not go with smooth, and are named once "
                f"each; got {', '.join(self.formats)}"
            )

    def _check_names(self) -> None:
        if self.loss in LOSSES and self.loss not in CHOOSING:
            raise ConfigError(
                f"method {self.name!r}: the loss {self.loss!r} predicts what a given map loses, at the widths where it "
                f"was measured, and misleads when widths are chosen by it. Choose by 'auto' or one of "
                f"{', '.join(CHOOSING)}."
            )
        for what, value, known in (
            ("allocator", self.allocator, ALLOCATORS),
            ("loss", self.loss, (BEST_LOSS, *CHOOSING)),
            ("rounding", self.rounding, ROUNDINGS),
            ("act_scales", self.act_scales, ACT_SCALES),
        ):
            if value not in known:
                raise UnknownNameError(what, value, known, f"(method {self.name!r})")

    @property
    def token_scales(self) -> bool:
        """Whether inputs are quantized with a scale for each token."""
        return self.act_scales == "token" and (self.act_bits != FULL_PRECISION or bool(self.act_choices))

    @property
    def granularity(self) -> str:
        """``channel`` when the method may mix widths inside a layer, whatever one map of it does."""
        return "channel" if self.allocator in (*OMQ, "ilp-channel", "measured", "search", "map") else "layer"

    @property
    def format_names(self) -> tuple[str, ...]:
        """The formats of the profile whose errors price this method, as in ``auto+smooth``."""
        return self.formats or (format_name(self.scheme, smooth=self.smooth, group=self.group),)

    @property
    def format_name(self) -> str:
        """The first of `format_names`: that of layers for which none is chosen."""
        return self.format_names[0]

    def in_format(self, name: str) -> MethodSpec:
        """The method with one of its formats for all layers."""
        if not self.formats:
            return self
        scheme, group = named_format(name)
        return replace(self, formats=(), scheme=scheme, group=group)

    def facts(self) -> dict[str, Any]:
        """The name, and what is not as by default."""
        fields = self.__dataclass_fields__
        return {n: getattr(self, n) for n in fields if getattr(self, n) != fields[n].default}


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """What a map costs under one budget, in `Budget.unit`."""

    budget: Budget
    limit: int
    cost: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Allocation(Shown):
    """A bit map with what is known of it.

    Attributes:
        totals: The map's cost and limit under every budget, the main one first.
        size_bits: Stored bits of the whole model, everything counted.
        bops: Bit operations of one forward pass.
        predicted_loss: Predicted loss of the whole map (`mpqsearch.methods.predicted_loss`); NaN when nothing that was
            measured predicts it.
        result: The solved program; None for methods that solve nothing.
        by_layer: Whether the program was over layers; None without one.
        certificate: Claims of the result that can be checked from the tables, as JSON data; None without a result.
        notes: What a person should know of the map.
    """

    method: MethodSpec
    bit_map: BitMap
    totals: tuple[Total, ...]
    size_bits: int
    bops: int
    predicted_loss: float
    result: AllocationResult | None = None
    by_layer: bool | None = None
    certificate: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def budget(self) -> Budget:
        """The main budget."""
        return self.totals[0].budget

    @property
    def limit(self) -> int:
        """The limit of the main budget: stored bits, BOPs or nanoseconds."""
        return self.totals[0].limit

    @property
    def within_budget(self) -> bool:
        """False when a method cannot keep to the budgets, such as OMQ with the tags of its mixed channels."""
        return all(total.cost <= total.limit for total in self.totals)

    @property
    def size_bytes(self) -> int:
        """Stored bytes of the whole model, rounded up."""
        return -(-self.size_bits // 8)

    def facts(self) -> dict[str, Any]:
        """Method, budgets, size, loss, and what is proven."""
        budgets = ", ".join(t.budget.label() + ("" if t.cost <= t.limit else " (over)") for t in self.totals)
        facts = {
            "method": self.method.name,
            "budget": budgets,
            "size": f"{self.size_bytes:,} bytes, widths by {self.bit_map.granularity}",
            "predicted loss": f"{self.predicted_loss:.6g}",
        }
        if self.result is not None:
            facts["solved"] = f"{self.result.status}, gap {self.result.gap:.2g}, by {self.result.solver}"
        return facts | ({"notes": "; ".join(self.notes)} if self.notes else {})

    def to_frame(self) -> pd.DataFrame:
        """One row a layer, see `BitMap.to_frame`."""
        return self.bit_map.to_frame()

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data (the bit map has a file of its own)."""
        return {
            "method": asdict(self.method),
            "budget": self.budget.label(),
            "quantity": self.budget.quantity,
            "limit": self.limit,
            "totals": [{"budget": t.budget.label(), "limit": t.limit, "cost": t.cost} for t in self.totals],
            "size_bits": self.size_bits,
            "bops": self.bops,
            "within_budget": self.within_budget,
            "predicted_loss": _finite(self.predicted_loss),
            "bit_map_digest": self.bit_map.digest,
            "result": None if self.result is None else self._solved(self.result),
            "certificate": self.certificate,
            "notes": list(self.notes),
        }

    def _solved(self, result: AllocationResult) -> dict[str, Any]:
        return {
            "program": "layers" if self.by_layer else "channels",
            "status": result.status,
            "solver": result.solver,
            "seconds": round(result.seconds, 4),
            "loss": float(result.loss),
            "lower_bound": _finite(result.lower_bound),
            "gap": _finite(result.gap),
        }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
