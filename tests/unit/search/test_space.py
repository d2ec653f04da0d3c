from __future__ import annotations

import optuna
import pytest

from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.search.space import MAX_ACTIVE, PARAMETERS, parse_space


def test_every_parameter_has_a_meaning_and_a_default_it_may_take() -> None:
    for p in PARAMETERS.values():
        assert len(p.meaning) > 20
        assert p.default in p.choices if p.kind == "choice" else p.low <= p.default <= p.high


def test_a_list_makes_active_and_a_value_freezes() -> None:
    space = parse_space({"granularity": ["layer", "channel"], "exponent": [0.5, 2], "scheme": "auto", "depth": 2})
    assert [p.name for p in space.active] == ["exponent", "granularity"]
    assert space.frozen == {"depth": 2.0, "scheme": "auto"}
    assert parse_space(space.to_data()) == space


def test_suggestions_lie_in_the_declared_ranges() -> None:
    space = parse_space({"exponent": [0.5, 2.0], "role_conv": [0.1, 10.0], "scheme": ["auto", "asymmetric"]})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [space.suggest(study.ask()) for _ in range(60)]
    assert all(0.5 <= theta["exponent"] <= 2 and 0.1 <= theta["role_conv"] <= 10 for theta in seen)
    assert {theta["scheme"] for theta in seen} == {"auto", "asymmetric"}
    assert sum(theta["role_conv"] < 1 for theta in seen) > 15  # by its logarithm: half of them lie below 1


def test_the_starting_points_are_the_plain_program_and_each_choice_alone() -> None:
    space = parse_space({"exponent": [1.5, 2.0], "granularity": ["base", "layer"], "rounding": ["base", "gptq"]})
    plain = {"exponent": 1.5, "granularity": "base", "rounding": "base"}
    assert space.starts() == [plain, {**plain, "granularity": "layer"}, {**plain, "rounding": "gptq"}]


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ({"exponet": [0.5, 2.0]}, "exponent"),
        ({"exponent": [2.0, 0.5]}, "low must be below high"),
        ({"exponent": [0.5, 200.0]}, "must lie in"),
        ({"exponent": "high"}, "should be a number"),
        ({"exponent": True}, "should be a number"),
        ({"exponent": [1, 2, 3]}, "is a range"),
        ({"scheme": ["auto", "gauss"]}, "gauss"),
        ({"end_bits": True}, "value of search.space.end_bits"),
        ({"granularity": ["layer", "layer"]}, "distinct"),
        ({"granularity": []}, "distinct"),
    ],
)
def test_a_wrong_declaration_says_what_is_wrong(declared: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_space(declared)


def test_an_unknown_parameter_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'kurtosis'"):
        parse_space({"kurtois": 1.0})


def test_too_many_active_parameters_are_refused() -> None:
    many = {n: [p.low, p.high] for n, p in PARAMETERS.items() if p.kind in ("float", "log")}
    with pytest.raises(ConfigError, match=f"at most {MAX_ACTIVE}"):
        parse_space(many)
