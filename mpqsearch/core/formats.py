"""What a bit-width means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.untrusted import build

WIDTHS = tuple(range(1, 9))
"""Widths that the quantizers support."""

FULL_PRECISION = 16
"""The width that stands for "not quantized"; such weights are stored in 16-bit floats."""

SCALE_BITS = 16
"""Bits that a stored scale takes: half precision with one shared exponent a layer, which the fake quantization rounds
to."""

SCHEMES = ("asymmetric", "symmetric", "auto", "ternary")
TERNARY_WIDTH = 2
"""The width that stands for three levels in the scheme ``ternary``."""

TRITS = 5
"""Codes of three levels in a byte: ``3**5 <= 2**8``."""

CRITERIA = ("lp", "minmax")
ACT_SCALES = ("token", "timestep", "layer")
"""What shares a scale of quantized inputs."""

ROUNDINGS = ("nearest", "gptq", "kfac")
GROUPS = (0, 16, 32, 64, 128)
"""Inputs that share a scale; 0: all inputs of an output channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantFormat:
    """How the weights of an output channel become integer codes: ``w ~ scale * (code - zero)``, ``code`` in
    ``[0, 2**bits - 1]``, or in ``[0, 2]`` at `three_levels`.

    scheme
        ``asymmetric``: integer zero point, the quantizer of MPQ-DM. ``symmetric``: zero fixed at ``(2**bits - 1) / 2``,
        so the levels lie symmetrically around 0 without containing it (``{-a, +a}`` at one bit). ``auto``: the one of
        the two with the smaller squared error, channel by channel. ``ternary``: as ``symmetric``, but that 2 bits stand
        for three levels ``{-a, 0, +a}``, which are stored five a byte.
    criterion
        Range search: ``lp`` minimises ``sum |w - w_q|**p`` (``p = 2.4`` as in the code of MPQ-DM; 2: the squared error)
        over ``n_candidates`` shrink factors ``1 - 0.8 i / n`` ... of the channel's range; ``minmax`` takes the full
        range.
    smooth
        Multiply each input channel of the weights by ``max|x|**a / max|w|**(1 - a)`` before quantizing and divide
        after, and its inputs the other way round.
    alpha
        The ``a`` of smoothing in 0..1 (SmoothQuant): 0.5 as in MPQ-DM, more to even out the inputs, less to even out
        the weights.
    rounding
        ``nearest``: every weight to its nearest level. ``gptq``: codes chosen for the output of the layer, given the
        second moment of its input (`mpqsearch.quant.gptq`, GPTQ); takes no storage, and changes no width. ``kfac``: the
        same for the final sample, given that of its gradient, too (`mpqsearch.quant.kfac`).
    group
        Inputs that share a scale and a zero point, one of `GROUPS`; 0: all inputs of the channel. A layer whose fan-in
        it does not divide has the groups of `group_of`.
    """

    scheme: str = "asymmetric"
    criterion: str = "lp"
    p: float = 2.4
    n_candidates: int = 80
    smooth: bool = False
    alpha: float = 0.5
    rounding: str = "nearest"
    group: int = 0

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UnknownNameError("scheme", self.scheme, SCHEMES)
        if self.criterion not in CRITERIA:
            raise UnknownNameError("range criterion", self.criterion, CRITERIA)
        if self.rounding not in ROUNDINGS:
            raise UnknownNameError("rounding", self.rounding, ROUNDINGS)
        if self.group not in GROUPS:
            raise ConfigError(
                f"inputs that share a scale must be one of {GROUPS} (0: all of a channel), got {self.group}"
            )
        if not 1 <= self.n_candidates <= 1000:
            raise ConfigError(f"n_candidates must lie in 1..1000, got {self.n_candidates}")
        if not 0 < self.p <= 8:
            raise ConfigError(f"p must lie in (0, 8], got {self.p}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"the alpha of smoothing must lie in 0..1, got {self.alpha}")

    @property
    def name(self) -> str:
        """What profiles call the errors of this format, as in ``auto``, ``auto+g64`` or ``asymmetric+smooth``."""
        return format_name(self.scheme, smooth=self.smooth, group=self.group)

    @property
    def ternary(self) -> bool:
        """Whether 2 bits stand for three levels."""
        return self.scheme == "ternary"

    def three_levels(self, bits: int) -> bool:
        """Whether a width stands for the codes 0, 1 and 2 with the zero at 1."""
        return self.ternary and bits == TERNARY_WIDTH

    def group_of(self, fan_in: int) -> int:
        """Inputs that share a scale in a channel of ``fan_in`` inputs: the largest divisor up to ``group``; all of them
        where that is below 16, the smallest group whose scale does not cost more than it gives."""
        if not self.group or fan_in <= self.group:
            return fan_in
        size = next(g for g in range(self.group, 0, -1) if fan_in % g == 0)
        return size if size >= GROUPS[1] else fan_in

    def scales_of(self, fan_in: int) -> int:
        """Number of scales of a channel of ``fan_in`` inputs."""
        return fan_in // self.group_of(fan_in)

    def zero_point_bits(self, bits: int) -> int:
        """Stored bits of the zero point beside one scale: an integer in the code range, or none.

        ``auto`` costs no more than ``asymmetric``: the sign bit of the (positive) scale says which scheme it is.
        """
        return 0 if self.scheme in ("symmetric", "ternary") else bits

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data. Alpha, rounding and group are left out at their defaults, so that older maps keep their
        digests."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"scale_bits": SCALE_BITS}
        if self.alpha == 0.5:
            del data["alpha"]
        if self.rounding == "nearest":
            del data["rounding"]
        if not self.group:
            del data["group"]
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> QuantFormat:
        """Back from `to_data`. Raises `ConfigError` for scales of another width than ours."""
        if data.get("scale_bits") != SCALE_BITS:
            raise ConfigError(f"scale_bits must be {SCALE_BITS} (half-precision scales), got {data.get('scale_bits')}")
        return build(cls, {k: v for k, v in data.items() if k != "scale_bits"}, "quantizer", ConfigError)


def format_name(scheme: str, *, smooth: bool = False, group: int = 0) -> str:
    """What profiles call a format: the scheme, ``+g<group>`` with groups, ``+smooth`` with smoothing."""
    return f"{scheme}{f'+g{group}' if group else ''}{'+smooth' if smooth else ''}"


def named_format(name: str) -> tuple[str, int]:
    """Scheme and group of a format without smoothing by its `format_name`. Raises `UnknownNameError` for another
    name."""
    known = {format_name(scheme, group=group): (scheme, group) for scheme in SCHEMES for group in GROUPS}
    if name not in known:
        raise UnknownNameError("format", name, known)
    return known[name]


def check_width(bits: object, where: str) -> None:
    """Raise `ConfigError` unless ``bits`` is a whole number that is a supported width; True is none, nor is 2.0."""
    whole = isinstance(bits, (int, np.integer)) and not isinstance(bits, bool)
    if not whole or (bits not in WIDTHS and bits != FULL_PRECISION):
        raise ConfigError(
            f"{where}: width {bits!r} is not supported. Allowed: 1..8, or {FULL_PRECISION} for full precision."
        )
