from __future__ import annotations

import numpy as np
import pytest
import torch

from mpqsearch.core import BitMap, QuantFormat
from mpqsearch.errors import ConfigError, LayerMismatchError, NumericsError
from mpqsearch.models import discover
from mpqsearch.quant import quantize_model, rows_of
from tests.support import tiny_denoiser
from tests.support.inputs import known


def random_map(table: object, seed: int = 0, **kwargs: object) -> BitMap:
    rng = np.random.default_rng(seed)
    weights = {la.name: rng.choice([1, 2, 3, 4, 8, 16], la.n_channels) for la in table}  # type: ignore[attr-defined]
    return BitMap(model_digest=table.digest, weights=weights, **kwargs)  # type: ignore[arg-type, attr-defined]


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "auto"])
def test_codes_decode_to_the_weights_of_the_forward_pass_bit_for_bit(kind: str, scheme: str) -> None:
    denoiser = tiny_denoiser(kind)
    table = discover(denoiser)
    before = {k: v.clone() for k, v in denoiser.module.state_dict().items()}
    made = quantize_model(denoiser.module, table, random_map(table, format=QuantFormat(scheme=scheme)))
    modules = dict(made.module.named_modules())
    for layer in table:
        weight = rows_of(modules[layer.name].weight, layer)
        stored = made.rows[layer.name]
        assert torch.equal(stored.rows(), weight)
        widths = torch.from_numpy(made.bit_map.channel_widths(layer.name, layer.n_channels).copy())
        kept = widths == 16
        assert torch.equal(weight[kept], rows_of(before[f"{layer.name}.weight"], layer)[kept])
        tops = 2 ** widths[~kept].long() - 1
        assert bool((stored.codes[~kept].amax(1).long() <= tops).all())
    for key, value in denoiser.module.state_dict().items():
        assert torch.equal(value, before[key]), "the model that was given must not change"


def test_bias_correction_takes_the_mean_shift_off_the_output() -> None:
    denoiser = tiny_denoiser()
    table = discover(denoiser)
    name = "mid_block.resnets.0.conv1"
    weights = {la.name: np.array(2 if la.name == name else 16) for la in table}
    bit_map = BitMap(model_digest=table.digest, weights=weights)
    conv = dict(denoiser.module.named_modules())[name]
    x = torch.rand(64, 16, 6, 6)  # not centred, so that the weight error shifts the mean
    from mpqsearch.profile import columns_of

    # Without padding every tap sees the same inputs, so the mean below is that of the positions inside.
    columns = columns_of(x, conv, table[name])
    means = {name: columns.mean(1)}
    outputs = {}
    for label in ("plain", "corrected"):
        given, corrected = known(means=means), label == "corrected"
        made = quantize_model(denoiser.module, table, bit_map, statistics=given, bias_correction=corrected)
        outputs[label] = dict(made.module.named_modules())[name](x) - conv(x)
    assert float(outputs["corrected"].mean((0, 2, 3)).abs().max()) < 1e-5
    assert float(outputs["plain"].mean((0, 2, 3)).abs().max()) > 1e-2


def test_errors_name_the_layer() -> None:
    denoiser = tiny_denoiser()
    table = discover(denoiser)
    with pytest.raises(LayerMismatchError, match="missing"):
        quantize_model(denoiser.module, table, BitMap(model_digest=table.digest, weights={}))
    with pytest.raises(ConfigError, match="input maxima"):
        quantize_model(denoiser.module, table, random_map(table, format=QuantFormat(smooth=True)))
    with pytest.raises(ConfigError, match="activation"):
        bit_map = random_map(table)
        quantize_model(
            denoiser.module,
            table,
            BitMap(model_digest=table.digest, weights=bit_map.weights, activations={"conv_in": 4}),
        )
    with torch.no_grad():
        dict(denoiser.module.named_modules())["conv_in"].weight[1, 0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"conv_in.*row 1"):
        quantize_model(denoiser.module, table, random_map(table))
