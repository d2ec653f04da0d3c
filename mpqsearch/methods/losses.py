"""Named losses: from what a profile measured to the loss of every output channel at every width.

A loss is a table of output channels and, where whole layers were measured, totals that these are scaled to. What was
not measured in a format is carried over from another one, by one rule (`carried_totals`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable, SensitivityProfile
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.methods.shrinkage import believed_totals, posterior_sensitivity

Floats = NDArray[np.float64]

BEST_LOSS = "auto"
"""The best of `LOSSES` that a profile can give, see `best_loss`."""

BEYOND = 0.5
"""Bits by which the mean width of a map may exceed the widest mixed width for its slopes to be believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A profile as one format and one way of correcting biases see it."""

    profile: SensitivityProfile
    table: LayerTable
    format_name: str
    bias_correction: bool
    shrinkage: float | None = None

    def as_format(self, format_name: str, *, bias_correction: bool) -> Measured:
        """The same profile in another format."""
        return replace(self, format_name=format_name, bias_correction=bias_correction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One way to price errors.

    Attributes:
        rows: ``[C, W]`` losses of output channels, in any unit a layer when there are totals.
        family: Array of layer totals ``[L, W]`` that the rows are scaled to; empty: the rows are the loss.
        needs: Arrays that the profile must hold, in this format or (families of layer totals) in any.
        setting: What to set to have the totals measured.
        text: What it is, in a line.
    """

    rows: Callable[[Measured, str], Floats]
    family: str
    needs: tuple[str, ...]
    setting: str
    text: str


def weight_rows(measured: Measured, what: str) -> Floats:
    """Squared weight error ``[C, W]``."""
    return _array(measured, "weight_error", what)


def output_rows(measured: Measured, what: str) -> Floats:
    """Squared error ``[C, W]`` of the outputs of a layer, without its mean where a corrected bias takes that off."""
    error = _array(measured, "output_error", what)
    if not measured.bias_correction:
        return error
    has_bias = np.repeat([measured.table[n].has_bias for n in measured.profile.names], measured.profile.channels)
    corrected = _array(measured, "output_error_corrected", "bias correction")
    return np.where(has_bias[:, None], corrected, error)


def sensitivity_rows(measured: Measured, what: str) -> Floats:
    """Output error times the sensitivity of its channel ``[C, W]``."""
    profile = measured.profile
    if profile.layers_only:  # nothing splits a layer, so its channels share alike
        shares = np.repeat(1 / np.array(profile.channels), profile.channels)
        return np.repeat(shares[:, None], len(profile.widths), axis=1)
    profile.need("sensitivity", what)
    return posterior_sensitivity(profile, measured.shrinkage)[:, None] * output_rows(measured, what)


def slope_rows(measured: Measured, what: str) -> Floats:
    """What splits a layer's slope over its channels: by sensitivity where that was measured, else by weight error."""
    by_output = {f"output_error/{measured.format_name}", "sensitivity"} <= measured.profile.arrays.keys()
    return (sensitivity_rows if by_output else weight_rows)(measured, what)


_OUTPUT = ("output_error", "sensitivity")
LOSSES = {
    "weight": Loss(
        rows=weight_rows, family="", needs=("weight_error",), setting="calibration.schemes", text="squared weight error"
    ),
    "output": Loss(
        rows=output_rows,
        family="",
        needs=("output_error",),
        setting="calibration.schemes",
        text="exact error of the layer's output",
    ),
    "probe": Loss(
        rows=sensitivity_rows,
        family="layer_probe_error",
        needs=_OUTPUT,
        setting="calibration.probe_inputs",
        text="first-order error of one prediction, from probes with the real weight errors of whole layers",
    ),
    "sampler": Loss(
        rows=sensitivity_rows,
        family="layer_sampler_error",
        needs=(*_OUTPUT, "layer_sampler_error"),
        setting="calibration.sampler_seeds",
        text="the same of the final sample, through all steps",
    ),
    "final": Loss(
        rows=sensitivity_rows,
        family="layer_final_error",
        needs=(*_OUTPUT, "layer_final_error"),
        setting="calibration.final_widths",
        text="error of final samples with one layer quantized at a time",
    ),
    "slope": Loss(
        rows=slope_rows,
        family="layer_context_slope",
        needs=("weight_error", "layer_context_slope"),
        setting="calibration.context_seeds",
        text="what a layer's error does among the errors of the others: predicts a whole map, chooses no widths",
    ),
}
"""``weight``, ``output``, ``probe``, ``sampler`` and ``final`` choose widths; ``slope`` only predicts a given map, at
the widths that were mixed when it was measured (`mpqsearch.profile.contexts`)."""

PROBED = ("probe", "sampler")
"""Losses whose layer totals are estimates from random projections."""

ONE_BIT = 3.0
"""What the nearest of two values costs, in units of what was measured of it alone at full precision: two in a row do
more than both by themselves. Without it a program takes them for cheap, and was above uniform widths on a model that
nothing was chosen on (studies/robustness)."""

CHOOSING = ("weight", "output", "probe", "sampler", "final")
"""Losses by which widths may be chosen."""


def channel_losses(
    profile: SensitivityProfile,
    table: LayerTable,
    format_name: str,
    loss: str,
    *,
    bias_correction: bool,
    shrinkage: float | None = None,
    effects_of: str = "",
    rounding: str = "",
) -> Floats:
    """Loss ``[C, W]`` of every output channel at every width of the profile, in a format such as ``auto+smooth``.

    Sums over the channels of a layer are its totals where those were measured; what was estimated from probes is shrunk
    (`mpqsearch.methods.shrinkage`; ``shrinkage`` is that of channels, None as the data say). ``effects_of``: the format
    whose totals say what a unit of a layer's error costs, where formats are compared: each has noise of its own in its
    totals, and the least of several would be the luckiest. ``rounding``: how codes are made where a program chooses by
    these losses, see `ONE_BIT`. Raises `ConfigError` when the profile lacks what the loss
    needs, `UnknownNameError` for an unknown loss.
    """
    loss = best_loss(profile) if loss == BEST_LOSS else loss
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    spec, what = LOSSES[loss], f"the loss {loss!r}"
    measured = Measured(
        profile=profile,
        table=table,
        format_name=format_name,
        bias_correction=bias_correction,
        shrinkage=shrinkage,
    )
    if spec.family in spec.needs and spec.family not in _plain_families(profile):
        raise _not_measured(profile, loss)
    rows = spec.rows(measured, what)
    coarse = loss in PROBED and rounding == "nearest"
    doubt = np.where(np.array(profile.widths) == 1, ONE_BIT if coarse else 1.0, 1.0)
    source = replace(measured, format_name=effects_of or format_name)
    totals = carried_totals(source, spec) if spec.family else None
    if totals is None:
        return rows * doubt
    sums = profile.layer_sum(rows if source.format_name == format_name else spec.rows(source, what))
    if loss in PROBED:
        totals = believed_totals(totals, sums, [la.role for la in table])
    factor = np.divide(totals, sums, out=np.zeros_like(totals), where=sums > 0)
    scaled: Floats = rows * np.repeat(factor * doubt, profile.channels, axis=0)
    return scaled


def carried_totals(measured: Measured, spec: Loss) -> Floats | None:
    """Totals ``[L, W]`` of every layer; None when none were measured in any format.

    They are measured with and without bias correction and in some formats. What is missing, in a format or at a width,
    is the layer's own error in that format (from probes where both formats have them, else by its rows) times the
    effect that a unit of it has where it was measured: that ratio belongs to the layer.
    """
    source = _source(measured, spec.family)
    if source is None:
        return None
    totals = _totals(source, spec.family)
    own = _key(source, spec.family) == _key(measured, spec.family)
    if own and np.isfinite(totals).all():
        return totals
    probed = spec.family in ("layer_sampler_error", "layer_final_error") and all(
        _key(m, "layer_probe_error") in m.profile.arrays for m in (source, measured)
    )

    def base(m: Measured) -> Floats:
        return _totals(m, "layer_probe_error") if probed else m.profile.layer_sum(spec.rows(m, "carrying a loss over"))

    there = base(source)
    known = np.isfinite(totals) & (there > 0)
    effect = np.divide(totals, there, out=np.full_like(totals, np.nan), where=known)
    carried = base(measured) * _filled(effect, measured.profile.widths)
    return np.where(np.isfinite(totals), totals, carried) if own else carried


def _source(measured: Measured, family: str) -> Measured | None:
    """The format nearest to the one asked in which a family was measured: the same with the other bias correction, the
    same scheme without smoothing, any."""
    arrays = measured.profile.arrays
    names = dict.fromkeys((measured.format_name, measured.format_name.split("+", maxsplit=1)[0]))
    names |= dict.fromkeys(
        sorted(k.split("/")[1] for k in arrays if k.split("/")[0] in (family, f"{family}_corrected"))
    )
    for name in names:
        for corrected in (measured.bias_correction, not measured.bias_correction):
            there = measured.as_format(name, bias_correction=corrected)
            if _key(there, family) in arrays:
                return there
    return None


NEVER_CORRECTED = ("layer_context_slope",)
"""Layer totals that are measured one way only, whatever a method does about biases."""


def _key(measured: Measured, family: str) -> str:
    corrected = measured.bias_correction and family not in NEVER_CORRECTED
    return f"{family}{'_corrected' if corrected else ''}/{measured.format_name}"


def _totals(measured: Measured, family: str) -> Floats:
    totals: Floats = measured.profile.arrays[_key(measured, family)].astype(np.float64)
    return totals


def _filled(effect: Floats, widths: tuple[int, ...]) -> Floats:
    """A ratio ``[L, W]`` with what is NaN filled in: between widths by the line through the logarithms, beyond them by
    the nearest, layers of which nothing is known by the median. Ratios of either sign are not made up: 0."""
    if np.isfinite(effect).all():
        return effect
    if (effect < 0).any():
        return np.nan_to_num(effect)
    positive = effect[effect > 0]
    middle = float(np.median(positive)) if positive.size else 1.0
    out, bits = effect.copy(), np.array(widths)
    for row in out:
        known = np.isfinite(row)
        logs = np.log(np.maximum(row[known], np.finfo(np.float64).tiny))
        row[~known] = np.exp(np.interp(bits[~known], bits[known], logs)) if known.any() else middle
    return out


def _array(measured: Measured, family: str, what: str) -> Floats:
    array: Floats = measured.profile.need(f"{family}/{measured.format_name}", what).astype(np.float64)
    return array


def _plain_families(profile: SensitivityProfile) -> set[str]:
    """What was measured, with bias correction or without."""
    return {family.removesuffix("_corrected") for family in profile.families}


def available_losses(profile: SensitivityProfile) -> tuple[str, ...]:
    """The losses of `LOSSES` for which a profile holds the measurements."""
    if profile.layers_only:
        return ("probe",)
    return tuple(name for name, spec in LOSSES.items() if set(spec.needs) <= _plain_families(profile))


def best_loss(profile: SensitivityProfile, *, mean_width: float | None = None) -> str:
    """What ``auto`` stands for: ``sampler``, else ``final``, ``probe`` or ``weight``, by what the profile holds.

    With ``mean_width``, bits a weight of a map that is given: what predicts its loss. That is ``slope`` where it was
    measured, unless the map is wider than the widths that were mixed; where errors of quantized inputs were measured it
    is ``probe``, whose unit they share. The order is that of ``studies/predictors``.
    """
    there = available_losses(profile)
    choosing = [name for name in ("sampler", "final", "probe", "weight") if name in there]
    if mean_width is None:
        return choosing[0]
    if "layer_activation_error" in profile.families and "probe" in there:
        return "probe"
    mixed = profile.calibration.get("spec", {}).get("context_widths", profile.widths)
    within = mean_width <= max(mixed, default=0) + BEYOND
    return "slope" if "slope" in there and within else choosing[0]


def _not_measured(profile: SensitivityProfile, loss: str) -> ConfigError:
    there = ", ".join(available_losses(profile))
    calls = profile.calibration.get("recorded_calls")
    if calls:
        return ConfigError(
            f"the loss {loss!r} was asked for, which is measured on final samples; this profile was measured on "
            f"{calls} recorded calls, which bring no sampler. It allows {there}: choose one of these as the loss of "
            "the method, or 'auto'."
        )
    return ConfigError(
        f"the loss {loss!r} needs {LOSSES[loss].setting} in the profile, which allows {there}; set it and profile again"
    )


def predicted_loss(
    table: LayerTable, profile: SensitivityProfile, bit_map: BitMap, *, bias_correction: bool, loss: str = BEST_LOSS
) -> float:
    """Predicted loss of a whole map under one named loss, whatever method made it: comparable between methods.

    ``auto`` is `best_loss` for the mean width of the map. Slopes may have either sign; where their sum is no loss
    (below zero) the best loss for choosing, which is in the same unit, takes their place. Layers at widths that were
    not profiled cost nothing. From a profile of the weights alone there is but one prediction, whatever ``loss`` says.
    NaN for a map by channel where whole layers alone were measured.
    """
    if profile.layers_only and bit_map.granularity == "channel":
        return float("nan")
    if profile.weights_only:
        loss = "weight"
    elif loss == BEST_LOSS:
        loss = best_loss(profile, mean_width=_mean_width(table, bit_map))
    total = _summed(table, profile, bit_map, loss, bias_correction=bias_correction)
    if total >= 0:
        return total
    return _summed(table, profile, bit_map, best_loss(profile), bias_correction=bias_correction)


def _summed(
    table: LayerTable, profile: SensitivityProfile, bit_map: BitMap, loss: str, *, bias_correction: bool
) -> float:
    total = float(losses_of_map(profile, table, bit_map, loss, bias_correction=bias_correction).sum())
    inputs = profile.arrays.get("layer_activation_error")
    if loss != "probe" or inputs is None:
        return total
    place = _places(profile)
    quantized = ((profile.index[n], int(place[bits])) for n, bits in bit_map.activations.items())
    return total + sum(float(inputs[i, j]) for i, j in quantized if j >= 0)


def losses_of_map(
    profile: SensitivityProfile, table: LayerTable, bit_map: BitMap, loss: str, *, bias_correction: bool
) -> Floats:
    """What each channel loses ``[C]`` at its width in the format of its layer; 0 at widths that were not profiled."""
    layers = zip(profile.names, profile.channels, strict=True)
    columns = _places(profile)[np.concatenate([bit_map.channel_widths(name, n) for name, n in layers])]
    names = np.repeat([bit_map.format_of(name).name for name in profile.names], profile.channels)
    lost = np.zeros(len(columns))
    for name in np.unique(names).tolist():
        rows = np.flatnonzero((names == name) & (columns >= 0))
        losses = channel_losses(profile, table, name, loss, bias_correction=bias_correction)
        lost[rows] = losses[rows, columns[rows]]
    return lost


def _places(profile: SensitivityProfile) -> NDArray[np.intp]:
    """Column of each width 0..16 in arrays over widths; -1 for one that was not profiled."""
    place = np.full(FULL_PRECISION + 1, -1)
    place[list(profile.widths)] = np.arange(len(profile.widths))
    return place


def _mean_width(table: LayerTable, bit_map: BitMap) -> float:
    """Mean width of the weights that a map quantizes; 0 when it quantizes none."""
    bits = np.array([bit_map.weights[la.name].mean() for la in table])
    weights = np.array([la.n_weights for la in table]) * (bits < FULL_PRECISION)
    return float((bits * weights).sum() / max(weights.sum(), 1))
