from __future__ import annotations

from dataclasses import replace

import pytest

from mpqsearch.core import LayerTable, Policy, uniform_map
from mpqsearch.errors import ConfigError, UnknownNameError
from tests.support import tiny_table

TABLE = tiny_table(n_layers=6)
NAMES = [la.name for la in TABLE]


def with_layers(**changes: dict[int, object]) -> LayerTable:
    layers = list(TABLE.layers)
    for field, values in changes.items():
        for i, value in values.items():
            layers[i] = replace(layers[i], **{field: value})
    return replace(TABLE, layers=tuple(layers))


def test_overrides_win_over_roles_and_the_first_pattern_counts() -> None:
    policy = Policy(overrides={"block.1.*": 4, "block.[12].*": 5})
    rules = policy.resolve(TABLE)
    assert rules.fixed == {NAMES[0]: 8, NAMES[1]: 4, NAMES[2]: 5, NAMES[5]: 8}
    assert rules.searched == (NAMES[3], NAMES[4])
    with pytest.raises(ConfigError, match="fixes every layer"):
        Policy(overrides={"*": 4}).check(TABLE)


def test_bounds_hold_the_searched_layers_and_all_of_them_count() -> None:
    policy = Policy(widths=(2, 4, 8), min_bits={"block.*": 3, "block.2.*": 5}, max_bits={"block.3.*": 4})
    rules = policy.resolve(TABLE)
    allowed = {n: [b for b in policy.widths if rules.allows(n, b)] for n in rules.searched}
    assert allowed == {NAMES[1]: [4, 8], NAMES[2]: [8], NAMES[3]: [4], NAMES[4]: [4, 8]}
    made = uniform_map(TABLE, policy, 2)
    assert [int(made.weights[n]) for n in NAMES] == [8, 4, 8, 4, 4, 8]
    with pytest.raises(ConfigError, match=r"no width is left for block\.1\.linear: .*allow 5\.\.7"):
        Policy(widths=(2, 4, 8), min_bits={"block.1.*": 5}, max_bits={"*": 7}).check(TABLE)


def test_a_uniform_map_of_a_width_that_is_not_searched_keeps_it_where_nothing_is_bounded() -> None:
    made = uniform_map(TABLE, Policy(widths=(4, 8)), 3)
    assert int(made.weights[NAMES[1]]) == 3


def test_groups_join_where_they_overlap_and_take_what_one_of_them_is_fixed_at() -> None:
    table = with_layers(fuse={1: "t", 2: "t"})
    policy = Policy(groups={"a": ("block.2.*", "block.3.*"), "fused": ("qkv",)})
    assert policy.groups_of(table) == [(NAMES[1], NAMES[2], NAMES[3])]
    rules = policy.resolve(table)
    assert rules.groups == ((NAMES[1], NAMES[2], NAMES[3]),)
    assert rules.units() == [(NAMES[1], NAMES[2], NAMES[3]), (NAMES[4],)]
    held = replace(policy, overrides={"block.3.*": 6}).resolve(table)
    assert {n: held.fixed[n] for n in NAMES[1:4]} == dict.fromkeys(NAMES[1:4], 6)
    with pytest.raises(ConfigError, match="fixed at 6 and 8 bits"):
        Policy(groups={"a": ("block.0.*", "block.1.*")}, overrides={"block.1.*": 6}).check(table)
    bounded = replace(policy, min_bits={"block.3.*": 5}, max_bits={"block.1.*": 6}).resolve(table)
    assert {bounded.bounds[n] for n in NAMES[1:4]} == {(5, 6)}


def test_the_word_qkv_groups_each_attention_by_itself() -> None:
    table = with_layers(fuse={1: "a.qkv", 2: "a.qkv", 3: "b.qkv", 4: "b.qkv"})
    assert Policy().groups_of(table) == []
    assert Policy(groups={"fused": ("qkv",)}).groups_of(table) == [(NAMES[1], NAMES[2]), (NAMES[3], NAMES[4])]


def test_patterns_that_match_nothing_are_refused_by_name() -> None:
    for field in ("overrides", "min_bits", "max_bits"):
        with pytest.raises(UnknownNameError, match=rf"block\.1\.linear.*policy\.{field}"):
            Policy(**{field: {"block.1.lin": 4}}).check(TABLE)
    with pytest.raises(UnknownNameError, match=r"policy\.groups\.mine"):
        Policy(groups={"mine": ("nowhere.*",)}).check(TABLE)
    with pytest.raises(ConfigError, match="must be a list of patterns"):
        Policy(groups={"mine": "block.*"})  # type: ignore[dict-item]
    for wrong in (2.0, True, 9):
        with pytest.raises(ConfigError, match="not supported"):
            Policy(min_bits={"*": wrong})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="max_formats must be a whole number"):
        Policy(max_formats=-1)


def test_layers_of_which_nothing_is_known_are_held_unless_the_user_says_otherwise() -> None:
    policy = Policy(overrides={"block.1.*": 3})
    held = policy.holding(TABLE, [NAMES[1], NAMES[2], NAMES[0], "gone"])
    assert held.overrides == {"block.1.*": 3, NAMES[2]: 8}
    assert policy.holding(TABLE, []) is policy


def test_a_policy_is_data_and_a_line() -> None:
    policy = Policy(min_bits={"a.*": 3}, groups={"g": ("a", "b")}, max_formats=2)
    data = policy.to_data()
    again = Policy(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    assert again.to_data() == data
    assert "a.* >= 3 bits" in policy.describe()
    assert "g share their widths; at most 2 widths" in policy.describe()
