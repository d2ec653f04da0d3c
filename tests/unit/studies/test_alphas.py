from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpqsearch.core import BitMap, LayerTable, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.models import Denoiser, discover
from mpqsearch.profile.inputs import InputCollector
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import latents
from tests.support import tiny_denoiser
from tests.support.inputs import calibrated

SAMPLER = {"steps": 3, "guidance": 2.0, "batch": 4}
SEEDS = range(1_000_000, 1_000_004)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "studies" / "mpq_dm"))
    import alphas

    return alphas


def run(denoiser: Denoiser) -> None:
    latents(denoiser, SEEDS)


def setting(kind: str) -> tuple[Denoiser, LayerTable, BitMap, dict[str, Tensor]]:
    denoiser = tiny_denoiser(kind, **SAMPLER)
    table = discover(denoiser)
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(3) for la in table},
        activations={la.name: 3 for la in table},
        activation_steps=3,
        format=QuantFormat(n_candidates=20, smooth=True),
    )
    with InputCollector(denoiser.module, table) as collector:
        run(denoiser)
    return denoiser, table, bit_map, collector.statistics()


def layer_errors(denoiser: Denoiser, quantized: Any, table: LayerTable) -> dict[str, Tensor]:
    """Errors ``[values, C]`` of each layer's output on the inputs of the full-precision model, by running both on the
    same calls."""
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    modules = dict(denoiser.module.named_modules())
    now: list[Tensor] = []
    handles = [denoiser.module.register_forward_pre_hook(lambda _m, args: now.append(args[1]))]
    handles += [
        modules[la.name].register_forward_hook(
            lambda _m, args, out, n=la.name: seen.setdefault(n, []).append((now[-1], args[0], out))
        )
        for la in table
    ]
    run(denoiser)
    for handle in handles:
        handle.remove()
    copies = dict(quantized.named_modules())
    out = {}
    for la in table:
        parts = []
        for t, x, exact in seen[la.name]:
            quantized.timestep_clock.set(t)
            error = (copies[la.name](x) - exact).detach()
            error = error if la.kind == "Linear" else error.movedim(1, -1)
            parts.append(error.reshape(-1, error.shape[-1]))
        out[la.name] = torch.cat(parts).double()
    return out


def test_alphas_are_those_of_the_least_error_of_weights_and_inputs_together(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, table, bit_map, statistics = setting("dit")
    monkeypatch.setattr(study, "POSITIONS", 10**9)
    alphas = (0.0, 0.3, 0.5, 0.8, 1.0)
    chosen = study.choose_alphas(
        denoiser, table, bit_map, statistics=statistics, seeds=SEEDS, alphas=alphas, zero_points=True
    )
    assert dict(chosen.weights) == dict(bit_map.weights)
    assert {f.scheme for f in chosen.formats.values()} <= {"asymmetric"}
    errors: dict[str, list[float]] = {}
    for a in alphas:
        one = BitMap(
            model_digest=table.digest,
            weights=bit_map.weights,
            activations=bit_map.activations,
            activation_steps=bit_map.activation_steps,
            format=QuantFormat(n_candidates=20, smooth=True, alpha=a),
        )
        activations = calibrated(denoiser, table, one, seeds=SEEDS, statistics=statistics, zero_points=True)
        made = quantize_model(denoiser.module, table, one, statistics=statistics, activations=activations)
        for name, error in layer_errors(denoiser, made.module, table).items():
            errors.setdefault(name, []).append(float(error.square().sum()))
    linear = [la.name for la in table if la.kind == "Linear"]
    assert len(linear) > 5
    for name in linear:  # of convolutions the padded border is counted with the inputs, so their ranges differ a little
        best = errors[name][alphas.index(chosen.format_of(name).alpha)]
        assert best <= min(errors[name]) * (1 + 1e-6), name
    assert len({chosen.format_of(n).alpha for n in linear}) > 1, "one alpha for all would need no search"


def test_alphas_need_a_layer_with_both(study: ModuleType) -> None:
    denoiser = tiny_denoiser("unet")
    table = discover(denoiser)
    plain = BitMap(
        model_digest=table.digest, weights={la.name: np.array(4) for la in table}, format=QuantFormat(smooth=True)
    )
    with pytest.raises(ConfigError, match="both smoothing and a quantized input"):
        study.choose_alphas(denoiser, table, plain, statistics={})
