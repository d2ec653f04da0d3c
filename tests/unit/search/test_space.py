from __future__ import annotations

import optuna
import pytest

from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.search.space import CATALOGUE, MAX_ACTIVE, is_default, parse_space


def test_every_parameter_has_a_meaning_and_a_default_it_may_take() -> None:
    for p in CATALOGUE.values():
        assert len(p.meaning) > 20
        if p.kind == "choice":
            assert not p.choices or p.default in p.choices
        else:
            assert p.low <= p.default <= p.high


def test_a_list_makes_active_and_a_value_freezes() -> None:
    space = parse_space({"granularity": ["layer", "channel"], "exponent": [0.5, 2], "scheme": "auto", "rounds": 2})
    assert [d.name for d in space.active] == ["exponent", "granularity"]
    assert space.frozen == {"rounds": 2, "scheme": "auto"}
    assert parse_space(space.to_data()) == space


def test_suggestions_lie_in_the_declared_ranges() -> None:
    space = parse_space(
        {"exponent": [0.5, 2.0], "rounds": [0, 3], "role_conv": [0.1, 10.0], "scheme": ["auto", "asymmetric"]}
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [space.suggest(study.ask()) for _ in range(60)]
    for d in space.active:
        assert all(d.holds(theta[d.name]) for theta in seen)
    assert {theta["rounds"] for theta in seen} == {0, 1, 2, 3}
    assert sum(theta["role_conv"] < 1 for theta in seen) > 15  # by its logarithm: half of them lie below 1


def test_the_warm_start_begins_with_the_plain_program() -> None:
    space = parse_space({"mix_final": [0.0, 1.0], "exponent": [0.5, 2.0], "granularity": ["base", "layer"]})
    starts = space.starts()
    assert is_default(starts[0])
    assert {"mix_final": 1.0, "exponent": 1.0, "granularity": "base"} in starts
    assert {"mix_final": 0.0, "exponent": 1.0, "granularity": "layer"} in starts


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ({"exponet": [0.5, 2.0]}, "exponent"),
        ({"exponent": [2.0, 0.5]}, "low must be below high"),
        ({"exponent": [0.5, 200.0]}, "must lie in"),
        ({"exponent": "high"}, "should be a number"),
        ({"exponent": [1, 2, 3]}, "is a range"),
        ({"rounds": 1.5}, "whole number"),
        ({"scheme": ["auto", "gauss"]}, "gauss"),
        ({"granularity": ["layer", "layer"]}, "distinct"),
    ],
)
def test_a_wrong_declaration_says_what_is_wrong(declared: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_space(declared)


def test_an_unknown_parameter_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'kurtosis'"):
        parse_space({"kurtois": 1.0})


def test_too_many_active_parameters_are_refused() -> None:
    many = {n: [p.low, p.high] for n, p in CATALOGUE.items() if p.kind in ("float", "log")}
    with pytest.raises(ConfigError, match=f"at most {MAX_ACTIVE}"):
        parse_space(many)
