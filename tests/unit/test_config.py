from __future__ import annotations

from pathlib import Path

import pytest

from mpqsearch.config import Config, config_from, load_config
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.export import get_exporter
from mpqsearch.specs.targets import TARGETS

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda p: p.stem)
def test_presets_read_and_write_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "again.toml"
    again.write_text(config.to_toml())
    assert load_config(again) == config


def test_defaults_write_back(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(Config().to_toml())
    assert load_config(tmp_path / "d.toml") == Config() == load_config(None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"modell": {}}, r"unknown key 'modell' \(did you mean 'model'\?\)"),
        ({"model": {"sorce": "x"}}, r"model holds the unknown key 'sorce' \(did you mean 'source'\?\)"),
        ({"evaluate": {"samples": "many"}}, r"evaluate\.samples should be int, got 'many'"),
        ({"evaluate": {"samples": True}}, r"evaluate\.samples should be int"),
        ({"evaluate": {"samples": 1}}, "at least 2"),
        ({"policy": {"widths": [2, 99]}}, "widths"),
        ({"policy": {"widths": 2}}, r"policy\.widths should be a list"),
        ({"policy": {"roles": {"konv": 8}}}, "did you mean 'conv'"),
        ({"policy": {"roles": {"conv": "8"}}}, r"policy\.roles\.conv should be int"),
        ({"allocate": {"budgets": ["3 pounds"]}}, "cannot read the budget"),
        ({"methods": [{"name": "a", "allocator": "ilp"}]}, "unknown allocator 'ilp'"),
        ({"methods": [{"allocator": "uniform"}]}, r"methods\[0\] lacks the key 'name'"),
        ({"methods": []}, "at least one"),
        ({"methods": [{"name": "a", "allocator": "uniform"}] * 2}, "distinct names"),
        ({"report": {"chosen": "nothing"}}, "unknown method 'nothing'"),
        ({"export": {"targets": ["ggfu"]}}, "did you mean 'gguf'"),
        ({"search": {"sampler": "tpee"}}, r"did you mean 'tpe'.*search\.sampler"),
        ({"search": {"pruner": "hedge"}}, r"unknown pruner of the search 'hedge'"),
    ],
)
def test_mistakes_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        config_from(data)


def test_overrides_take_toml_values_and_bare_words(tmp_path: Path) -> None:
    config = load_config(
        None, ["evaluate.samples=16", "model.source=fmnist-dit", "policy.widths=[2, 4]", "policy.roles.time=8"]
    )
    assert (config.evaluate.samples, config.model.source, config.policy.widths) == (16, "fmnist-dit", (2, 4))
    assert config.policy.roles == {"time": 8}
    for bad in ("samples=3", "evaluate.samples", "=3"):
        with pytest.raises(ConfigError, match="table.key=value"):
            load_config(None, [bad])
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="no valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_text_of_any_language_and_infinity_survive(tmp_path: Path) -> None:
    config = config_from({"report": {"title": "Größe \U0001f600 \x7f"}, "distill": {"clip_norm": float("inf")}})
    path = tmp_path / "again.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(path) == config


def test_files_of_other_editors(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf[report]\ntitle = 'x'\n")
    assert load_config(tmp_path / "bom.toml").report.title == "x"
    (tmp_path / "utf16.toml").write_text("[report]\n", encoding="utf-16")
    with pytest.raises(ConfigError, match="utf16.toml is not text in UTF-8"):
        load_config(tmp_path / "utf16.toml")


def test_every_target_of_the_configuration_has_an_exporter_of_its_name() -> None:
    assert all(get_exporter(name).name == name for name in TARGETS)


def test_a_search_is_checked_when_it_is_read() -> None:
    method = [{"name": "ilp", "allocator": "ilp-layer"}, {"name": "found", "allocator": "search"}]
    good = config_from(
        {"methods": method, "search": {"trials": 5, "space": {"exponent": [0.5, 2.0], "scheme": "auto"}}}
    )
    assert good.search.space["exponent"] == [0.5, 2.0]
    for bad, text in (
        ({"methods": method}, "set search.trials"),
        ({"search": {"first_seed": 100}}, "from search.first_seed on must lie in 4000000"),
        ({"evaluate": {"first_seed": 999_900}}, "999900..1000027 from evaluate.first_seed on must lie in 0..999999"),
        ({"calibration": {"first_seed": 2_000_000}}, "must lie in 1000000..1999999, those of the calibration"),
        ({"distill": {"check_seed": 0}}, "Move distill.check_seed"),
        ({"search": {"trials": -1}}, "trials must be at least 0"),
        ({"search": {"chunk": 40}}, "search.chunk"),
        ({"search": {"method": "nobody"}}, "search.method"),
        ({"search": {"space": {"exponent": [3.0, 1.0]}}}, "low must be below high"),
        ({"search": {"error": "fid"}}, r"unknown error of the search 'fid'"),
        ({"search": {"top_k": 0}}, "top_k must be at least 1"),
        ({"search": {"budgets": ["three"]}}, "cannot read the budget"),
    ):
        with pytest.raises(ConfigError, match=text):
            config_from(bad)
    assert config_from({"search": {"first_seed": 4_000_128}}).search.first_seed == 4_000_128


def test_a_search_space_survives_being_written(tmp_path: Path) -> None:
    config = config_from(
        {"search": {"trials": 3, "space": {"role_feed-forward": [0.5, 2.0], "depth": 1, "scheme": ["base", "auto"]}}}
    )
    path = tmp_path / "again.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == config
