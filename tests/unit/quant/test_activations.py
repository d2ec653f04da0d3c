from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import BitMap, LayerSpec, LayerTable, QuantFormat, size_bits
from mpqsearch.core.stored import SCALE_BITS
from mpqsearch.errors import ConfigError, LayerMismatchError, NumericsError
from mpqsearch.models import discover
from mpqsearch.models.calls import call_of
from mpqsearch.quant import (
    ActivationQuantizer,
    ActivationTable,
    RangeCollector,
    build_student,
    param_groups,
    quantize_model,
)
from mpqsearch.quant.activations import TimestepClock
from mpqsearch.quant.modules import quant_layers
from mpqsearch.quant.ranges import BINS, _Histogram
from mpqsearch.sampling import SamplerSpec, adapt, latents
from mpqsearch.sampling.plain import noise_of
from tests.support import tiny_denoiser
from tests.support.inputs import calibrated, known
from tests.support.tiny import DDPM


def uniform(table: LayerTable, weight: int, act: int, **kwargs: object) -> BitMap:
    weights = {la.name: np.array(weight) for la in table}
    return BitMap(model_digest=table.digest, weights=weights, activations={la.name: act for la in table}, **kwargs)  # type: ignore[arg-type]


def test_smoothd_activations_equal_the_direct_formula() -> None:
    # Y = Q_x(X diag(1/f)) Q_w(W diag(f))': MPQ-DM's equation with the factors where they are at inference.
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    spec = LayerSpec(name="layer", kind="Conv2d", weight_shape=(4, 3, 3, 3), has_bias=True)
    table = LayerTable(digest="0" * 64, layers=(spec,))
    root = nn.Module()
    root.layer = layer
    x = torch.randn(2, 3, 6, 6) * torch.tensor([0.1, 1, 20]).view(1, 3, 1, 1)
    x[:, 1] = 0  # a dead channel
    statistics = known(input_max={"layer": x.abs().amax((0, 2, 3))})
    bit_map = uniform(table, 4, 4, format=QuantFormat(smooth=True))
    with RangeCollector(root, table, factors=smooth(root, table, bit_map, statistics)) as collector:
        layer(x)
    activations = collector.table(bit_map.activations)
    made = quantize_model(root, table, bit_map, statistics=statistics, activations=activations)
    rows = made.rows["layer"]
    f = rows.factor.view(3, 9)[:, 0]  # type: ignore[union-attr]
    assert float(f[1]) == 1.0
    s, z = activations.scale["layer"], activations.zero["layer"]
    codes = (x / f.view(1, 3, 1, 1) / s + z).round().clamp(0, 15)
    scaled_x = (codes - z) * s
    scaled_w = (rows.codes.float() - rows.quantizer.zero[:, None]) * rows.quantizer.scale[:, None]
    expected = nn.functional.conv2d(scaled_x, scaled_w.view(4, 3, 3, 3), layer.bias, padding=1)
    # The same numbers with the factors multiplied out differ in the last digits of float32.
    torch.testing.assert_close(made.module.layer(x), expected, rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    student = build_student(root, table, bit_map, statistics=statistics, activations=activations)
    assert torch.equal(student.layer(x), made.module.layer(x))  # type: ignore[operator]


def smooth(*args: object) -> dict[str, Tensor]:
    from mpqsearch.quant import smooth_inputs

    return smooth_inputs(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "silu", "uniform", "outliers", "positive"])
def test_range_search_comes_within_a_few_percent_of_the_search_over_all_values(bits: int, kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 40_000)
    x = {
        "normal": x,
        "silu": nn.functional.silu(x * 2),
        "uniform": torch.rand_like(x) - 0.3,
        "outliers": torch.where(torch.rand_like(x) < 1e-4, x * 30, x),
        "positive": x.abs() + 1,
    }[kind]
    root, table = linear(10_000)
    with RangeCollector(root, table) as collector:
        for part in x.split(10_000, dim=1):
            root.layer(part)  # type: ignore[operator]
    found = collector.table({"layer": bits})
    low, high, top = min(0.0, float(x.min())), max(0.0, float(x.max())), 2**bits - 1
    errors = []
    for i in range(80):
        s = (high - low) * (1 - 0.01 * i) / top
        z = min(max(round(-low * top / (high - low)), 0), top)
        errors.append(float((((x / s + z).round().clamp(0, top) - z) * s - x).abs().pow(2.4).sum()))
    s, z = found.scale["layer"], found.zero["layer"]
    miss = ((x / s + z).round().clamp(0, top) - z) * s - x
    assert float(miss.abs().pow(2.4).sum()) <= 1.05 * min(errors)
    # At 8 bits a step spans two bins of a histogram, so its own estimate of the error is good to a fifth or so.
    assert float(found.error["layer"]) == pytest.approx(float(miss.square().mean()), rel=0.25 if bits == 8 else 0.1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["normal", "silu", "outliers", "positive"])
def test_searched_zero_points_come_close_to_all_pairs_and_never_lose(bits: int, kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 40_000)
    x = {
        "normal": x,
        "silu": nn.functional.silu(x * 2),
        "outliers": torch.where(torch.rand_like(x) < 1e-4, x.abs() * 30, x),
        "positive": x.abs() + 1,
    }[kind]
    root, table = linear(40_000)
    with RangeCollector(root, table) as collector:
        root.layer(x)  # type: ignore[operator]
    low, high, top = min(0.0, float(x.min())), max(0.0, float(x.max())), 2**bits - 1

    def error(s: float, z: float) -> float:
        return float((((x / s + z).round().clamp(0, top) - z) * s - x).abs().pow(2.4).sum())

    plain, searched = (collector.table({"layer": bits}, zero_points=on) for on in (False, True))
    found, joint = (error(float(t.scale["layer"]), float(t.zero["layer"])) for t in (searched, plain))
    every = min(error((high - low) * (1 - 0.01 * i) / top, z) for i in range(80) for z in range(top + 1))
    assert found <= 1.05 * every
    assert found <= 1.01 * joint  # the histogram's own rounding
    if kind == "silu" and bits == 4:
        assert found < 0.7 * joint, "the short end of the range has levels of its own"


def linear(n: int) -> tuple[nn.Module, LayerTable]:
    root = nn.Module()
    root.layer = nn.Linear(n, 1)
    return root, LayerTable(digest="0" * 64, layers=(LayerSpec(name="layer", kind="Linear", weight_shape=(1, n)),))


def test_histograms_keep_every_value_when_the_reach_doubles() -> None:
    h = _Histogram("layer")
    parts = [torch.randn(1000) * 10.0**k for k in (-2, 0, 1, -1, 2)]
    for part in parts:
        h.add(part)
    x = torch.cat(parts)
    assert float(h.counts.sum()) == 5000
    assert (h.low, h.high) == pytest.approx((float(x.min()), float(x.max())))
    again = torch.histc(x, BINS, -h.reach, h.reach)
    # Values within rounding of an edge may fall to either side; cumulative counts differ by those only.
    assert float((h.counts.cumsum(0) - again.cumsum(0)).abs().max()) <= 3
    with pytest.raises(NumericsError, match="layer"):
        h.add(torch.tensor([1.0, float("nan")]))


def test_scales_follow_the_timestep_that_is_given_and_not_the_number_of_calls() -> None:
    denoiser = tiny_denoiser(steps=5, guidance=2.0, batch=4)
    table = discover(denoiser)
    bit_map = uniform(table, 16, 4, activation_steps=5)
    activations = calibrated(denoiser, table, bit_map, seeds=range(4))
    assert activations.timesteps == (0, 200, 400, 600, 800)
    assert len(activations.scale["conv_in"]) == 5
    assert float(activations.scale["conv_in"].std()) > 0
    made = denoiser.with_module(quantize_model(denoiser.module, table, bit_map, activations=activations).module)
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    steps = torch.tensor([800, 200, 0, 600])
    together = made.module(x, steps, class_labels=labels).sample
    # Alone, again, in another order, with a plain number: always the scale of the timestep.
    for i in (2, 0, 3, 1, 1):
        alone = made.module(x[i : i + 1], steps[i : i + 1], class_labels=labels[i : i + 1]).sample
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)
    direct = made.module(x[:1], 800, class_labels=labels[:1]).sample
    torch.testing.assert_close(direct, together[:1], rtol=1e-4, atol=1e-5)
    # Timesteps in between take the nearest calibrated one.
    for given, nearest in ((290, 200), (310, 400), (999, 800)):
        made.module(x, torch.full((4,), given), class_labels=labels)
        clock = made.module.timestep_clock
        assert isinstance(clock, TimestepClock)
        assert clock.index is not None
        assert set(clock.index.tolist()) == {activations.timesteps.index(nearest)}


def test_scales_by_token_span_each_token_and_store_nothing() -> None:
    denoiser = tiny_denoiser("dit", steps=4, batch=8)
    table = discover(denoiser)
    stored = uniform(table, 16, 4, activation_steps=4)
    by_token = replace(stored, token_scales=True)
    static = by_token.static_inputs(table)
    linear = {la.name for la in table if la.kind == "Linear"}
    assert set(static) == set(stored.activations) - linear
    assert 0 < len(static) < len(stored.activations)
    assert BitMap.from_data(by_token.to_data()) == by_token
    steps_of_linear = len(linear & set(stored.activations))
    assert size_bits(table, stored) - size_bits(table, by_token) == steps_of_linear * 4 * (SCALE_BITS + 4)
    with pytest.raises(ConfigError, match="give the table"):
        quantize_model(denoiser.module, table, by_token)
    activations = calibrated(denoiser, table, by_token)
    assert set(activations.bits) == set(static)
    made = quantize_model(denoiser.module, table, by_token, activations=activations).module
    quantizers = {m.layer.name: m for m in made.modules() if isinstance(m, ActivationQuantizer)}
    x = torch.randn(2, 3, 6) * torch.tensor([0.01, 1.0, 50.0])[:, None] + 3
    found = next(q for n, q in quantizers.items() if n in linear)(x)
    for token, values in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        low, high = min(0.0, float(token.min())), max(0.0, float(token.max()))
        step = (high - low) / 15
        zero = round(-low / step)
        codes = [min(15, max(0, round(float(v) / step) + zero)) for v in token]
        torch.testing.assert_close(values, torch.tensor([(c - zero) * step for c in codes]))
    student = build_student(denoiser.module, table, by_token, activations=activations)
    torch.testing.assert_close(latents(denoiser.with_module(student), [0]), latents(denoiser.with_module(made), [0]))
    trained = [g["name"] for g in param_groups(student) if g["name"].startswith("activation-scales")]
    assert set(trained) == {f"activation-scales:{n}" for n in static}


def test_guidance_in_one_call_equals_guidance_in_two() -> None:
    denoiser = tiny_denoiser(steps=4, batch=4)
    table = discover(denoiser)
    bit_map = uniform(table, 3, 6, activation_steps=4)
    activations = calibrated(denoiser, table, bit_map, seeds=range(4))
    made = denoiser.with_module(quantize_model(denoiser.module, table, bit_map, activations=activations).module)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([750, 250]), torch.tensor([1, 3])
    null = torch.full_like(labels, 4)
    asked, free = (made.module(x, t, class_labels=c).sample for c in (labels, null))
    both = made.module(torch.cat([x, x]), torch.cat([t, t]), class_labels=torch.cat([null, labels])).sample
    torch.testing.assert_close(both, torch.cat([free, asked]), rtol=1e-4, atol=1e-4)
    # Another number of steps than was calibrated.
    assert latents(tiny_denoiser(steps=7, guidance=3.0).with_module(made.module), range(4)).isfinite().all()


class Own(nn.Module):
    """A user's denoiser that does everything in `denoise`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def denoise(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        return self.b(nn.functional.silu(self.a(x) * (1 + t.view(-1, 1, 1, 1) / 100)))  # type: ignore[no-any-return]


def test_modules_with_a_method_denoise_are_timed_too() -> None:
    torch.manual_seed(0)
    spec = SamplerSpec(steps=4, batch=4)
    denoiser = adapt(Own(), sample_shape=(1, 8, 8), scheduler=DDPM, sampler=spec)
    table = discover(denoiser)
    bit_map = uniform(table, 8, 4, activation_steps=4)
    activations = calibrated(denoiser, table, bit_map, seeds=range(4))
    scales = activations.scale["b"]
    assert bool((scales[1:] > scales[:-1]).all()), "the input grows with the timestep by construction"
    assert not hasattr(denoiser.module, "timestep_clock"), "calibration leaves nothing behind"
    student = denoiser.with_module(build_student(denoiser.module, table, bit_map, activations=activations))
    given = (torch.randn(2, 1, 8, 8), torch.tensor([250, 750]), None)
    call_of(student.module, given, {}).replay(student.module).sum().backward()
    grads = {n: layer.input_quantizer.scale.grad for n, layer in quant_layers(student.module)}  # type: ignore[union-attr]
    assert grads["b"].ne(0).tolist() == [False, True, False, True], (
        "only the scales of the timesteps that were given learn"
    )  # type: ignore[union-attr]


def test_copies_keep_a_clock_of_their_own() -> None:
    denoiser = tiny_denoiser(steps=3, batch=2)
    table = discover(denoiser)
    bit_map = uniform(table, 4, 4, activation_steps=3)
    activations = calibrated(denoiser, table, bit_map, seeds=range(2))
    one = quantize_model(denoiser.module, table, bit_map, activations=activations).module
    two = copy.deepcopy(one)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    first = one(x, 0, class_labels=labels).sample
    two(x, 999, class_labels=labels)
    assert one.timestep_clock is not two.timestep_clock
    quantizers = [m for m in two.modules() if isinstance(m, ActivationQuantizer)]
    assert all(q.clock is two.timestep_clock for q in quantizers)
    assert torch.equal(one(x, 0, class_labels=labels).sample, first)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_error_of_the_prediction_falls_with_the_width(kind: str) -> None:
    denoiser = tiny_denoiser(kind, steps=4, batch=8)
    table = discover(denoiser)
    # The first step of the calibrated trajectories: inputs that were seen, so that nothing is clipped that was not
    # meant to be.
    x, t = noise_of(range(1_000_000, 1_000_008), (1, 8, 8)), torch.full((8,), 750)
    labels = torch.arange(1_000_000, 1_000_008) % 4
    truth = denoiser.module(x, t, class_labels=labels).sample
    errors = []
    for bits in (4, 6, 8):
        bit_map = uniform(table, 16, bits, activation_steps=4)
        activations = calibrated(denoiser, table, bit_map)
        made = denoiser.with_module(quantize_model(denoiser.module, table, bit_map, activations=activations).module)
        errors.append(float((made.module(x, t, class_labels=labels).sample - truth).square().mean()))
    # A factor of 4 a bit where rounding dominates; less at low widths, where clipping takes its part.
    assert errors[0] > 6 * errors[1] > 24 * errors[2] > 0


def test_tables_survive_json_and_refuse_what_does_not_fit() -> None:
    denoiser = tiny_denoiser(steps=2, batch=2)
    table = discover(denoiser)
    bit_map = uniform(table, 4, 4)
    activations = calibrated(denoiser, table, bit_map, seeds=range(2))
    assert activations.timesteps == ()
    again = ActivationTable.from_data(activations.to_data())
    assert all(torch.equal(again.scale[n], s) for n, s in activations.scale.items())
    with pytest.raises(LayerMismatchError, match="counts 2 activation scales a layer, the table has 1"):
        quantize_model(denoiser.module, table, uniform(table, 4, 4, activation_steps=2), activations=activations)
    with pytest.raises(ConfigError, match="counts 3 activation scales a layer, .* called with 2 different timesteps"):
        calibrated(denoiser, table, uniform(table, 4, 4, activation_steps=3), seeds=range(2))
    with pytest.raises(LayerMismatchError, match="4 bits calibrated, 6 asked"):
        quantize_model(denoiser.module, table, uniform(table, 4, 6), activations=activations)
    other = ActivationTable.from_data({**activations.to_data(), "model_digest": "1" * 64})
    with pytest.raises(LayerMismatchError, match="1" * 12):
        quantize_model(denoiser.module, table, bit_map, activations=other)
    with pytest.raises(ConfigError, match="needs 3 values"):
        ActivationTable.from_data({**activations.to_data(), "timesteps": [0, 1, 2]})
    with pytest.raises(ConfigError, match="full precision"):
        ActivationTable(model_digest="0", bits={"a": 16}, scale={}, zero={})


def test_a_batch_that_does_not_fit_its_timesteps_is_refused() -> None:
    spec = LayerSpec(name="layer", kind="Linear", weight_shape=(2, 3))
    clock = TimestepClock((0, 500))
    quantizer = ActivationQuantizer(spec, 4, torch.ones(2), torch.zeros(2), clock)
    with pytest.raises(ConfigError, match="no timestep is known"):
        quantizer(torch.rand(2, 3))
    clock.set(torch.tensor([0, 500]))
    assert quantizer(torch.rand(6, 3)).shape == (6, 3)  # three frames of each sample
    with pytest.raises(ConfigError, match="batch of 3 with 2 different timesteps"):
        quantizer(torch.rand(3, 3))
    clock.set(torch.tensor([500, 500]))
    assert quantizer(torch.rand(3, 3)).shape == (3, 3)
