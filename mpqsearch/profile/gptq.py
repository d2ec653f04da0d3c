"""What output channels lose at every width under GPTQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import LayerSpec, LayerTable, QuantFormat, SensitivityProfile
from mpqsearch.models import Denoiser
from mpqsearch.quant import RowQuantizer, RowStatistics, decode, encode, fit_rows, gptq_rows, rows_of
from mpqsearch.quant.smoothing import scaled_moment, stored_factors


@torch.no_grad()
def gptq_profile(
    denoiser: Denoiser,
    table: LayerTable,
    profile: SensitivityProfile,
    stats: Mapping[str, RowStatistics],
    fmt: QuantFormat,
) -> SensitivityProfile:
    """``profile`` with the output errors of the format ``fmt`` as GPTQ leaves them, for integer programs.

    stats
        From `mpqsearch.profile.input_statistics`; layers without a second moment keep what the profile has.
    fmt
        The format that is priced anew, with its own range search and alpha of smoothing.

    Layer totals that follow the errors of a layer's own channels change as the sensitivity-weighted errors of these do;
    totals that were measured with other errors themselves (`slope`, `final`) are left out for this format. Raises
    `ConfigError` when the profile lacks the format.
    """
    name = fmt.name
    profile.need(f"output_error/{name}", f"GPTQ in the format {name!r}")
    modules: dict[str, Any] = dict(denoiser.module.named_modules())
    arrays = {k: v for k, v in profile.arrays.items() if k.partition("/")[2] != name or not k.startswith(_MEASURED)}
    errors = {s: profile.arrays[f"output_error{s}/{name}"].copy() for s in ("", "_corrected")}
    for layer in (table[n] for n in profile.names if n in stats and stats[n].second_moment.numel()):
        at, weight = profile.rows(layer.name), modules[layer.name].weight.detach().float()
        found = _errors(rows_of(weight, layer), layer, profile.widths, fmt, stats[layer.name])
        errors[""][at], errors["_corrected"][at] = found
    arrays |= following(profile, table, name, errors)
    return replace(profile, arrays=arrays, calibration={**profile.calibration, "gptq": name})


def in_formats(profile: SensitivityProfile, priced: Mapping[str, SensitivityProfile]) -> SensitivityProfile:
    """``profile`` with all that profiles of `gptq_profile` have of their formats, by name."""
    arrays = {k: v for k, v in profile.arrays.items() if k.partition("/")[2] not in priced}
    for name, one in priced.items():
        arrays |= {k: v for k, v in one.arrays.items() if k.partition("/")[2] == name}
    return replace(profile, arrays=arrays, calibration={**profile.calibration, "gptq": ", ".join(priced)})


def following(
    profile: SensitivityProfile, table: LayerTable, name: str, errors: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Other output ``errors`` ``[C, W]`` of the format ``name`` (by suffix: without bias correction, with it), and the
    profile's layer totals changed as the sensitivity-weighted errors of their channels change."""
    arrays = {f"output_error{suffix}/{name}": after for suffix, after in errors.items()}
    before = profile.arrays[f"output_error/{name}"]
    sensitivity = profile.arrays.get("sensitivity", np.ones(len(before)))[:, None].astype(np.float64)
    has_bias = np.repeat([table[n].has_bias for n in profile.names], profile.channels)[:, None]
    for suffix, after in errors.items():
        old = profile.arrays[f"output_error{suffix}/{name}"]
        if suffix:  # without a bias nothing is corrected
            old, after = np.where(has_bias, old, before), np.where(has_bias, after, errors[""])  # noqa: PLW2901
        sums = [profile.layer_sum(sensitivity * e.astype(np.float64)) for e in (old, after)]
        share = np.divide(sums[1], sums[0], out=np.ones_like(sums[0]), where=sums[0] > 0)
        for family in _FOLLOWING:
            key = f"{family}{suffix}/{name}"
            if key in profile.arrays:
                arrays[key] = (profile.arrays[key] * share).astype(np.float32)
    return arrays


_FOLLOWING = ("layer_probe_error", "layer_sampler_error")
"""Layer totals that follow the errors of the layer's own channels."""

_MEASURED = ("layer_context_", "layer_final_")
"""How the names of layer totals begin that were measured with the errors themselves, and mean nothing for others."""


def _errors(
    rows: Tensor, layer: LayerSpec, widths: Sequence[int], fmt: QuantFormat, stats: RowStatistics
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Output errors ``[C, W]`` of all rows at all widths, and what is left of them without the mean shift."""
    groups, n = layer.groups, len(widths)
    moment, mean = stats.second_moment, stats.mean.to(stats.second_moment)
    scaled = rows
    if fmt.smooth:
        factor = stored_factors(rows, stats.input_max, layer, fmt.alpha)
        scaled = rows * factor.repeat_interleave(len(rows) // groups, dim=0)
        moment, mean = scaled_moment(moment, factor), mean / factor.to(mean)
    # All widths in one pass, as so many more rows of each group: [G, W, c, D].
    wide = scaled.reshape(groups, 1, -1, scaled.shape[1]).expand(-1, n, -1, -1)
    fits = [fit_rows(scaled, bits, fmt) for bits in widths]
    parts = [
        torch.stack([getattr(q, k).reshape(groups, -1) for q in fits], 1).flatten() for k in ("scale", "zero", "bits")
    ]
    quantizer = RowQuantizer(scale=parts[0], zero=parts[1], bits=parts[2], ternary=fmt.ternary)
    covariance = moment - mean[:, :, None] * mean[:, None, :]
    stacked = wide.reshape(-1, scaled.shape[1])
    chosen, fitted = gptq_rows(stacked, quantizer, covariance if layer.has_bias else moment)
    error = (decode(encode(chosen, fitted), fitted) - stacked).double().reshape(groups, -1, scaled.shape[1])
    out = []
    for measured in (moment, covariance):
        value = torch.bmm(error, measured.to(error)).mul_(error).sum(2).clamp_min_(0)
        out.append(value.reshape(groups, n, -1).transpose(1, 2).reshape(len(rows), n).float().cpu().numpy())
    return out[0], out[1]
