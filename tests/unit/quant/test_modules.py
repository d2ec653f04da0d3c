from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import BitMap, LayerSpec, LayerTable, QuantFormat
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.models import discover
from mpqsearch.quant import (
    ActivationTable,
    build_student,
    convert,
    decode,
    encode,
    param_groups,
    quantize_model,
    quantize_weight,
    rows_of,
    weight_of,
)
from mpqsearch.quant.modules import QuantLayer, quant_layers
from tests.support import tiny_denoiser
from tests.support.inputs import known

GEOMETRIES = [
    nn.Linear(6, 5),
    nn.Conv1d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
    nn.Conv3d(2, 3, 2),
    nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
    nn.ConvTranspose3d(2, 3, 2),
]


def spec_of(module: nn.Module, name: str = "layer") -> LayerSpec:
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return LayerSpec(
        name=name,
        kind=type(module).__name__,
        weight_shape=tuple(module.weight.shape),  # type: ignore[union-attr, arg-type]
        channel_axis=1 if transposed else 0,
        groups=int(getattr(module, "groups", 1)),
        has_bias=module.bias is not None,
    )


def one_layer(module: nn.Module, widths: list[int], **kwargs: object) -> tuple[nn.Module, LayerTable, BitMap]:
    table = LayerTable(digest="0" * 64, layers=(spec_of(module),))
    root = nn.Module()
    root.layer = copy.deepcopy(module)
    n = table["layer"].n_channels
    bit_map = BitMap(model_digest=table.digest, weights={"layer": np.resize(widths, n)}, **kwargs)  # type: ignore[arg-type]
    return root, table, bit_map


def input_of(module: nn.Module) -> torch.Tensor:
    if isinstance(module, nn.Linear):
        return torch.randn(3, 7, module.in_features)
    dims = module.weight.dim() - 2  # type: ignore[union-attr, operator]
    return torch.randn(3, module.in_channels, *(7, 6, 5)[:dims])  # type: ignore[arg-type]


def mixed(table: LayerTable, seed: int = 0, **kwargs: object) -> BitMap:
    rng = np.random.default_rng(seed)
    weights = {la.name: rng.choice([1, 2, 3, 4, 8, 16], la.n_channels) for la in table}
    return BitMap(model_digest=table.digest, weights=weights, **kwargs)  # type: ignore[arg-type]


def predicted(module: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """What a tiny denoiser predicts for a batch."""
    return module(x, t, class_labels=labels).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("module", GEOMETRIES, ids=lambda m: f"{type(m).__name__}-{m.weight.shape[0]}")
def test_every_kind_of_layer_computes_what_the_plain_layer_does_with_the_decoded_weight(module: nn.Module) -> None:
    root, table, bit_map = one_layer(module, [1, 2, 3, 4, 16])
    x = input_of(module)
    made = quantize_model(root, table, bit_map).module.layer(x)  # type: ignore[operator]
    for trainable in ("none", "scales", "lora", "all"):
        student = build_student(root, table, bit_map, trainable=trainable, rank=2)  # type: ignore[arg-type]
        assert isinstance(student.layer, QuantLayer)
        assert torch.equal(student.layer(x), made)
        plain = convert(student).module.layer
        assert type(plain) is type(module)
        assert torch.equal(plain(x), made)
    if isinstance(module, nn.ConvTranspose2d):
        size = [2 * (s - 1) + 2 for s in x.shape[2:]]
        assert student.layer(x, output_size=size).shape[2:] == torch.Size(size)


def test_straight_through_is_the_gradient_of_the_layer_at_the_quantized_weight() -> None:
    root, table, bit_map = one_layer(nn.Linear(6, 5), [16])
    bit_map = BitMap(model_digest=table.digest, weights={"layer": np.array([8, 8, 8, 16, 16])})
    student = build_student(root, table, bit_map, trainable="all")
    x, target = torch.randn(4, 6), torch.randn(4, 5)
    layer = student.layer
    (layer(x) - target).square().sum().backward()  # type: ignore[operator]
    with torch.no_grad():
        grad = 2 * (x @ layer.weight.T + layer.bias - target)  # type: ignore[operator, union-attr]
    inside = encode_inside(layer)  # type: ignore[arg-type]
    q = layer.weight_quantizer  # type: ignore[union-attr]
    torch.testing.assert_close(q.base.grad, (grad.T @ x) * inside * q.weight_unit[:, None])  # type: ignore[union-attr, operator, index]
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))  # type: ignore[union-attr]


def encode_inside(layer: QuantLayer) -> torch.Tensor:
    q = layer.weight_quantizer
    codes = (q.rows() / (q.scale * q.scale_unit)[:, None] + q.zero[:, None]).round()
    return (codes.clamp(0).minimum(q.top[:, None]) == codes) | (q.bits == 16)[:, None]


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize(
    "fmt",
    [
        QuantFormat(),
        QuantFormat(scheme="auto", group=16),
        QuantFormat(smooth=True, group=16),
        QuantFormat(scheme="ternary", group=16),
    ],
)
def test_codes_reproduce_the_trained_forward_bit_for_bit(kind: str, fmt: QuantFormat) -> None:
    denoiser = tiny_denoiser(kind)
    table = discover(denoiser)
    input_max = {la.name: torch.rand(la.n_inputs) * 3 for la in table}
    student = build_student(
        denoiser.module,
        table,
        mixed(table, format=fmt),
        statistics=known(input_max=input_max),
        trainable="lora",
        rank=4,
    )
    optimizer = torch.optim.AdamW(param_groups(student))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([10, 700]), torch.tensor([0, 1])
    before = {name: layer.weight.detach().clone() for name, layer in quant_layers(student)}
    for _ in range(3):
        optimizer.zero_grad()
        predicted(student, x, t, labels).square().mean().backward()
        optimizer.step()
    after = {name: layer.weight.detach() for name, layer in quant_layers(student)}
    assert any(not torch.equal(before[n], after[n]) for n in after), "training must have changed codes"
    made = convert(student)
    modules = dict(made.module.named_modules())
    for name, weight in after.items():
        stored = made.rows[name]
        assert stored.codes.dtype == torch.uint8
        kept = stored.quantizer.bits == 16
        tops = 2 ** stored.quantizer.bits[~kept].long() - 1
        if fmt.scheme == "ternary":
            three = stored.quantizer.bits == 2
            tops[three[~kept]] = 2
            zeros = stored.quantizer.zero.reshape(len(kept), -1)
            assert bool((zeros[three] == 1).all()), "the zero of three levels stays"
        assert bool((stored.codes[~kept].amax(1).long() <= tops).all())
        assert torch.equal(weight_of(stored.rows(), table[name]), weight)
        assert torch.equal(modules[name].weight, weight)
        half = stored.quantizer.scale / torch.exp2(stored.quantizer.scale.amax().log2().floor() - 15)
        assert torch.equal(half, half.half().float()), "scales must be what half precision holds"
    with torch.no_grad():
        assert torch.equal(predicted(made.module, x, t, labels), predicted(student, x, t, labels))
    assert not any("lora" in k for k in made.module.state_dict())


def test_low_rank_update_merges_before_quantization() -> None:
    root, table, bit_map = one_layer(nn.Conv2d(4, 6, 3), [2, 3, 16])
    student = build_student(root, table, bit_map, trainable="lora", rank=64)
    q = student.layer.weight_quantizer  # type: ignore[union-attr]
    assert q.lora_a.shape == (6, 36), "the rank is at most the smaller side"  # type: ignore[union-attr]
    with torch.no_grad():
        q.lora_b.normal_()  # type: ignore[union-attr]
    layer = table["layer"]
    update = q.lora_b @ q.lora_a * q.weight_unit[:, None] / 6  # type: ignore[operator, union-attr, index]
    merged = rows_of(root.layer.weight, layer) + update  # type: ignore[arg-type, union-attr]
    quantizer = quantize_weight(root.layer.weight, layer, q.bits, bit_map.format).quantizer  # type: ignore[arg-type, union-attr]
    expected = decode(
        encode(merged, type(quantizer)(scale=quantizer.scale, zero=quantizer.zero, bits=q.bits.clamp(max=8))), quantizer
    )  # type: ignore[type-var]
    expected[q.bits == 16] = merged[q.bits == 16]  # type: ignore[index]
    torch.testing.assert_close(rows_of(student.layer.weight, layer), expected, rtol=1e-6, atol=1e-6)  # type: ignore[arg-type, union-attr]


def test_groups_have_rates_in_steps_and_every_trainable_once() -> None:
    denoiser = tiny_denoiser()
    table = discover(denoiser)
    bit_map = mixed(table, activations={la.name: 4 for la in table})
    activations = flat_activations(table, 4)
    for trainable in ("none", "scales", "lora", "all"):
        student = build_student(denoiser.module, table, bit_map, activations=activations, trainable=trainable)  # type: ignore[arg-type]
        groups = param_groups(student, lora_lr=0.5, weight_lr=0.25, activation_scale_lr=0.01, lr_factor=2.0)
        listed = [id(p) for g in groups for p in g["params"]]
        assert len(listed) == len(set(listed))
        assert set(listed) == {id(p) for p in student.parameters() if p.requires_grad}
        rates = {g["name"]: g["lr"] for g in groups}
        if trainable == "none":
            assert not groups
            continue
        q = dict(quant_layers(student))["conv_out"].weight_quantizer
        step = float((q.scale * q.scale_unit).detach()[q.bits != 16].mean())
        assert rates["weight-scales:conv_out"] == pytest.approx(2e-3)
        assert rates["activation-scales:conv_in"] == pytest.approx(0.02 * 0.1)
        assert rates.get("lora:conv_out") == (pytest.approx(1.0) if trainable == "lora" else None)
        assert rates.get("weights:conv_out") == (pytest.approx(0.5) if trainable == "all" else None)
        assert rates.get("biases:conv_out") == (pytest.approx(0.5 * step) if trainable == "all" else None)


@pytest.mark.parametrize("fmt", [QuantFormat(scheme="auto"), QuantFormat(smooth=True)])
def test_a_step_of_the_optimiser_is_the_same_part_of_the_step_of_every_row(fmt: QuantFormat) -> None:
    """Rows of one layer whose steps differ by a factor of hundreds, for their widths and for their magnitudes."""
    torch.manual_seed(0)
    module = nn.Linear(64, 6)
    with torch.no_grad():
        module.weight.mul_(torch.tensor([1.0, 1.0, 1.0, 0.1, 0.1, 0.1])[:, None])
    root, table, bit_map = one_layer(module, [1, 4, 8], format=fmt)
    input_max = {"layer": torch.rand(64) * 3 + 0.1}
    student = build_student(root, table, bit_map, statistics=known(input_max=input_max), trainable="all")
    q = student.layer.weight_quantizer  # type: ignore[union-attr]
    steps = (q.scale * q.scale_unit).detach().clone()  # type: ignore[operator]
    assert float(steps.max() / steps.min()) > 500
    before = q.rows().detach().clone()  # type: ignore[operator, union-attr]
    optimizer = torch.optim.AdamW(param_groups(student, weight_lr=0.1, weight_scale_lr=0.01), weight_decay=0, eps=1e-15)
    student.layer(torch.randn(32, 64)).square().sum().backward()  # type: ignore[operator]
    optimizer.step()
    moved = (q.rows() - before).abs().amax(1)  # type: ignore[operator, union-attr]
    factor = 1.0 if q.group_factor is None else q.group_factor.mean()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(moved * factor / steps / 0.1, torch.ones(6), rtol=0, atol=0.5)
    changed = (q.scale * q.scale_unit / steps - 1).abs()  # type: ignore[operator]
    torch.testing.assert_close(changed / 0.01, torch.ones(6), rtol=0, atol=0.5)


def flat_activations(table: LayerTable, bits: int, timesteps: tuple[int, ...] = ()) -> ActivationTable:
    steps = max(1, len(timesteps))
    return ActivationTable(
        model_digest=table.digest,
        bits={la.name: bits for la in table},
        scale={la.name: torch.full((steps,), 0.1) for la in table},
        zero={la.name: torch.full((steps,), 5.0) for la in table},
        timesteps=timesteps,
    )


def test_the_state_of_a_student_holds_no_frozen_weight() -> None:
    denoiser = tiny_denoiser()
    table = discover(denoiser)
    student = build_student(denoiser.module, table, mixed(table), trainable="lora", rank=2)
    assert not any("base" in k for k in student.state_dict()), "the frozen weight is rebuilt, not stored"


def test_borrowed_weights_stay_shared_and_the_given_model_is_untouched() -> None:
    root, table, bit_map = one_layer(nn.Linear(6, 6), [2, 3])
    root.other = nn.Linear(6, 6)
    root.other.weight = root.layer.weight  # type: ignore[union-attr, assignment]
    before = {k: v.clone() for k, v in root.state_dict().items()}
    student = build_student(root, table, bit_map, trainable="lora", rank=2)
    assert student.other.weight_quantizer is student.layer.weight_quantizer  # type: ignore[union-attr]
    assert not torch.equal(student.other.bias, student.layer.bias)  # type: ignore[union-attr, arg-type]
    made = convert(student).module
    assert made.other.weight is made.layer.weight  # type: ignore[union-attr]
    assert all(torch.equal(v, before[k]) for k, v in root.state_dict().items())


def test_bad_input_is_named() -> None:
    root, table, bit_map = one_layer(nn.Linear(6, 6), [2, 3])
    with pytest.raises(UnknownNameError, match="did you mean 'lora'"):
        build_student(root, table, bit_map, trainable="loras")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rank"):
        build_student(root, table, bit_map, rank=0)
    with pytest.raises(ConfigError, match="build_student"):
        convert(root)
    wide = BitMap(model_digest=table.digest, weights=bit_map.weights, activations={"layer": 4})
    with pytest.raises(ConfigError, match="activation widths"):
        build_student(root, table, wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_student_of_a_model_in_half_precision_trains_in_float32(dtype: torch.dtype) -> None:
    denoiser = tiny_denoiser()
    table = discover(denoiser)
    bit_map = mixed(table)
    half = copy.deepcopy(denoiser.module).to(dtype)
    student = build_student(half, table, bit_map, trainable="all")
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {dtype}
    expected = quantize_model(copy.deepcopy(half).float(), table, bit_map).module
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([800, 200]), torch.tensor([0, 3])
    out = predicted(student, x, t, labels)
    torch.testing.assert_close(out, predicted(expected, x, t, labels))
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(p.grad).all() for g in param_groups(student) for p in g["params"])
