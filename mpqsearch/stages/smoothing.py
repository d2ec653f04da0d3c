"""Alphas of smoothing by layer, chosen with the quantizers that a run deploys."""

from __future__ import annotations

from collections.abc import Callable

from mpqsearch.core import BitMap, LayerTable, SensitivityProfile
from mpqsearch.specs import ActivationSearch
from mpqsearch.stages.base import Run

ALPHA_SEEDS = 4
"""Trajectories on which alphas are chosen."""


def ranges_of(run: Run) -> ActivationSearch:
    """The range search of quantized inputs as the table ``[activations]`` has it."""
    return run.config.activations


def alphas_of(run: Run, table: LayerTable, measured: SensitivityProfile) -> Callable[[BitMap], BitMap]:
    """What gives a map the alpha that suits each layer, on trajectories of the calibration seeds."""
    import numpy as np
    import torch

    from mpqsearch.profile import choose_alphas
    from mpqsearch.progress import bars_of

    first = run.config.calibration.first_seed

    def chosen(bit_map: BitMap) -> BitMap:
        with bars_of() as progress:
            return choose_alphas(
                run.denoiser,
                table,
                bit_map,
                run.config.sampler,
                input_max={n: torch.from_numpy(np.array(m)) for n, m in measured.input_max.items()},
                seeds=range(first, first + ALPHA_SEEDS),
                search=ranges_of(run),
                progress=progress,
            )

    return chosen
