from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpqsearch.artifacts import load_bit_map
from mpqsearch.core import BitMap, QuantFormat
from mpqsearch.errors import ArtifactError
from mpqsearch.export.packed import FILE, MAP, load_quantized, save_quantized
from mpqsearch.models import discover
from mpqsearch.quant import quantize_model
from tests.support.inputs import known
from tests.support.tiny import tiny_denoiser


def expected_map(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        la.name: rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 16], size=la.n_channels if i % 2 else ()).astype(np.uint8)
        for i, la in enumerate(discover(tiny_denoiser(kind)))
    }


def saved(folder: Path, kind: str, fmt: QuantFormat) -> tuple[torch.nn.Module, torch.nn.Module]:
    denoiser = tiny_denoiser(kind)
    table = discover(denoiser)
    weights = expected_map(kind)
    bit_map = BitMap(model_digest=table.digest, weights=weights, format=fmt)
    peaks = {la.name: torch.ones(la.n_inputs) for la in table} if fmt.smooth else {}
    means = {la.name: torch.ones(la.groups, la.weights_per_channel) for la in table}
    quantized = quantize_model(
        denoiser.module, table, bit_map, statistics=known(input_max=peaks, means=means), bias_correction=True
    )
    save_quantized(str(folder), quantized, table)
    return quantized.module, denoiser.module


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("fmt", [QuantFormat(), QuantFormat(scheme="auto"), QuantFormat(smooth=True)])
def test_it_comes_back_bit_for_bit(tmp_path: Path, kind: str, fmt: QuantFormat) -> None:
    expected, original = saved(tmp_path, kind, fmt)
    loaded = load_quantized(tmp_path).state_dict()
    assert set(loaded) == set(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        assert torch.equal(loaded[key], tensor), key
    kept = load_bit_map(tmp_path / MAP)
    assert kept.format == fmt
    assert all(np.array_equal(kept.weights[n], w) for n, w in expected_map(kind).items())
    stored, full = (tmp_path / FILE).stat().st_size, sum(4 * p.numel() for p in original.parameters())
    assert stored < full


def test_a_file_that_ends_early_or_was_altered_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "unet", replace(QuantFormat(), scheme="auto"))
    whole = (tmp_path / FILE).read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(ArtifactError, match="missing, cut off or was altered"):
            load_quantized(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load_quantized(tmp_path)
