"""The whole way of one denoiser class: record, discover, profile, allocate, quantize, export. Raises at the first thing
that does not hold."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpqsearch.core import Budget, LayerTable, Policy, QuantFormat
from mpqsearch.export import ExportJob, get_exporter, load_neutral
from mpqsearch.methods import MethodSpec, Programs
from mpqsearch.models import (
    Calls,
    Denoiser,
    capture,
    discover,
    discover_streamed,
    load_calls,
    open_streamed,
    save_calls,
)
from mpqsearch.profile import CalibrationSpec, profile_model
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.quant import quantize_model, rows_of
from mpqsearch.sampling import adapt, load_model
from tests.support.denoisers import RECIPES, build

WIDTHS = (2, 4, 8)
CALLS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """What was found of one class.

    ``roles`` counts layers by role; ``apart`` are parameters of modules that no quantizer knows, as a share of all.
    ``power_error``: the largest difference between a layer's measured output power and that of its weights on the
    recorded second moments, over the layer's largest. ``change``: mean squared change of the prediction at the uniform
    3-bit size over its mean square, by method.
    """

    name: str
    layers: int
    channels: int
    roles: Mapping[str, int]
    fused: int
    apart: float
    power_error: float
    change: Mapping[str, float]
    seconds: float


def cover(name: str) -> Covered:
    """Take the class ``name`` all the way. Raises whatever goes wrong, and `AssertionError` when a number does not
    hold."""
    start = time.process_time()
    module, inputs = build(name)
    with torch.no_grad(), capture(module, limit=CALLS) as recorded:
        for _ in range(CALLS + 1):
            module(**inputs)
            inputs = _later(inputs)
    assert recorded.seen == CALLS + 1
    with tempfile.TemporaryDirectory() as folder:
        calls = _stored(recorded, Path(folder) / "calls.safetensors", module)
        denoiser = adapt(module, calls=calls, name=name)
        table = discover(denoiser)
        assert table.n_parameters == stored_values(module)
        check_ends_by_names(denoiser, table)
        if name not in RECIPES or RECIPES[name].make is None:  # else it is made of other models, and has no folder
            check_folder(denoiser, calls, table, Path(folder) / "model")
        power_error = check_statistics(module, table, calls)
        policy, fmt = Policy(widths=WIDTHS), QuantFormat(n_candidates=8)
        spec = CalibrationSpec(probe_inputs=1, probes=1, schemes=("asymmetric",), smooth=False)
        profile = profile_model(denoiser, table, policy, spec, fmt)
        searched = [la for la in table if policy.fixed_width(la) is None]
        assert any(profile.arrays["sensitivity"][profile.rows(la.name)].any() for la in searched), (
            "no error of any layer reaches the output"
        )
        change = {}
        with torch.no_grad():
            reference = [c.replay(module) for c in calls]
        for allocator in ("ilp-layer", "ilp-channel"):
            made = Programs(table=table, profile=profile, policy=policy, format=fmt).allocate(
                MethodSpec(name=allocator, allocator=allocator), Budget.parse("uniform:3")
            )
            assert made.within_budget
            quantized = quantize_model(module, table, made.bit_map).module
            with torch.no_grad():
                outputs = [c.replay(quantized) for c in calls]
            assert all(bool(torch.isfinite(o).all()) for o in outputs)
            change[allocator] = _relative(outputs, reference)
            assert change[allocator] > 0, "quantization changed nothing"
            target = Path(folder) / allocator
            target.mkdir()
            exporter = get_exporter("neutral")
            exporter.write(target, ExportJob(table=table, bit_map=made.bit_map, denoiser=denoiser))
            assert exporter.verify(target).ok
            assert load_neutral(target / "bitmap.json", table).bit_map.digest == made.bit_map.digest
    return Covered(
        name=name,
        layers=len(table),
        channels=table.n_channels,
        roles=dict(sorted(Counter(la.role for la in table).items())),
        fused=sum(1 for la in table if la.fuse),
        apart=sum(k.n_values for k in table.kept if "unknown" in k.reason or "without calling" in k.reason)
        / table.n_parameters,
        power_error=power_error,
        change=change,
        seconds=time.process_time() - start,
    )


def ends(table: LayerTable) -> dict[str, str]:
    """The first and the last layer, which the policy holds at 8 bits."""
    return {la.role: la.name for la in table if la.role in ("first", "last")}


def check_ends_by_names(denoiser: Denoiser, table: LayerTable) -> None:
    """Where nothing can be run, names alone must tell the first and the last layer: not the shape of the recorded
    sample either, which a model on disk does not have."""
    by_names = ends(discover(denoiser, examples=()))
    assert by_names == ends(table), f"by names {by_names}, seen in a run {ends(table)}"


def check_folder(denoiser: Denoiser, calls: Calls, table: LayerTable, folder: Path) -> None:
    """Saved and loaded, and streamed, the model is the same."""
    module: Any = denoiser.module
    module.save_pretrained(folder)
    loaded = load_model(str(folder), calls=calls)
    assert loaded.digest == denoiser.digest
    streamed = discover_streamed(open_streamed(str(folder)))
    assert streamed.digest == denoiser.digest
    assert ends(streamed) == ends(table)
    assert streamed.n_parameters == table.n_parameters


def stored_values(module: nn.Module) -> int:
    """Values in the state dict of a module, tied ones once."""
    return sum(v.numel() for v in {id(v): v for v in module.state_dict(keep_vars=True).values()}.values())


@torch.no_grad()
def check_statistics(module: nn.Module, table: LayerTable, calls: Calls) -> float:
    """Largest relative difference between the power of a layer's outputs and ``w'Hw + 2 b w'm + b^2`` of its inputs.

    Zero, up to rounding, only if the recorded columns are what the rows are multiplied with: it holds for every layer
    of every model.
    """
    with InputCollector(module, table) as collector:
        for call in calls:
            call.replay(module)
    stats, power = collector.statistics(), collector.output_power()
    modules = dict(module.named_modules())
    worst = 0.0
    for layer in table:
        if layer.name not in stats:
            continue
        found = stats[layer.name]
        weight: Tensor = modules[layer.name].weight
        rows = rows_of(weight.double(), layer).reshape(layer.groups, -1, layer.weights_per_channel)
        expected = torch.bmm(rows, found.second_moment.double()).mul_(rows).sum(2).flatten()
        if layer.has_bias:
            bias: Tensor = modules[layer.name].bias.double()
            expected += 2 * bias * torch.bmm(rows, found.mean.double()[:, :, None]).flatten() + bias.square()
        measured = power[layer.name].double()
        worst = max(worst, float((expected - measured).abs().max() / measured.abs().max().clamp_min(1e-20)))
    return worst


def _later(inputs: Mapping[str, object]) -> dict[str, object]:
    """The same call at another time."""
    return {
        k: 0.9 * v if "time" in k and isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }


def _stored(recorded: Calls, path: Path, module: nn.Module) -> Calls:
    """Calls after a round trip through a file, which must replay to the very same numbers."""
    save_calls(path, recorded)
    calls = load_calls(path)
    assert calls.digest == recorded.digest
    with torch.no_grad():
        for before, after in zip(recorded, calls, strict=True):
            assert torch.equal(before.replay(module), after.replay(module)), (
                "a call replays to other numbers after it was stored"
            )
    return calls


def _relative(outputs: list[Tensor], reference: list[Tensor]) -> float:
    error = sum(float((o - r).square().sum()) for o, r in zip(outputs, reference, strict=True))
    return error / max(float(np.sum([float(r.square().sum()) for r in reference])), 1e-30)
