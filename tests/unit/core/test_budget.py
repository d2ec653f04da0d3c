"""Bits are counted in one place; these sums are done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqsearch.core import (
    BitMap,
    Budget,
    KeptParameter,
    LayerSpec,
    LayerTable,
    Policy,
    QuantFormat,
    average_bits,
    bops,
    size_bits,
    size_bytes,
    uniform_map,
)
from mpqsearch.core.budget import QUANTITIES
from mpqsearch.core.stored import layer_bits
from mpqsearch.errors import ConfigError, UnknownNameError

TABLE = LayerTable(
    digest="d",
    layers=(
        LayerSpec(name="a", kind="Conv2d", weight_shape=(4, 2, 3, 3), macs=720, role="first"),
        LayerSpec(name="b", kind="Linear", weight_shape=(3, 10), macs=30),
    ),
    kept=(KeptParameter(name="n", n_values=7, reason="normalization"),),
)


def make(a: object, b: object, **kwargs: object) -> BitMap:
    return BitMap(model_digest="d", weights={"a": np.array(a), "b": np.array(b)}, **kwargs)  # type: ignore[arg-type]


def test_uniform_layers_pay_codes_scales_zero_points_and_one_exponent() -> None:
    # a: 4 rows of 18 codes at 8 bits + 16-bit scale + 8-bit zero point, 8 bits a layer; b: 3 rows of 10 at 2; 7 values
    # at 16 bits.
    expected = (4 * (18 * 8 + 16 + 8) + 8) + (3 * (10 * 2 + 16 + 2) + 8) + 7 * 16
    assert size_bits(TABLE, make(8, 2)) == expected
    assert size_bytes(TABLE, make(8, 2)) == -(-expected // 8)
    assert average_bits(TABLE, make(8, 2)) == expected / (72 + 30 + 7)


def test_mixed_layers_pay_a_tag_a_channel() -> None:
    mixed = 10 * (2 + 3 + 4) + 3 * 16 + (2 + 3 + 4) + 3 * 3 + 8
    assert size_bits(TABLE, make(8, [2, 3, 4])) - size_bits(TABLE, make(8, 2)) == mixed - (3 * (20 + 18) + 8)


def test_a_vector_of_equal_widths_is_one_width_and_pays_no_tags() -> None:
    assert make(8, [3, 3, 3]).digest == make(8, 3).digest
    assert size_bits(TABLE, make(8, [3, 3, 3])) == size_bits(TABLE, make(8, 3))


def test_full_precision_layers_pay_sixteen_bits_and_nothing_else() -> None:
    assert size_bits(TABLE, make(16, 16)) == 16 * (72 + 30 + 7)


def test_symmetric_stores_no_zero_points_and_prescaling_stores_its_factors() -> None:
    plain = size_bits(TABLE, make(8, 2))
    assert plain - size_bits(TABLE, make(8, 2, format=QuantFormat(scheme="symmetric"))) == 4 * 8 + 3 * 2
    assert size_bits(TABLE, make(8, 2, format=QuantFormat(smooth=True))) - plain == 16 * (2 + 10)
    assert size_bits(TABLE, make(8, 2, format=QuantFormat(scheme="auto"))) == plain


def test_three_levels_are_stored_five_a_byte() -> None:
    ternary = make(8, 2, format=QuantFormat(scheme="ternary"))
    assert size_bits(TABLE, make(8, 2, format=QuantFormat(scheme="symmetric"))) - size_bits(TABLE, ternary) == 3 * 4
    mixed = make(8, [2, 3, 2], format=QuantFormat(scheme="ternary"))
    assert layer_bits(TABLE["b"], mixed.weights["b"], mixed.format).payload == 2 * 16 + 30
    grouped = LayerSpec(name="g", kind="Linear", weight_shape=(5, 256))
    bits = layer_bits(grouped, np.array(2, dtype=np.uint8), QuantFormat(scheme="ternary", group=128))
    assert (bits.payload, bits.metadata) == (5 * 8 * 52, 5 * 2 * 16 + 8)


def test_bops_are_macs_times_both_widths_channel_by_channel() -> None:
    assert bops(TABLE, make(8, 2)) == 720 * 8 * 16 + 30 * 2 * 16
    assert bops(TABLE, make(8, [2, 3, 4], activations={"b": 4})) == 720 * 8 * 16 + 30 * 3 * 4


@pytest.mark.parametrize(
    ("text", "quantity", "limit"),
    [
        ("3bit", "average_bits", 3.0),
        (" 2.5 bits", "average_bits", 2.5),
        ("uniform:3", "uniform_bits", 3.0),
        ("450kB", "bytes", 450_000.0),
        ("1.5MiB", "bytes", 1.5 * 2**20),
        ("2e9bops", "bops", 2e9),
        ("12ms", "latency", 12.0),
        ("800us", "latency", 0.8),
    ],
)
def test_budgets_read_their_notation(text: str, quantity: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert (budget.quantity, budget.limit) == (quantity, limit)
    assert Budget.parse(budget.label()) == budget


@pytest.mark.parametrize("text", ["", "three", "3furlongs", "uniform:3kB", "-1bit", "0bit", "1.2.3bit", "uniform:"])
def test_unreadable_budgets_say_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"uniform:3|positive"):
        Budget.parse(text)


def test_the_uniform_map_meets_its_own_budget_exactly() -> None:
    policy = Policy()
    for bits in range(1, 9):
        limit = Budget(quantity="uniform_bits", limit=bits).limit_bits(TABLE, policy)
        assert limit == size_bits(TABLE, uniform_map(TABLE, policy, bits))
    half = Budget(quantity="uniform_bits", limit=2.5).limit_bits(TABLE, policy)
    assert (
        half == (size_bits(TABLE, uniform_map(TABLE, policy, 2)) + size_bits(TABLE, uniform_map(TABLE, policy, 3))) // 2
    )
    with pytest.raises(ConfigError, match="uniform budget"):
        Budget(quantity="uniform_bits", limit=9).limit_bits(TABLE, policy)


def test_average_bits_budget_counts_every_parameter() -> None:
    limit = Budget.parse("3bit").limit_bits(TABLE, Policy())
    assert limit == 3 * 109


def test_sizes_are_read_with_their_units() -> None:
    from mpqsearch.core.budget import parse_size

    assert [parse_size(t) for t in ("6GB", "1.5GiB", "800 mb", "3kB", "7B")] == [
        6 * 10**9,
        3 * 2**29,
        8 * 10**8,
        3000,
        7,
    ]
    for wrong in ("6", "GB", "-1GB", "0MB", "6TB", "1e3MB", ""):
        with pytest.raises(ConfigError, match="cannot read the size"):
            parse_size(wrong)


def test_scales_of_activations_are_counted() -> None:
    plain = make(8, 2)
    # Two inputs, at 4 and 8 bits: five scales of 16 bits with five zero points each, and an exponent a layer.
    made = make(8, 2, activations={"a": 8, "b": 4}, activation_steps=5)
    assert size_bits(TABLE, made) - size_bits(TABLE, plain) == 5 * (16 + 8) + 8 + 5 * (16 + 4) + 8
    assert size_bits(TABLE, make(8, 2, activations={"b": 16})) == size_bits(TABLE, plain)
    assert bops(TABLE, made) == 720 * 8 * 8 + 30 * 2 * 4
    assert made.digest != make(8, 2, activations={"a": 8, "b": 4}).digest
    again = BitMap.from_data(made.to_data())
    assert (again.activation_steps, again.digest) == (5, made.digest)
    with pytest.raises(ConfigError, match="activation_steps"):
        make(8, 2, activation_steps=0)


def test_activation_widths_follow_the_policy() -> None:
    policy = Policy()
    assert policy.activations_of(TABLE, 16) == {}
    assert policy.activations_of(TABLE, 4) == {"a": 8, "b": 4}
    assert Policy(roles={"first": 16}).activations_of(TABLE, 4) == {"b": 4}
    assert Policy(activations={"first": 6, "b": 16}).activations_of(TABLE, 4) == {"a": 6}
    with pytest.raises(UnknownNameError, match="matches nothing"):
        Policy(activations={"c.*": 4}).check(TABLE)
    uniform = uniform_map(TABLE, policy, 3, act_bits=4, activation_steps=2)
    assert (uniform.activations, uniform.activation_steps) == ({"a": 8, "b": 4}, 2)
    budget = Budget.parse("uniform:3")
    assert budget.limit_bits(TABLE, policy, act_bits=4, activation_steps=2) == size_bits(TABLE, uniform)


def test_the_size_of_a_map_is_that_of_its_layers_whatever_formats_they_have() -> None:
    fmt = QuantFormat(scheme="auto", smooth=True)
    for widths in ([2, 3, 4], [16, 1, 8], 5, 16):
        for formats in ({}, {TABLE.layers[1].name: QuantFormat(scheme="symmetric")}):
            made = replace(make(8, widths, format=fmt), formats=formats)
            parts = [layer_bits(la, made.weights[la.name], made.format_of(la.name)).total for la in TABLE]
            assert size_bits(TABLE, made) == sum(parts) + 16 * 7


@given(st.sampled_from(QUANTITIES), st.floats(1e-6, 1e15))
def test_a_label_is_read_back_exactly_and_names_a_folder(quantity: str, limit: float) -> None:
    budget = Budget(quantity=quantity, limit=limit)
    assert Budget.parse(budget.label()) == budget
    assert not set(budget.label().replace(":", "-")) & set('/\\<>"|?* ')


def test_labels_are_short_where_that_is_exact() -> None:
    asked = ["3bit", "uniform:3.5", "450000B", "2e+09bops", "12ms", "3.0000001bit", "1234567.25B"]
    assert [Budget.parse(text).label() for text in asked] == asked
    labels = {Budget(quantity=q, limit=3).label() for q in QUANTITIES}
    assert len(labels) == len(QUANTITIES), "equal numbers of different quantities are different budgets"


def test_whatever_the_table_lists_is_counted() -> None:
    more = replace(TABLE, kept=(*TABLE.kept, KeptParameter(name="pos_embed", n_values=1000, reason="buffer")))
    made = make(8, 2)
    assert size_bits(more, made) - size_bits(TABLE, made) == 16 * 1000
    assert more.n_parameters == TABLE.n_parameters + 1000
