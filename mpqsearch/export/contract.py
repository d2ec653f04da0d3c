"""What an export is made of: the job, the plan with a reason for every layer, and what the consumer said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable

if TYPE_CHECKING:
    from torch import Tensor

    from mpqsearch.models.calls import Call
    from mpqsearch.models.denoiser import Denoiser
    from mpqsearch.quant import QuantizedModel, Statistics

MANIFEST, CONFIG = "export.json", "config.json"
CHECK, EXPECTED = "check.safetensors", "expected.safetensors"
"""A call of the model, and what the exported model must predict for it."""

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The name that diffusers looks for."""

AS_PLANNED = ("exact", "kept_full_precision")
"""Reasons of layers that get what the map asks for."""

REASONS = (
    *AS_PLANNED,
    "rounded_up",
    "resolved",
    "collapsed_channels",
    "unsupported_kind",
    "unsupported_shape",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One format that a target has for a layer, such as ``int4`` or ``Q4_K``; ``width`` is the nominal number of bits,
    1..8."""

    name: str
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """One layer: the widths asked (lowest and highest of its channels), the one it will get, and why.

    ``will_get`` is 16 for a layer that stays at full precision; for a target with channel granularity it is None where
    the channels keep widths of their own. ``reason`` is one of `REASONS`, ``detail`` says it for people. ``choice``
    names the target's own format, empty at full precision.
    """

    layer: str
    asked: tuple[int, int]
    will_get: int | None
    reason: str
    detail: str = ""
    choice: str = ""

    @property
    def asked_text(self) -> str:
        """The asked widths in short form, as in ``4`` or ``2..6``."""
        low, high = self.asked
        return f"{low}" if low == high else f"{low}..{high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyEntry:
    """One layer as the consumer holds it.

    ``asked``: the widths of the map in short form; ``planned``: what the plan made of them, for ``reason``; ``got``:
    what was read back (None: not found, or a width per channel); ``planned_choice``, ``got_choice``: the target's own
    formats, where it has names for them.
    """

    layer: str
    asked: str
    planned: int | None
    got: int | None
    reason: str = "exact"
    planned_choice: str = ""
    got_choice: str = ""

    @property
    def ok(self) -> bool:
        """True when the consumer has what the plan promised."""
        return self.planned == self.got and self.planned_choice == self.got_choice

    @property
    def got_text(self) -> str:
        """What was read back in short form."""
        if self.got is None:
            return "per channel" if self.planned is None else "nothing"
        return self.got_choice or ("full" if self.got == FULL_PRECISION else str(self.got))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a consumer said: every layer, the forward pass, and versions. Only this may call an export good.

    ``by_consumer``: False when the consumer cannot be run here and the files were read again by this library alone;
    they are then as planned, and nothing more is known. ``forward_error``: largest difference of the consumer's
    prediction from that of the weights that were written, over its largest value; ``evaluated_error``: root mean square
    of its difference from that of the model that was evaluated, over the latter's. ``promised_bytes``: what the
    target's cost model says that the tensors take; ``stored_bytes``: what they take on disk; ``header_bytes``: names,
    shapes and padding of the file. None where no weights are written.
    """

    target: str
    entries: tuple[VerifyEntry, ...]
    problems: tuple[str, ...] = ()
    by_consumer: bool = True
    forward_error: float | None = None
    evaluated_error: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    promised_bytes: int | None = None
    stored_bytes: int | None = None
    header_bytes: int | None = None

    @property
    def ok(self) -> bool:
        """True when every layer and the forward pass are as promised, according to whoever read them (see
        ``by_consumer``)."""
        return not self.problems and all(e.ok for e in self.entries)

    @property
    def verified(self) -> bool:
        """True when the consumer itself said so."""
        return self.ok and self.by_consumer

    def summary(self) -> str:
        """One line, then one line per difference."""
        good = sum(e.ok for e in self.entries)
        lines = [f"{self.target}: {good} of {len(self.entries)} layers as planned"]
        if not self.by_consumer:
            lines[0] += ", read by mpqsearch itself: NOT verified by its consumer, which was not run"
        if self.forward_error is not None:
            lines[0] += f"; forward pass differs by at most {self.forward_error:.2g}"
        if self.evaluated_error is not None:
            lines[0] += f", by {self.evaluated_error:.2g} (rms) from the model that was evaluated"
        if self.stored_bytes is not None:
            lines[0] += (
                f"; {self.stored_bytes} bytes of {self.promised_bytes} promised, and {self.header_bytes} of headers"
            )
        for e in self.entries:
            if not e.ok:
                planned = e.planned_choice or e.planned
                lines.append(f"  {e.layer}: asked {e.asked}, planned {planned} ({e.reason}), got {e.got_text}")
        return "\n".join([*lines, *(f"  {p}" for p in self.problems)])

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data; every entry says whether it is as planned, and in short form what was read back."""
        entries = [asdict(e) | {"ok": e.ok, "got_text": e.got_text} for e in self.entries]
        return asdict(self) | {"entries": entries, "ok": self.ok, "verified": self.verified}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What an exporter is given.

    ``denoiser`` holds the full-precision model; targets that write weights need it, and leave it as it is. ``choices``
    names the target's own format for layers that were allocated for this target (`FULL`: full precision); those are
    taken as they are, and are planned as ``resolved`` where the map asks for another width. ``statistics`` say what is
    known of the inputs of layers, for maps that smooth or round by GPTQ, for biases and for weighing errors. With
    ``bias_correction`` the mean output error of what the file holds is taken off the biases in it. ``trained`` is the
    model that training made of the map: its weights and biases are written, its very codes where the target holds them.
    ``evaluated`` gives the prediction of the evaluated model for a call, which the consumer's is compared with.
    ``inputs`` are the digests for the envelope, ``provenance`` is free (command, seed, search).
    """

    table: LayerTable
    bit_map: BitMap
    denoiser: Denoiser | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)
    bias_correction: bool = False
    trained: QuantizedModel | None = None
    evaluated: Callable[[Call], Tensor] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bit_map.validate(self.table)

    @property
    def model(self) -> Denoiser:
        """The denoiser, for targets whose `Target.write` has made sure that there is one."""
        assert self.denoiser is not None
        return self.denoiser


def plan_table(plan: Iterable[PlanEntry], lost: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """The plan as flat rows: layer, asked, will_get (``full`` for full precision), reason, detail.

    ``lost`` of `Target.lost_inputs` are the widths of inputs that the target does not take; the details of their layers
    say so.
    """
    lost = lost or {}
    shown = {None: "per channel", FULL_PRECISION: "full"}
    rows = []
    for e in plan:
        bits = lost.get(e.layer)
        inputs = f"its input, at {bits} bits in the map, is not quantized by what is written." if bits else ""
        rows.append(
            {
                "layer": e.layer,
                "asked": e.asked_text,
                "will_get": shown.get(e.will_get, str(e.will_get)),
                "reason": e.reason,
                "detail": " ".join(filter(None, (e.detail, inputs))),
            }
        )
    return rows
