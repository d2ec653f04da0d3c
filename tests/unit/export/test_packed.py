from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpqsearch.artifacts import load_bit_map
from mpqsearch.core import BitMap, LayerSpec, QuantFormat
from mpqsearch.core.stored import layer_bits as ideal_bits
from mpqsearch.errors import ArtifactError
from mpqsearch.export import ExportJob, get_exporter
from mpqsearch.export.packed import (
    FILE,
    MAP,
    in_half,
    layer_bits,
    load_quantized,
    pack_layer,
    save_quantized,
    unpack_layer,
)
from mpqsearch.models import discover
from mpqsearch.quant import quantize_model, quantize_weight
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
@pytest.mark.parametrize(
    "fmt",
    [
        QuantFormat(),
        QuantFormat(scheme="auto", group=16),
        QuantFormat(smooth=True),
        QuantFormat(scheme="ternary"),
        QuantFormat(scheme="ternary", group=16),
    ],
)
def test_quantized_layers_come_back_bit_for_bit(tmp_path: Path, kind: str, fmt: QuantFormat) -> None:
    expected, original = saved(tmp_path, kind, fmt)
    loaded = load_quantized(tmp_path).state_dict()
    assert set(loaded) == set(expected.state_dict())
    widths = expected_map(kind)
    for key, tensor in expected.state_dict().items():
        whole = widths.get(key.removesuffix(".weight"), np.array(16)) == 16
        if whole.all():
            assert torch.equal(loaded[key], in_half(tensor).float()), key
        elif not whole.any():
            assert torch.equal(loaded[key], tensor), key
        torch.testing.assert_close(loaded[key], tensor, rtol=2e-3, atol=1e-6)
    kept = load_bit_map(tmp_path / MAP)
    assert kept.format == fmt
    assert all(np.array_equal(kept.weights[n], w) for n, w in expected_map(kind).items())
    stored, full = (tmp_path / FILE).stat().st_size, sum(4 * p.numel() for p in original.parameters())
    assert stored < full


def test_the_promise_counts_names_and_shapes(tmp_path: Path) -> None:
    denoiser, target = tiny_denoiser("dit"), get_exporter("packed")
    table = discover(denoiser)
    bit_map = BitMap(model_digest=table.digest, weights=expected_map("dit"))
    job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser)
    target.write(tmp_path, job)
    plan, size = target.plan(job), (tmp_path / FILE).stat().st_size
    header = target.sizes(tmp_path)["header_bytes"]
    promised = (target.promise(job, plan).total + target.names_bits(job, plan)) / 8
    assert header > 0.05 * size, "the model is small"
    assert abs(target.names_bits(job, plan) / 8 - header) < 0.01 * header
    assert abs(promised - size) < 0.01 * size


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "auto", "ternary"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_is_smaller_than_a_source_in_half_precision_at_every_width(bits: int, scheme: str) -> None:
    layer = LayerSpec(name="x", kind="Linear", weight_shape=(32, 128))
    torch.manual_seed(bits)
    weight = torch.randn(layer.weight_shape)
    fmt = QuantFormat(scheme=scheme)
    rows = quantize_weight(weight, layer, torch.full((32,), bits, dtype=torch.uint8), fmt)
    packed = pack_layer(rows)
    assert torch.equal(unpack_layer(packed, layer), rows.rows())
    stored = 8 * sum(t.nbytes for t in packed.values())
    promised = layer_bits(layer, np.full(32, bits, dtype=np.uint8), fmt).total
    assert stored <= promised
    assert stored == promised or scheme == "auto", "rows of the symmetric scheme alone need no zero points"
    assert promised < 1.01 * ideal_bits(layer, np.array(bits, dtype=np.uint8), fmt).total + 64
    assert promised < 16 * layer.n_weights


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("fan_in", [128, 1728])
@pytest.mark.parametrize("bits", [1, 2])
def test_binary_and_ternary_layers_take_in_the_file_what_is_counted(bits: int, fan_in: int, group: int) -> None:
    layer = LayerSpec(name="x", kind="Linear", weight_shape=(24, fan_in))
    fmt = QuantFormat(scheme="ternary", group=group)
    weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0  # of three levels one is 0, so that such a row needs no zero point
    rows = quantize_weight(weight, layer, torch.full((24,), bits, dtype=torch.uint8), fmt)
    packed = pack_layer(rows)
    assert torch.equal(unpack_layer(packed, layer), rows.rows())
    counted = ideal_bits(layer, np.array(bits, dtype=np.uint8), fmt)
    codes, scales = {1: fan_in, 2: 8 * -(-fan_in // 5)}[bits] * 24, 24 * fmt.scales_of(fan_in)
    assert counted.payload == codes
    assert counted.metadata == 16 * scales + 8, "scales and their exponent, and no zero points"
    if bits == 2:
        assert 8 * packed["codes"].nbytes == codes
        assert {float(v) for v in rows.codes.unique()} == {0.0, 1.0, 2.0}
        assert packed["scale"].numel() == scales + 1


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


def test_layers_of_different_formats_lie_in_one_file(tmp_path: Path) -> None:
    denoiser, target = tiny_denoiser("dit"), get_exporter("packed")
    table = discover(denoiser)
    formats = [QuantFormat(scheme="ternary", group=16), QuantFormat(scheme="symmetric"), QuantFormat(scheme="auto")]
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.array(1 + i % 3) for i, la in enumerate(table)},
        formats={la.name: formats[i % 4] for i, la in enumerate(table) if i % 4 < 3},
    )
    job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser)
    target.write(tmp_path, job)
    seen = target.read_back(tmp_path)
    assert seen["forward_error"] == 0
    assert seen["widths"] == {n: int(w) for n, w in bit_map.weights.items()}
    promised = target.promise(job, target.plan(job)).total // 8
    # Zero points of single rows of ``auto`` may be left out.
    assert 0.99 * promised <= seen["stored_bytes"] <= promised + 8
    exact = quantize_model(denoiser.module, table, bit_map).module.state_dict()
    loaded = load_quantized(tmp_path).state_dict()
    assert all(torch.equal(loaded[f"{n}.weight"], exact[f"{n}.weight"]) for n in bit_map.weights)
