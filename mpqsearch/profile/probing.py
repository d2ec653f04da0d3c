"""Sensitivities from random projections of one prediction: what an error in a channel or layer does to it, to first
order, in the weights of `Weighing`.

For an output ``f`` and a random ``v ~ N(0, I)``, ``E_v <d(v.f)/dy, dy>**2 = ||J dy||**2``: the squared change of the
output that ``dy`` causes, with one backward pass a projection and no second derivatives (Gauss-Newton; no labels, no
Hessian).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqsearch.core import LayerTable
from mpqsearch.models import Denoiser
from mpqsearch.models.calls import Call
from mpqsearch.profile.partial import Arrays
from mpqsearch.profile.tables import WeightErrors
from mpqsearch.profile.taps import GradientTap, Sink, checkpointed
from mpqsearch.profile.weighing import Weighing
from mpqsearch.progress import Progress, silent
from mpqsearch.sources import kind_of

BUCKETS = 5
"""Equal parts of a run, noise first, for which sensitivities of output channels are kept apart."""


def std_error_of(observations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard error of the mean over the first axis; NaN, which is unknown, for a single observation."""
    n = len(observations)
    if n < 2:
        return np.full(observations.shape[1:], np.nan)
    error: NDArray[np.float64] = observations.std(0, ddof=1) / np.sqrt(n)
    return error


def layer_arrays(family: str, squares: dict[str, NDArray[np.float64]]) -> Arrays:
    """Totals ``[L, W]`` and their standard errors from independent observations ``[n, 2, L, W]`` by format.

    ``<family>_error/<format>`` without and ``<family>_error_corrected/<format>`` with bias correction.
    """
    arrays: Arrays = {}
    for fmt, observations in squares.items():
        mean, error = observations.mean(0), std_error_of(observations)
        for i, suffix in enumerate(("", "_corrected")):
            arrays[f"{family}_error{suffix}/{fmt}"] = mean[i].astype(np.float32)
            arrays[f"{family}_std_error{suffix}/{fmt}"] = error[i].astype(np.float32)
    return arrays


@dataclass
class _Sums:
    """Sums over projections: squared effects ``[n, 2, L, W]`` by format, and squared gradients ``[C]`` by layer in
    parts of a run ``[B, C]``."""

    squares: dict[str, NDArray[np.float64]]
    by_bucket: dict[str, Tensor]
    counts: NDArray[np.int64]
    observation: int = 0
    index: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Random projections of the predictions of a step, in the weights of ``weighing``.

    ``probes`` of them for each step, drawn from ``seed``; sensitivities are also kept in `BUCKETS` of the run.
    ``checkpoint`` recomputes activations in the backward pass where the model can: memory of one block for twice the
    forward time.
    """

    denoiser: Denoiser
    table: LayerTable
    errors: WeightErrors
    n_widths: int
    weighing: Weighing = field(default_factory=Weighing)
    probes: int = 2
    seed: int = 0
    checkpoint: bool = False

    def measure(self, steps: Sequence[Sequence[Call]], progress: Progress = silent) -> Arrays:
        """One forward pass a call of these steps and one backward pass a projection. Leaves the model as it was.

        ``sensitivity`` ``[C]``, ``step_sensitivity`` ``[C, B]`` (0 in a bucket without steps), and the layer totals of
        `layer_arrays` ``layer_probe``. Standard errors are over steps and projections. Calls of text encoders and
        autoencoder weigh as their share of a run, however many are among ``steps``. Raises `NumericsError` when the
        output is not finite.
        """
        run, by_kind = 1 + max(calls[-1].index for calls in steps), dict[str, list[Sequence[Call]]]()
        for calls in steps:
            by_kind.setdefault(kind_of(calls[0].part), []).append(calls)
        if set(by_kind) == {""}:
            return self._measured(steps, run, progress)
        arrays: Arrays = {}
        for kind, some in by_kind.items():
            mine = np.array([kind_of(la.name) == kind for la in self.table])
            own = {len(mine): mine, self.table.n_channels: np.repeat(mine, [la.n_channels for la in self.table])}
            for key, a in self._measured(some, run, progress).items():
                part = np.where(own[len(a)].reshape(-1, *[1] * (a.ndim - 1)), self.weighing.shares[kind] * a, 0)
                arrays[key] = arrays.get(key, 0) + part
        return arrays

    def _measured(self, steps: Sequence[Sequence[Call]], run: int, progress: Progress) -> Arrays:
        """`measure` of steps of one kind; ``run``: calls of a whole run."""
        generator = torch.Generator().manual_seed(self.seed)
        sums = self._sums(len(steps))
        module = self.denoiser.module
        with checkpointed(module, self.checkpoint), GradientTap(module, self.table) as tap:
            for done, calls in enumerate(steps, start=1):
                with torch.enable_grad():
                    output = self.weighing.checked(self.denoiser, calls, [call.replay(module) for call in calls])
                bucket = calls[-1].index * BUCKETS // run
                for k in range(self.probes):
                    v = torch.randn(output.shape, generator=generator).to(output)
                    tap.backward((v * output).sum(), self._sink(sums, bucket), keep_graph=k + 1 < self.probes)
                    sums.observation += 1
                    sums.counts[bucket] += 1
                progress("sensitivities", done, len(steps))
        return self._arrays(sums)

    def _sums(self, n_steps: int) -> _Sums:
        shape = (n_steps * self.probes, 2, len(self.table), self.n_widths)
        return _Sums(
            squares={fmt: np.zeros(shape) for fmt in self.errors.formats},
            by_bucket={la.name: torch.zeros(BUCKETS, la.n_channels, dtype=torch.float64) for la in self.table},
            counts=np.zeros(BUCKETS, dtype=np.int64),
            index={la.name: i for i, la in enumerate(self.table)},
        )

    def _sink(self, sums: _Sums, bucket: int) -> Sink:
        def take(name: str, rows: Tensor, bias: Tensor, square: Tensor) -> None:
            sums.by_bucket[name][bucket] += square.cpu().double()
            for fmt, effect in self.errors.effects(name, rows, bias).items():
                sums.squares[fmt][sums.observation, :, sums.index[name]] = effect.double().square().cpu().numpy()

        return take

    def _arrays(self, sums: _Sums) -> Arrays:
        by_bucket = torch.cat([sums.by_bucket[la.name] for la in self.table], 1).numpy()
        by_step = by_bucket / np.maximum(sums.counts, 1)[:, None]
        return {
            "sensitivity": (by_bucket.sum(0) / max(int(sums.counts.sum()), 1)).astype(np.float32),
            "step_sensitivity": by_step.T.astype(np.float32),
            **layer_arrays("layer_probe", sums.squares),
        }
