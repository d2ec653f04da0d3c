"""What the study measures, each part kept in its own file as soon as it is finished, so that the same command
continues.

Truth: random maps at matched bits, error of their final samples and FD to full precision. Slow references: one layer at
a time. Probes: see `mpqsearch.profile`. Every part also keeps its seconds and the forward passes of the denoiser it
took, a backward pass counting as two (guidance doubles each).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpqsearch import artifacts
from mpqsearch.core import BitMap, LayerTable, Policy, QuantFormat, average_bits, uniform_map
from mpqsearch.metrics import load_extractor
from mpqsearch.metrics.frechet import FeatureStatistics, frechet_distance
from mpqsearch.models import Denoiser, discover, load_model
from mpqsearch.profile import CalibrationSpec, context_probes, latin_contexts, probe
from mpqsearch.profile.final_probes import final_probes
from mpqsearch.profile.measure import calibrate, tables_of
from mpqsearch.quant import rows_of, weight_of, width_errors
from mpqsearch.sampling import SamplerSpec, sample, to_uint8

MODELS = ("fmnist-unet", "fmnist-dit")
RANGES = {"2-4": (2, 3, 4), "4-8": (4, 6, 8), "2-8": (2, 3, 4, 6, 8)}
WIDTHS = (2, 3, 4, 6, 8)
MAPS = 40
TRUTH_SEEDS = {"2-4": range(64), "4-8": range(16), "2-8": range(32)}
FEWER_SEEDS = {("fmnist-unet", "2-8"): range(16)}
"""Where the truth has fewer seeds than `TRUTH_SEEDS`: the slow model on the maps that were drawn last."""
ONE_SEEDS = {2: 8, 3: 8, 4: 8, 6: 2, 8: 2}
EPS_INPUTS = 16
CALIBRATION = 1_000_000
SAMPLER = SamplerSpec(steps=10, guidance=2.0, batch=32)
FORMAT = QuantFormat(scheme="auto")
POLICY = Policy(widths=WIDTHS)


@dataclass
class Bench:
    """One model with its calibration, and the folder of its parts."""

    model: str
    folder: Path
    samples: int = 8
    say: Callable[[str], Any] = field(default=print)
    setup_seconds: float = 0.0

    def part(self, name: str, measure: Callable[[], tuple[dict[str, Any], float]]) -> dict[str, Any]:
        """Arrays of one part: measured once, then read. ``measure`` returns arrays and forward passes."""
        path = self.folder / self.model / f"{name}.npz"
        if not path.exists():
            began = time.process_time()
            arrays, forwards = measure()
            seconds = time.process_time() - began
            arrays = {"seconds": np.array(seconds), **arrays}
            artifacts.write_arrays(path, {**arrays, "forwards": np.array(float(forwards))})
            self.say(f"{self.model} {name}: {float(arrays['seconds']):.1f} s, {forwards:.0f} forward passes")
        return artifacts.read_arrays(path)

    @cached_property
    def denoiser(self) -> Denoiser:
        return load_model(self.model)

    @cached_property
    def table(self) -> LayerTable:
        return discover(self.denoiser)

    @cached_property
    def searched(self) -> list[int]:
        return [i for i, la in enumerate(self.table) if POLICY.fixed_width(la) is None]

    @cached_property
    def calibration(self) -> Any:
        spec = CalibrationSpec(samples=self.samples, probe_inputs=80, schemes=("auto",), smooth=False)
        began = time.process_time()
        found = calibrate(self.denoiser, self.table, SAMPLER, spec)
        self.setup_seconds += time.process_time() - began
        return found

    @cached_property
    def means(self) -> dict[str, Tensor]:
        return {n: s.mean.float() for n, s in self.calibration[0].items()}

    @cached_property
    def priced(self) -> Any:
        stats, began = self.calibration[0], time.process_time()
        found = tables_of(self.denoiser, self.table, WIDTHS, {"auto": FORMAT}, stats)
        self.setup_seconds += time.process_time() - began
        return found

    @property
    def errors(self) -> dict[str, Tensor]:
        """Layer -> ``[W, C, D]``."""
        found: dict[str, Tensor] = self.priced[1]["auto"]
        return found

    def quantized(self, widths: Sequence[int], alpha: float = 1.0) -> nn.Module:
        """The model with a width per layer (16: full precision), bias-corrected; from the cached errors, so it takes no
        search."""
        import copy

        module = copy.deepcopy(self.denoiser.module)
        with torch.no_grad():
            for layer, bits in zip(self.table, widths, strict=True):
                if bits == 16:
                    continue
                target: Any = module.get_submodule(layer.name)
                error = alpha * self.errors[layer.name][WIDTHS.index(int(bits))]
                target.weight.add_(weight_of(error, layer))
                if layer.has_bias:
                    mean = self.means[layer.name]
                    target.bias.sub_(
                        torch.bmm(error.reshape(len(mean), -1, error.shape[1]), mean[:, :, None]).flatten()
                    )
        return module

    def samples_of(self, widths: Sequence[int] | None, seeds: Sequence[int], sampler: SamplerSpec = SAMPLER) -> Tensor:
        module = self.denoiser.module if widths is None else self.quantized(widths)
        return sample(self.denoiser.with_module(module), seeds, sampler)

    def one(self, layer: int, bits: int) -> list[int]:
        return [bits if i == layer else 16 for i in range(len(self.table))]

    def uniform(self, bits: int) -> list[int]:
        return [int(w) for w in uniform_map(self.table, POLICY, bits, FORMAT).weights.values()]

    def maps(self, bits_range: str, seed: int = 0) -> np.ndarray[Any, Any]:
        """``[MAPS, L]`` random widths, all at the stored size of the middle uniform map within 0.03 bits a
        parameter."""
        widths = RANGES[bits_range]
        rng = np.random.default_rng([seed, MODELS.index(self.model), list(RANGES).index(bits_range)])
        middle = self._average(np.array(self.uniform(widths[1])))
        out = []
        for _ in range(MAPS):
            row = np.array(self.uniform(widths[1]))
            row[self.searched] = rng.choice(widths, len(self.searched))
            while abs(gap := self._average(row) - middle) > 0.03:
                i = rng.choice(self.searched)
                j = widths.index(row[i]) - int(np.sign(gap))
                if 0 <= j < len(widths):
                    row[i] = widths[j]
            out.append(row)
        return np.array(out)

    def _average(self, row: np.ndarray[Any, Any]) -> float:
        weights = {la.name: np.array(b, dtype=np.uint8) for la, b in zip(self.table, row, strict=True)}
        return average_bits(self.table, BitMap(model_digest=self.table.digest, weights=weights, format=FORMAT))

    def truth(self, bits_range: str) -> dict[str, Any]:
        """``widths`` ``[M, L]``, ``mse`` ``[M, samples]``, ``fd`` ``[M]``: a file a map."""
        rows = self.maps(bits_range)
        seeds = FEWER_SEEDS.get((self.model, bits_range), TRUTH_SEEDS[bits_range])
        cost = len(seeds) * SAMPLER.steps * 2
        every = TRUTH_SEEDS["2-4"]
        reference = torch.from_numpy(
            self.part("reference", lambda: ({"samples": self.samples_of(None, every).numpy()}, cost))["samples"][
                : len(seeds)
            ]
        )
        extractor = load_extractor("fmnist-cnn")
        base = FeatureStatistics.of(extractor(to_uint8(reference)))

        def measure(row: Any) -> tuple[dict[str, Any], float]:
            found = self.samples_of(row, seeds)
            mse = (found - reference).square().flatten(1).mean(1).numpy()
            fd = frechet_distance(base, FeatureStatistics.of(extractor(to_uint8(found))))
            return {"widths": row, "mse": mse, "fd": np.array(fd)}, cost

        found = [self.part(f"truth-{bits_range}-{k:02d}", lambda row=row: measure(row)) for k, row in enumerate(rows)]
        return {key: np.array([f[key] for f in found]) for key in ("widths", "mse", "fd")}

    def one_at_a_time(
        self, bits: int, seeds: int = 0, sampler: SamplerSpec = SAMPLER, label: str = "final"
    ) -> dict[str, Any]:
        """``mse`` ``[L, seeds]`` of final samples with one layer at ``bits``, all others at full precision."""

        def measure() -> tuple[dict[str, Any], float]:
            chosen = range(CALIBRATION, CALIBRATION + (seeds or ONE_SEEDS[bits]))
            reference = self.samples_of(None, chosen, sampler)
            mse = np.zeros((len(self.table), len(chosen)), dtype=np.float32)
            for i in self.searched:
                found = self.samples_of(self.one(i, bits), chosen, sampler)
                mse[i] = (found - reference).square().flatten(1).mean(1).numpy()
            return {"mse": mse}, 2 * (len(self.searched) + 1) * len(chosen) * sampler.steps

        return self.part(f"one-{label}-{bits}", measure)

    def final_probes_at(
        self,
        label: str,
        widths: Sequence[int] | None,
        columns: Sequence[int],
        seeds: Sequence[int],
        probes: int,
        *,
        residual: bool,
    ) -> dict[str, Any]:
        """`mpqsearch.profile.final_probes` at a map (None: full precision), of the quantized weights at ``columns``
        minus the present ones."""

        _ = self.errors, self.means  # their time is in the setup

        def measure() -> tuple[dict[str, Any], float]:
            at = [16] * len(self.table) if widths is None else list(widths)
            picked = [WIDTHS.index(b) for b in columns]
            errors = {}
            for layer, bits in zip(self.table, at, strict=True):
                error = self.errors[layer.name]
                errors[layer.name] = error[picked] if bits == 16 else error[picked] - error[WIDTHS.index(int(bits))]
            module = self.denoiser.module if widths is None else self.quantized(widths)
            reference = self.samples_of(None, seeds) if residual else None
            found = final_probes(
                self.denoiser.with_module(module), self.table, SAMPLER, seeds, {"auto": errors}, self.means,
                probes=probes, reference=reference, along_residual=residual,
            )  # fmt: skip
            arrays = {
                "effect": found.effect["auto"],
                "rows": found.row_square["auto"],
                "sensitivity": found.gain,
                "residual": found.residual,
            }
            return arrays, 2 * len(seeds) * SAMPLER.steps * (2 + 2 * probes + bool(residual))

        return self.part(f"probes-{label}", measure)

    def setup(self) -> dict[str, Any]:
        """Only the cost of what probes of final samples need beforehand: mean inputs, and the range search at three
        widths."""

        def measure() -> tuple[dict[str, Any], float]:
            spec = CalibrationSpec(samples=self.samples, schemes=("auto",), smooth=False)
            calibrate(self.denoiser, self.table, SAMPLER, spec, moments=False)
            for layer in self.table:
                weight: Any = self.denoiser.module.get_submodule(layer.name).weight
                width_errors(weight, layer, RANGES["2-4"], FORMAT, None)
            return {}, 2 * self.samples * SAMPLER.steps

        return self.part("setup", measure)

    def contexts(self, seeds: int = 12) -> dict[str, Any]:
        """``slope`` ``[L, W]`` at three maps of 2-4 bits in which each layer has each width once: see
        `mpqsearch.profile.contexts`."""
        _ = self.errors, self.means

        def measure() -> tuple[dict[str, Any], float]:
            maps = latin_contexts(self.table, POLICY, RANGES["2-4"])
            chosen = range(CALIBRATION, CALIBRATION + seeds)
            found = context_probes(
                self.denoiser, self.table, SAMPLER, maps, WIDTHS, "auto", chosen, {"auto": self.errors}, self.means
            )
            return {"slope": found.slope["auto"]}, 2 * seeds * SAMPLER.steps * 5

        return self.part("contexts", measure)

    def static(self) -> dict[str, Any]:
        """``weight``, ``output``, ``relative`` ``[L, W]``: no gradient anywhere; the calibration run is in the cost."""

        def measure() -> tuple[dict[str, Any], float]:
            power = np.concatenate([self.calibration[1][la.name].numpy() for la in self.table])
            arrays, starts = self.priced[0], np.cumsum([0, *(la.n_channels for la in self.table)])[:-1]

            def by_layer(values: Any) -> Any:
                return np.add.reduceat(values.astype(np.float64), starts, axis=0)

            biased = np.repeat([la.has_bias for la in self.table], [la.n_channels for la in self.table])
            output = np.where(biased[:, None], arrays["output_error_corrected/auto"], arrays["output_error/auto"])
            relative = by_layer(output) / np.maximum(by_layer(power), 1e-30)[:, None]
            found = {
                "weight": by_layer(arrays["weight_error/auto"]),
                "output": by_layer(output),
                "relative": relative,
                "rows": output,
                "seconds": np.array(self.setup_seconds),
            }
            return found, 2 * self.samples * SAMPLER.steps

        return self.part("static", measure)

    def eps_probes(self, probes: int = 2) -> dict[str, Any]:
        """Probes of the denoiser's own output: ``sensitivity`` ``[C]``, ``layer`` ``[L, W]``, and ``absolute`` ``sum |g dW|``
        ``[L, W]``."""

        def measure() -> tuple[dict[str, Any], float]:
            inputs = self.calibration[2]
            found = probe(
                self.denoiser, self.table, inputs, SAMPLER.guidance, {"auto": self.errors}, self.means, probes=probes
            )
            gain = np.concatenate([found.gain[la.name].numpy() for la in self.table])
            layer = np.stack([found.layer_error["auto"][la.name].numpy() for la in self.table])
            return {"sensitivity": gain, "layer": layer}, 2 * len(inputs) * (1 + 2 * probes)

        return self.part("eps-probes", measure)

    def absolute(self) -> dict[str, Any]:
        """``absolute`` ``[L, W]``: ``sum |g dW|`` with the gradient of one random projection of the output, mean over
        inputs."""

        def measure() -> tuple[dict[str, Any], float]:
            inputs = self.calibration[2]
            weights: list[Any] = [self.denoiser.module.get_submodule(la.name).weight for la in self.table]
            total = np.zeros((len(self.table), len(WIDTHS)))
            generator = torch.Generator().manual_seed(0)
            for weight in weights:
                weight.requires_grad_(True)
            for item in inputs:
                out = self.denoiser.guided(item.x, torch.full((1,), item.timestep), item.cond, SAMPLER.guidance)
                grads = torch.autograd.grad((torch.randn(out.shape, generator=generator) * out).sum(), weights)
                for i, (layer, g) in enumerate(zip(self.table, grads, strict=True)):
                    total[i] += torch.einsum(
                        "wcd,cd->w", self.errors[layer.name].abs(), rows_of(g, layer).abs()
                    ).numpy()
            for weight in weights:
                weight.requires_grad_(False)
            return {"absolute": total / len(inputs)}, 2 * len(inputs) * 3

        return self.part("absolute", measure)

    def one_at_a_time_eps(self, bits: int) -> dict[str, Any]:
        """``mse`` ``[L]`` of the guided prediction on the inputs of the probes, one layer at ``bits``."""

        def measure() -> tuple[dict[str, Any], float]:
            inputs = self.calibration[2][:: len(self.calibration[2]) // EPS_INPUTS]
            x, cond = torch.cat([i.x for i in inputs]), torch.cat([i.cond for i in inputs])
            t = torch.tensor([i.timestep for i in inputs])

            @torch.no_grad()
            def predict(module: nn.Module) -> Tensor:
                return self.denoiser.with_module(module).guided(x, t, cond, SAMPLER.guidance)

            reference = predict(self.denoiser.module)
            mse = np.zeros(len(self.table))
            for i in self.searched:
                mse[i] = float((predict(self.quantized(self.one(i, bits))) - reference).square().mean())
            return {"mse": mse}, 2 * (len(self.searched) + 1) * len(inputs)

        return self.part(f"one-eps-{bits}", measure)
