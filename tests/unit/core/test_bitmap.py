from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import BitMap, Budget, LayerSpec, LayerTable, Policy, QuantFormat
from mpqsearch.core.formats import WIDTHS
from mpqsearch.errors import ConfigError, LayerMismatchError, UnknownNameError
from mpqsearch.methods import MethodSpec, Programs
from tests.support import tiny_profile, tiny_table


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


def test_data_round_trip_keeps_everything() -> None:
    first = BitMap(
        model_digest="d",
        weights={"a": np.array([1, 1, 8, 16]), "b": np.array(5)},
        activations={"b": 4},
        format=QuantFormat(scheme="auto"),
        formats={"a": QuantFormat(scheme="symmetric", p=2.0)},
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


def test_the_summary_folds_neighbours() -> None:
    folded = BitMap(model_digest="d", weights={"x.q": np.array(3), "x.k": np.array(3), "x.o": np.array(16)}).summary()
    assert folded.splitlines() == ["x.{q,k}: 3 bits", "x.o: full precision"]


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


@pytest.mark.parametrize("bits", [2.7, 260, True, "4", None, -1, 9, 3.0])
def test_a_width_of_a_file_is_checked_before_it_is_cast(bits: object) -> None:
    data = make(a=3, b=[2, 3, 3]).to_data()
    one = json.loads(json.dumps(data))
    one["layers"]["a"]["bits"] = bits
    run = json.loads(json.dumps(data))
    run["layers"]["b"]["channel_bits"]["data"][0][0] = bits
    inputs = json.loads(json.dumps(data))
    inputs["layers"]["a"]["activation_bits"] = bits
    for broken in (one, run, inputs):
        with pytest.raises(ConfigError, match="should be int|is not supported"):
            BitMap.from_data(broken)
    if bits is not None:
        with pytest.raises(ConfigError, match="integer width|not supported"):
            BitMap(model_digest="d", weights={"a": [bits, 3]})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="more than 16777216 channels"):
        BitMap.from_data({**data, "layers": {"b": {"channel_bits": {"encoding": "rle", "data": [[3, 2**40]]}}}})
    with pytest.raises(ConfigError, match="activation_steps"):
        BitMap.from_data({**data, "activation_steps": True})


def test_nouns_show_themselves_in_a_few_lines() -> None:
    table = tiny_table(n_layers=40)
    bit_map = BitMap(model_digest=table.digest, weights={la.name: np.array(3) for la in table})
    profile = tiny_profile(table)
    made = Programs(table=table, profile=profile, policy=Policy(), format=QuantFormat()).allocate(
        MethodSpec(name="ours", allocator="ilp-layer"), Budget.parse("3bit")
    )
    nouns = (table, bit_map, profile, Policy(), Budget.parse("uniform:3"), made, made.method)
    for noun in nouns:
        text = repr(noun)
        assert text.startswith(type(noun).__name__)
        assert len(text) < 900, text
        assert text.count("\n") <= 8
        html = noun._repr_html_()
        assert html.startswith(f"<b>{type(noun).__name__}</b><table>")
        assert html.count("<tr>") == text.count("\n")
    assert "3 x 8 bits" in repr(made) or "ours" in repr(made)
    frames = [noun.to_frame() for noun in (table, bit_map, profile, made)]
    assert [len(f) for f in frames] == [40, 40, 40 * len(profile.formats), 40]
    assert frames[1]["mean_bits"].tolist() == [3.0] * 40
    assert frames[2]["error_3"][0] == pytest.approx(
        profile.arrays[f"output_error/{profile.formats[0]}"][profile.rows(table.layers[0].name), 2].sum(), rel=1e-5
    )
    assert made.size_bytes == -(-made.size_bits // 8)
    assert table.size_bytes == 2 * table.n_parameters
    assert profile.size_bytes > 0


def test_three_levels_are_shown_with_the_bits_that_they_store() -> None:
    weights = {"a": np.array(2), "b": np.array([2, 3, 2, 8]), "c": np.array(2)}
    plain = {"c": QuantFormat(scheme="symmetric")}
    bit_map = BitMap(model_digest="d", weights=weights, format=QuantFormat(scheme="ternary"), formats=plain)
    assert bit_map.summary().splitlines() == [
        "a: 1.6 bits, ternary",
        "b: 1.6b x2 3b x1 8b x1, ternary",
        "c: 2 bits, symmetric",
    ]
    assert replace(bit_map, formats={}).summary().splitlines()[2] == "c: 1.6 bits"
    assert bit_map.to_frame()["mean_bits"].tolist() == pytest.approx([1.6, (3.2 + 11) / 4, 2])
