"""The five lines: load, profile, allocate, quantize, look. Each is a thin call of the subpackage that does the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpqsearch.core import Budget, LayerTable, Policy, QuantFormat, SensitivityProfile
from mpqsearch.export.packed import load_quantized
from mpqsearch.methods import Allocation, MethodSpec, allocate
from mpqsearch.models import Denoiser, discover, load_model
from mpqsearch.profile import CalibrationSpec, input_statistics
from mpqsearch.profile import profile_model as measure
from mpqsearch.progress import bars_of
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import SamplerSpec, sample, to_uint8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["allocate_bits", "compare", "discover", "load_model", "load_quantized", "profile_model", "quantize"]

OURS = MethodSpec(name="ilp-channel", allocator="ilp-channel", scheme="auto", bias_correction=True)
"""What `allocate_bits` does unless told otherwise: exact over all channels, the better scheme of each row, bias
corrected."""


def profile_model(
    model: Denoiser,
    *,
    table: LayerTable | None = None,
    policy: Policy | None = None,
    sampler: SamplerSpec | None = None,
    calibration: CalibrationSpec | None = None,
    quantizer: QuantFormat | None = None,
    progress: bool = True,
) -> SensitivityProfile:
    """Measure kurtosis, exact output errors and gains of every channel at every width of ``policy``.

    ``sampler`` defaults to 10 steps of DDIM, with guidance 2 where the model has a null class; ``table`` to `discover`
    of the model. Shows a progress bar on stderr when that is a terminal. Raises what `mpqsearch.profile.profile_model`
    raises.
    """
    with bars_of(enabled=progress) as report:
        return measure(
            model,
            table or discover(model),
            policy or Policy(),
            sampler or default_sampler(model),
            calibration or CalibrationSpec(schemes=("asymmetric", "auto"), smooth=False),
            quantizer or QuantFormat(),
            progress=report,
        )


def allocate_bits(
    model: Denoiser | LayerTable,
    profile: SensitivityProfile,
    budget: str | Budget = "3bit",
    *,
    method: MethodSpec = OURS,
    policy: Policy | None = None,
    quantizer: QuantFormat | None = None,
) -> Allocation:
    """The bit map of least predicted loss under ``budget`` (``"3bit"``, ``"uniform:3"``, ``"450kB"``, ``"2e9bops"``).

    ``.bit_map`` of what is returned has the widths, ``.result`` the lower bound and the gap that prove how good they
    are. Raises `InfeasibleBudgetError`, with the smallest attainable size, when nothing fits.
    """
    table = model if isinstance(model, LayerTable) else discover(model)
    limit = budget if isinstance(budget, Budget) else Budget.parse(budget)
    return allocate(method, limit, table, profile, policy or Policy(), quantizer or QuantFormat())


def quantize(
    model: Denoiser, made: Allocation, profile: SensitivityProfile | None = None, *, sampler: SamplerSpec | None = None
) -> Denoiser:
    """``model`` with the weights that the codes of ``made`` decode to; the original is left as it is.

    ``profile`` gives the input means that bias correction needs; without it the biases stay as they are. Compensated
    rounding (``method.rounding``) runs 40 samples of ``sampler`` to learn what the layers' inputs are like. Raises
    `LayerMismatchError` when the map is for another model.
    """
    means: Any = None
    peaks: Any = None
    moments: Any = None
    table = discover(model)
    if profile is not None:
        peaks = {k: torch.from_numpy(np.array(v)) for k, v in profile.input_max.items()}
        if made.method.bias_correction:
            means = {k: torch.from_numpy(np.array(v)) for k, v in profile.means.items()}
    if made.bit_map.format.rounding == "gptq":
        stats = input_statistics(model, table, sampler or default_sampler(model), range(1_000_000, 1_000_040))
        moments = {k: s.second_moment for k, s in stats.items()}
        means = means if means is None else means | {k: s.mean for k, s in stats.items()}
    quantized = quantize_model(model.module, table, made.bit_map, means=means, input_max=peaks, moments=moments)
    return model.with_module(quantized.module)


def compare(
    model: Denoiser, quantized: Denoiser, *, seeds: Sequence[int] = range(8), sampler: SamplerSpec | None = None
) -> Figure:
    """Samples of both from the same noise, one above the other, titled with their paired PSNR in dB (range [-1, 1], so
    peak 2)."""
    from mpqsearch.report import plot_samples, sample_grid

    spec = sampler or default_sampler(model)
    before, after = sample(model, seeds, spec), sample(quantized, seeds, spec)
    error = float((before - after).square().mean())
    title = "identical samples" if error == 0 else f"PSNR to full precision {10 * np.log10(4 / error):.1f} dB"
    rows = {"full precision": to_uint8(before).numpy(), "quantized": to_uint8(after).numpy()}
    figure: Figure = plot_samples(sample_grid(title, 0.0, rows, columns=len(seeds))).figure  # type: ignore[assignment]
    return figure


def default_sampler(model: Denoiser) -> SamplerSpec:
    """Ten steps of DDIM; guidance 2 where the model has a null class."""
    return SamplerSpec(guidance=2.0 if model.null_class is not None else 1.0)
