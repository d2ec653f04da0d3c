from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import BitMap, LayerSpec, LayerTable, Policy, QuantFormat
from mpqsearch.core.formats import WIDTHS
from mpqsearch.errors import ConfigError, LayerMismatchError, UnknownNameError
from tests.support import tiny_table


def make(**weights: object) -> BitMap:
    return BitMap(model_digest="d", weights={k: np.array(v) for k, v in weights.items()})


def test_equal_maps_have_equal_digests_and_different_ones_do_not() -> None:
    assert make(a=[3, 3], b=2).digest == make(a=3, b=2).digest
    digests = {make(a=3, b=2).digest, make(a=3, b=3).digest, make(a=[3, 2], b=2).digest, make(a=[2, 3], b=2).digest}
    assert len(digests) == 4
    other = BitMap(model_digest="d", weights=make(a=3, b=2).weights, format=QuantFormat(scheme="auto"))
    assert other.digest != make(a=3, b=2).digest


def test_the_digest_is_that_of_the_data_as_json() -> None:
    """Digests are written into artifacts: they must not depend on how they are computed."""
    rng = np.random.default_rng(0)
    widths = [*WIDTHS, 16]
    for _ in range(200):
        weights: dict[str, np.ndarray] = {}
        for k in range(int(rng.integers(0, 6))):
            n = int(rng.integers(1, 400))
            one, runs = np.array(rng.choice(widths)), np.repeat(rng.choice(widths, n // 10 + 1), 10)[:n]
            weights[f'{chr(ord("z") - k)}.é"{k}'] = (
                one,
                runs.astype(np.uint8),
                rng.choice(widths, n),
                rng.choice([2, 3], n),
            )[k % 4]
        names = list(weights)[::2]
        made = BitMap(
            model_digest="d",
            weights=weights,
            activations=dict.fromkeys(names, 4),
            activation_steps=3,
            formats=dict.fromkeys(names[:1], QuantFormat(scheme="auto")),
        )
        text = json.dumps(made.to_data(), sort_keys=True, separators=(",", ":"))
        assert made.digest == hashlib.sha256(text.encode()).hexdigest()
        assert BitMap.from_data(json.loads(text)).digest == made.digest


def test_mixed_layers_are_those_whose_channels_differ_in_order() -> None:
    made = make(a=[2, 3, 3], b=4, c=[5, 5], d=[16, 1])
    mixed = made.mixed_layers
    assert mixed.names == ("a", "d")
    assert mixed.widths.tolist() == [2, 3, 3, 16, 1]
    assert (mixed.sizes.tolist(), mixed.starts.tolist()) == ([3, 2], [0, 3])
    assert [{b: int(n) for b, n in enumerate(row) if n} for row in mixed.counts] == [{2: 1, 3: 2}, {1: 1, 16: 1}]
    assert make(b=4).mixed_layers.names == ()


def test_data_round_trip_keeps_everything() -> None:
    first = BitMap(
        model_digest="d",
        weights={"a": np.array([1, 1, 8, 16]), "b": np.array(5)},
        activations={"b": 4},
        format=QuantFormat(scheme="auto"),
        formats={"a": QuantFormat(scheme="symmetric", criterion="mse")},
    )
    second = BitMap.from_data(first.to_data())
    assert second.digest == first.digest
    assert second.weights["a"].tolist() == [1, 1, 8, 16]
    assert second.format_of("a").scheme == "symmetric"
    assert second.activations == {"b": 4}


def test_the_strength_of_prescaling_is_written_only_where_it_is_not_the_default() -> None:
    plain, strong = (
        BitMap(model_digest="d", weights={"a": np.array(4)}, format=QuantFormat(smooth=True), formats=formats)
        for formats in ({}, {"a": QuantFormat(smooth=True, alpha=0.75)})
    )
    assert "alpha" not in plain.to_data()["defaults"], "digests of maps from before it hold"
    assert BitMap.from_data(strong.to_data()).format_of("a").alpha == 0.75
    assert strong.digest != plain.digest
    inputs = replace(strong, activations={"a": 4})
    assert (strong.scaled_inputs, inputs.scaled_inputs) == ((), (("a", 0.75),))
    assert replace(inputs, activations={"a": 16}).scaled_inputs == ()
    with pytest.raises(ConfigError, match=r"alpha of smoothing must lie in 0\.\.1, got 1\.5"):
        QuantFormat(alpha=1.5)


def test_widths_are_read_only_and_checked() -> None:
    bit_map = make(a=[2, 3])
    with pytest.raises(ValueError, match="read-only"):
        bit_map.weights["a"][0] = 4
    with pytest.raises(ConfigError, match="width 9 is not supported"):
        make(a=9)
    with pytest.raises(ConfigError, match="one integer width"):
        make(a=[2.5, 3.0])
    with pytest.raises(ConfigError, match="activations name 'z'"):
        BitMap(model_digest="d", weights={"a": np.array(2)}, activations={"z": 4})


def test_validation_names_what_does_not_fit() -> None:
    table = tiny_table(n_layers=3, channels=2)
    names = [la.name for la in table]
    whole = {n: np.array(3) for n in names}
    BitMap(model_digest=table.digest, weights=whole).validate(table)
    with pytest.raises(LayerMismatchError, match="made for the model"):
        BitMap(model_digest="1" * 64, weights=whole).validate(table)
    with pytest.raises(LayerMismatchError, match=r"missing block\.2\.linear"):
        BitMap(model_digest=table.digest, weights={n: whole[n] for n in names[:2]}).validate(table)
    with pytest.raises(LayerMismatchError, match="3 widths for 'block.0.linear', which has 2"):
        BitMap(model_digest=table.digest, weights={**whole, names[0]: np.array([2, 3, 2])}).validate(table)


def test_diff_and_summary_show_what_a_person_looks_for() -> None:
    left, right = make(a=3, b=[2, 3, 3]), make(a=4, b=[2, 3, 3])
    assert left.diff(right) == {"a": ("3 bits", "4 bits")}
    folded = BitMap(model_digest="d", weights={"x.q": np.array(3), "x.k": np.array(3), "x.o": np.array(16)}).summary()
    assert folded.splitlines() == ["x.{q,k}: 3 bits", "x.{o}: full precision"]


def test_the_policy_refuses_pins_that_match_nothing() -> None:
    table = tiny_table()
    with pytest.raises(UnknownNameError, match=r"block\.1\.linear"):
        Policy(overrides={"block.1.lin": 4}).check(table)
    policy = Policy(overrides={"block.1.*": 4})
    policy.check(table)
    assert policy.fixed_width(table["block.1.linear"]) == 4
    assert policy.fixed_width(table["block.2.linear"]) is None
    assert policy.fixed_width(table["block.0.linear"]) == 8
    with pytest.raises(ConfigError, match="fixes every layer"):
        Policy(overrides={"*": 4}).check(table)


def test_transposed_convolutions_count_channels_over_groups() -> None:
    layer = LayerSpec(name="t", kind="ConvTranspose2d", weight_shape=(6, 4, 3, 3), channel_axis=1, groups=2)
    assert (layer.n_channels, layer.weights_per_channel, layer.n_inputs) == (8, 27, 6)
    table = LayerTable(digest="d", layers=(layer,))
    with pytest.raises(UnknownNameError, match="did you mean 't'|Known: t"):
        table["tt"]


def test_maps_share_no_width_that_could_be_changed() -> None:
    table = tiny_table()
    first, second = (
        BitMap(model_digest=table.digest, weights={la.name: np.uint8(3) for la in table}) for _ in range(2)
    )
    name = table.layers[0].name
    with pytest.raises(ValueError, match="read-only"):
        first.weights[name][...] = 4
    assert int(second.weights[name]) == 3
    assert replace(first, weights={**first.weights, name: np.int64(4)}).weights[name].dtype == np.uint8
