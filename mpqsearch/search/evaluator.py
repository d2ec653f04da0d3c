"""Measures maps of a real model for the ladder: quantized rows are made once for each width and put together for every
map."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpqsearch.artifacts import digest_of
from mpqsearch.core import FULL_PRECISION, BitMap, LayerTable, QuantFormat, SensitivityProfile
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.metrics import FeatureExtractor, FeatureStatistics, Reference, evaluate, frechet_distance
from mpqsearch.models import Denoiser
from mpqsearch.profile import InputMoments, calibrate_activations, final_probes
from mpqsearch.profile.probes import ProbeInput
from mpqsearch.quant import quantize_model, quantize_weight, rows_of, weight_of
from mpqsearch.quant.activations import ActivationTable, attach_clock, attach_quantizer, input_quantizers
from mpqsearch.quant.apply import bias_shift, moment_of, owners_of
from mpqsearch.sampling import SamplerSpec, labels_of, noise_of, sample, to_uint8, trajectory
from mpqsearch.search.cache import Measured
from mpqsearch.search.ladder import Slopes
from mpqsearch.search.surrogate import Candidate
from mpqsearch.specs import ActivationSearch

REPORTED = ("fd_fp", "fd_data", "paired_psnr")

ERRORS = ("features", "pixels")
"""What rung 2 measures of a final sample: squared distance of the extractor's features, or mean squared error of the
pixels, to the full-precision sample of the same noise. The mean of the first bounds from above the squared Wasserstein
distance of the features' distributions, of which the Fréchet distance is the Gaussian form, and it has a value for
every seed."""

FEATURE_FLOOR = 1e-6
"""Feature distances are held above this share of the features' mean squared length: 8-bit images of close samples are
equal."""


def rounds_by_gptq(candidate: Candidate) -> bool:
    """Whether any layer of the map asks for GPTQ rounding."""
    return any(f.rounding == "gptq" for f in (candidate.bit_map.format, *candidate.bit_map.formats.values()))


@dataclass(kw_only=True)
class ModelEvaluator:
    """An `Evaluator` of one model.

    ``inputs`` denoiser inputs of the full-precision trajectories of ``input_seeds`` are rung 1. ``reference`` holds the
    full-precision samples of the report seeds; None leaves rungs 3 and 4 out. ``error`` is one of `ERRORS`;
    ``features`` needs ``extractor``. ``ranges`` is how the ranges of quantized inputs are searched, ``moments`` are for
    maps with GPTQ rounding. Rungs 1 and 2 assemble maps from rows that were quantized once for each width and format,
    the ``bank``, which evaluators of the same model, profile and moments may share; the reported rungs quantize the
    model anew, as the evaluation of a run does.
    """

    denoiser: Denoiser
    table: LayerTable
    profile: SensitivityProfile
    sampler: SamplerSpec
    input_seeds: tuple[int, ...]
    inputs: int = 32
    reference: Reference | None = None
    extractor: FeatureExtractor | None = None
    moments: InputMoments | None = None
    error: str = "pixels"
    ranges: ActivationSearch = field(default_factory=ActivationSearch)
    bank: dict[tuple[str, int, QuantFormat, bool], Tensor] = field(default_factory=dict, repr=False)
    _clones: dict[tuple[Any, Any, int], Any] = field(default_factory=dict, repr=False)
    _scales: dict[tuple[Any, Any, int], ActivationTable] = field(default_factory=dict, repr=False)
    _samples: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.error not in ERRORS:
            raise UnknownNameError("error of the search", self.error, ERRORS, "(search.error)")
        if self.error == "features" and self.extractor is None:
            raise ConfigError("the error 'features' needs a feature extractor; use 'pixels' without one (search.error)")

    @property
    def error_name(self) -> str:
        """What rung 2 measures, for axes and tables."""
        if self.error == "features" and self.extractor is not None:
            return f"squared feature distance ({self.extractor.label})"
        return "squared error of samples"

    @cached_property
    def identity(self) -> str:
        """Digest of everything that the values depend on besides the map."""
        report = None
        if self.reference is not None and self.extractor is not None:
            data = self.reference.data.name if self.reference.data is not None else None
            report = [list(self.reference.seeds), self.extractor.label, data]
        # Bias correction and smoothing read the profile's means and maxima.
        calibration = digest_of({k: np.asarray(v).astype(np.float64).sum() for k, v in self.profile.means.items()})
        error = (
            [self.error, self.extractor.label]
            if self.error == "features" and self.extractor is not None
            else self.error
        )
        return digest_of(
            [self.table.digest, self.sampler.to_data(), list(self.input_seeds), self.inputs, calibration, report, error]
            + ([] if self.ranges == ActivationSearch() else [str(self.ranges)])
            + ([] if self.moments is None else [[list(self.moments.seeds), self.moments.limit]])
        )

    @property
    def forwards_per_sample(self) -> int:
        """Forward passes of the denoiser for one final sample; guidance takes two a step."""
        return self.sampler.steps * self._forwards_per_call

    @property
    def _forwards_per_call(self) -> int:
        return 2 if self.sampler.guidance != 1.0 and self.denoiser.n_classes else 1

    def output_error(self, candidate: Candidate) -> Measured:
        """Rung 1: mean squared error of the (guided) output at the inputs of the full-precision trajectories."""
        student = self._student(candidate)
        total = 0.0
        with torch.no_grad():
            for item, expected in self._calls:
                t = torch.full((len(item.x),), item.timestep, dtype=torch.long, device=item.x.device)
                total += float(
                    (student.guided(item.x, t, item.cond, self.sampler.guidance) - expected).square().mean()
                ) * len(item.x)
        n = sum(len(item.x) for item, _ in self._calls)
        return Measured(values=(total / n,), forwards=n * self._forwards_per_call)

    def sample_errors(self, candidate: Candidate, seeds: Sequence[int]) -> Measured:
        """Rung 2: the error of the final sample of each seed."""
        made = sample(self._student(candidate), seeds, self.sampler)
        errors = self._errors(made, self._full(tuple(seeds)))
        return Measured(values=tuple(errors.tolist()), forwards=len(seeds) * self.forwards_per_sample)

    def final_errors(self, candidate: Candidate, seeds: Sequence[int]) -> Measured:
        """The Fréchet distance of the features to those of full precision, then the error of each sample.

        An error that all samples share changes their distribution more than errors of the same size that differ, and
        only the distance tells them apart. With the error ``pixels`` the first number is the mean of the others.
        """
        made, full = sample(self._student(candidate), seeds, self.sampler), self._full(tuple(seeds))
        errors = self._errors(made, full)
        distance = float(errors.mean())
        if self.error == "features" and self.extractor is not None:
            statistics = [FeatureStatistics.of(self.extractor(to_uint8(x))) for x in (full, made)]
            distance = frechet_distance(*statistics)
        return Measured(values=(distance, *errors.tolist()), forwards=len(seeds) * self.forwards_per_sample)

    def _errors(self, made: Tensor, expected: Tensor) -> Tensor:
        """Error ``[N]`` of each sample."""
        if self.error == "pixels" or self.extractor is None:
            return (made.double() - expected.double()).square().flatten(1).mean(1)
        full = self.extractor(to_uint8(expected)).double()
        distance = (self.extractor(to_uint8(made)).double() - full).square().sum(1)
        return distance.clamp_min(FEATURE_FLOOR * float(full.square().sum(1).mean()))

    def slopes(self, candidate: Candidate, seeds: Sequence[int], batch: int) -> Slopes:
        """Half the change of the squared error of final samples for every channel at every width of the profile, to
        first order."""
        student = self._student(candidate)
        widths = self.profile.widths
        moves = {}
        for layer in self.table:
            now = torch.from_numpy(candidate.bit_map.channel_widths(layer.name, layer.n_channels).copy())
            present = self._rows(layer.name, now, candidate.bit_map, centred=candidate.bias_correction)
            fmt = candidate.bit_map.format_of(layer.name)
            moves[layer.name] = (
                torch.stack([self._quantized(layer.name, b, fmt, centred=candidate.bias_correction) for b in widths])
                - present
            )
        means, _ = self._statistics(candidate)
        if means is None:
            means = {n: torch.zeros_like(m) for n, m in self._means.items()}
        found, error = [], 0.0
        for start in range(0, len(seeds), batch):
            part = tuple(seeds[start : start + batch])
            probed = final_probes(
                student,
                self.table,
                self.sampler,
                part,
                {"moves": moves},
                means,
                probes=1,
                batch=batch,
                reference=self._full(part),
                along_residual=True,
            )
            found.append(probed.row_along["moves"].astype(np.float64))
            error += float(np.square(probed.residual.astype(np.float64)).sum())
        error /= len(seeds) * int(np.prod(self.denoiser.sample_shape))
        # The trajectory, its recomputation, and one backward pass, which counts as two.
        return Slopes(rows=np.stack(found), error=error, forwards=4 * len(seeds) * self.forwards_per_sample)

    def report(self, candidate: Candidate) -> Measured:
        """Rungs 3 and 4 on the report seeds, with intervals."""
        assert self.reference is not None
        assert self.extractor is not None
        means, peaks = self._statistics(candidate)
        module = quantize_model(
            self.denoiser.module,
            self.table,
            candidate.bit_map,
            means=means,
            input_max=peaks,
            activations=self._activations(candidate.bit_map),
            moments=self.moments.moments() if self.moments is not None and rounds_by_gptq(candidate) else None,
        ).module
        made = sample(self.denoiser.with_module(module), self.reference.seeds, self.sampler)
        found = evaluate(made, self.reference, self.extractor).metrics
        errors = self._errors(made, self.reference.samples)
        values: dict[str, float] = {"error": float(errors.mean())}
        for name in REPORTED:
            if name in found:
                m = found[name]
                values |= {name: m.value, f"{name}_low": m.low, f"{name}_high": m.high}
        return Measured(values=values, forwards=len(self.reference.seeds) * self.forwards_per_sample)

    @cached_property
    def _calls(self) -> list[tuple[ProbeInput, Tensor]]:
        """Rung 1's inputs with the full-precision output, spread evenly over steps."""
        device = next(self.denoiser.module.parameters()).device
        cond = labels_of(self.denoiser, self.input_seeds)
        cond = cond.to(device) if isinstance(cond, Tensor) else cond
        each = max(1, self.inputs // len(self.input_seeds))
        calls = []
        with torch.no_grad():
            x = noise_of(self.input_seeds, self.denoiser.sample_shape).to(device)
            steps = list(trajectory(self.denoiser, x, cond, self.sampler))
            for i in sorted({round(float(k)) for k in np.linspace(0, len(steps) - 1, min(each, len(steps)))}):
                step = steps[i]
                calls.append((ProbeInput(x=step.x, timestep=step.timestep, cond=cond), step.prediction))
        return calls

    def _full(self, seeds: tuple[int, ...]) -> Tensor:
        """Full-precision samples of these seeds, in the same batch as the quantized ones."""
        if seeds not in self._samples:
            self._samples[seeds] = sample(self.denoiser, seeds, self.sampler)
        return self._samples[seeds]

    def _clone_for(self, bit_map: BitMap) -> Any:
        """A working copy with the activation quantizers of a map; one for each set of activation widths."""
        key = (tuple(sorted(bit_map.activations.items())), bit_map.scaled_inputs, bit_map.activation_steps)
        if key not in self._clones:
            clone = copy.deepcopy(self.denoiser.module).requires_grad_(False)
            if bit_map.activations:
                found = self._activations(bit_map)
                quantizers = input_quantizers(self.denoiser.module, self.table, bit_map, found, self._peaks)
                assert found is not None
                clock = attach_clock(clone, found.timesteps)
                owners = owners_of(clone, self.table)
                for name, quantizer in quantizers.items():
                    quantizer.clock = clock
                    attach_quantizer(owners[name][0], quantizer)
            self._clones[key] = clone
        return self._clones[key]

    def _activations(self, bit_map: BitMap) -> ActivationTable | None:
        """Scales of the activation widths of a map, from the full-precision trajectories of the input seeds."""
        if not bit_map.activations:
            return None
        key = (tuple(sorted(bit_map.activations.items())), bit_map.scaled_inputs, bit_map.activation_steps)
        if key not in self._scales:
            self._scales[key] = calibrate_activations(
                self.denoiser,
                self.table,
                bit_map,
                self.sampler,
                seeds=self.input_seeds,
                input_max=self._peaks,
                search=self.ranges,
            )
        return self._scales[key]

    @torch.no_grad()
    def _student(self, candidate: Candidate) -> Denoiser:
        """The working copy with the map's weights in place."""
        bit_map = candidate.bit_map
        bit_map.validate(self.table)
        self._check(candidate)
        clone = self._clone_for(bit_map)
        targets = dict(clone.named_modules())
        sources: dict[str, Any] = dict(self.denoiser.module.named_modules())
        means, _ = self._statistics(candidate)
        for layer in self.table:
            target: Any = targets[layer.name]
            widths = torch.from_numpy(bit_map.channel_widths(layer.name, layer.n_channels).copy())
            rows = self._rows(layer.name, widths, bit_map, centred=candidate.bias_correction)
            weight = sources[layer.name].weight
            target.weight.copy_(weight_of(rows, layer).to(weight.dtype))
            if target.bias is None:
                continue
            bias = sources[layer.name].bias
            if means is not None and layer.name in means:
                mean = means[layer.name]
                bias = bias - bias_shift(rows - rows_of(weight.float(), layer), mean).to(bias.dtype)
            target.bias.copy_(bias)
        return self.denoiser.with_module(clone)

    def _rows(self, name: str, widths: Tensor, bit_map: BitMap, *, centred: bool) -> Tensor:
        """Rows ``[C, D]`` of one layer, each at its width, from the bank."""
        rows: Tensor | None = None
        for bits in np.unique(widths.numpy()).tolist():
            made = self._quantized(name, int(bits), bit_map.format_of(name), centred=centred)
            rows = made if rows is None else torch.where((widths == bits)[:, None], made, rows)
        assert rows is not None
        return rows

    def _quantized(self, name: str, bits: int, fmt: QuantFormat, *, centred: bool) -> Tensor:
        """All rows of one layer at one width, made once. Compensated ones are chosen row by row, so they may be mixed
        as well; only the last bits of their scales depend on what else is in the layer. ``centred``: the bias takes the
        mean of their error."""
        layer = self.table[name]
        key = (name, bits, fmt, centred and fmt.rounding == "gptq")
        if key not in self.bank:
            source: Any = dict(self.denoiser.module.named_modules())[name]
            if bits == FULL_PRECISION:
                made = rows_of(source.weight.detach().float(), layer)
            else:
                moment = None
                if fmt.rounding == "gptq" and self.moments is not None:
                    means = self._moment_means if centred and source.bias is not None else None
                    moment = moment_of(name, self.moments.moments(), means)
                full = torch.full((layer.n_channels,), bits, dtype=torch.uint8)
                made = quantize_weight(source.weight, layer, full, fmt, self._peaks.get(name), moment).rows()
            self.bank[key] = made
        return self.bank[key]

    def _statistics(self, candidate: Candidate) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor]]:
        if candidate.bias_correction and self.moments is not None and rounds_by_gptq(candidate):
            return self._moment_means, self._peaks
        return (self._means if candidate.bias_correction else None), self._peaks

    def _check(self, candidate: Candidate) -> None:
        if rounds_by_gptq(candidate) and self.moments is None:
            raise ConfigError(
                "this evaluator has no input moments, which the map's GPTQ rounding needs (rounding = 'nearest' does "
                "not)"
            )

    @cached_property
    def _moment_means(self) -> Mapping[str, Tensor]:
        """Means from the samples of the second moments, so that the two give a covariance; the profile's where there
        are none."""
        assert self.moments is not None
        return {**self._means, **self.moments.means()}

    @cached_property
    def _means(self) -> Mapping[str, Tensor]:
        return {k: torch.from_numpy(np.array(v)) for k, v in self.profile.means.items()}

    @cached_property
    def _peaks(self) -> Mapping[str, Tensor]:
        return {k: torch.from_numpy(np.array(v)) for k, v in self.profile.input_max.items()}
