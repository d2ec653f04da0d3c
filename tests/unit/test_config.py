from __future__ import annotations

from pathlib import Path

import pytest

from mpqsearch.config import Config, config_from, load_config
from mpqsearch.errors import ConfigError, UnknownNameError

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
        ({"model": {"sorce": "x"}}, r"unknown key 'model\.sorce' \(did you mean 'source'\?\)"),
        ({"evaluate": {"samples": "many"}}, r"evaluate\.samples should be int, got 'many'"),
        ({"evaluate": {"samples": True}}, r"evaluate\.samples should be int"),
        ({"evaluate": {"samples": 1}}, "at least 2"),
        ({"policy": {"widths": [2, 99]}}, "widths"),
        ({"policy": {"widths": 2}}, r"policy\.widths should be a list"),
        ({"policy": {"roles": {"konv": 8}}}, "did you mean 'conv'"),
        ({"policy": {"roles": {"conv": "8"}}}, r"policy\.roles\.conv should be int"),
        ({"allocate": {"budgets": ["3 pounds"]}}, "cannot read the budget"),
        ({"methods": [{"name": "a", "allocator": "ilp"}]}, "unknown allocator 'ilp'"),
        ({"methods": [{"allocator": "uniform"}]}, r"\[methods\[0\]\].*'name'"),
        ({"methods": []}, "at least one"),
        ({"methods": [{"name": "a", "allocator": "uniform"}] * 2}, "distinct names"),
        ({"report": {"chosen": "nothing"}}, "unknown method 'nothing'"),
    ],
)
def test_mistakes_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        config_from(data)


def test_overrides_take_toml_values_and_bare_words(tmp_path: Path) -> None:
    config = load_config(None, ["evaluate.samples=16", "model.source=fmnist-dit", "policy.widths=[2, 4]", "policy.roles.time=8"])
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
