"""The study that `mpqsearch init` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mpqsearch.cli import app
from mpqsearch.cli.init import PROMPTS, preset_for, presets, study_for
from mpqsearch.config import load_config
from mpqsearch.core import Policy
from mpqsearch.errors import ConfigError
from mpqsearch.export.names import tied
from mpqsearch.models.discover import table_of
from mpqsearch.models.runner import Parts
from mpqsearch.sources import EMBEDDED, REFERENCE


@pytest.mark.parametrize("source", [*EMBEDDED, "owner/name"])
def test_a_study_of_any_source_can_be_loaded_as_it_is_and_with_its_examples(source: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(study_for(source))
    study = load_config(path)
    assert (study.model.source, study.sampler.batch, study.evaluate.samples) == (source, 8, 128)
    path.write_text(re.sub(r"^# (\w+ = )", r"\1", path.read_text(), flags=re.MULTILINE))
    with_examples = load_config(path)
    assert with_examples.prompts.file == "prompts.txt"
    assert with_examples.sampler.call == {"height": 512, "width": 512}


def test_a_pipeline_for_text_without_prompts_of_its_own_is_given_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("model_index.json", "unet", "vae", "scheduler", "tokenizer", "text_encoder"):
        (folder / name).symlink_to(REFERENCE / "fmnist-t2i" / name)
    text = study_for(str(folder))
    assert "StableDiffusionPipeline" in text
    assert '\nfile = "prompts.txt"\n' in text
    assert '\n# file = "prompts.txt"\n' in study_for("fmnist-t2i")


def folder_like(preset: dict[str, Any], folder: Path) -> Path:
    """The configurations by which a preset is found, and the components that say that prompts are needed."""
    files: dict[str, dict[str, Any]] = {"model_index": {"_class_name": preset["pipeline"]}}
    for key, value in preset.get("when", {}).items():
        file, inner = key.split(".")
        files.setdefault(file, {})[inner] = value
    part = "unet" if preset["denoiser"].startswith("UNet") else "transformer"
    files["model_index"] |= {part: ["diffusers", preset["denoiser"]], "tokenizer": ["transformers", "T5Tokenizer"]}
    files.setdefault(part, {})
    for name, content in files.items():
        inside = folder if name == "model_index" else folder / name
        inside.mkdir(exist_ok=True, parents=True)
        kind = "scheduler_config" if name == "scheduler" else "config"
        (inside / f"{name if name == 'model_index' else kind}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("preset", presets()["preset"], ids=lambda preset: preset["name"])
def test_a_preset_is_found_by_its_class_and_goes_into_a_study_that_loads(
    preset: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder_like(preset, tmp_path / "mine")
    assert preset_for(folder) == preset
    app(["init", "mine"], standalone_mode=False)
    assert f"Preset {preset['name']}:" in capsys.readouterr().out
    study = load_config(tmp_path / "mine.toml")
    asked = preset["study"]
    assert (study.sampler.steps, study.sampler.guidance) == (asked["sampler.steps"], asked.get("sampler.guidance"))
    assert study.sampler.call == asked["sampler.call"]
    assert dict(study.policy.overrides) == asked["policy.overrides"]
    assert list(study.export.targets) == asked["export.targets"]
    assert study.prompts.file == PROMPTS
    assert len((tmp_path / PROMPTS).read_text().splitlines()) == len(set(presets()["prompts"])) >= 32
    (folder / "sampler.json").write_text("{}")
    assert preset_for(folder) is None, "the folder itself says how it is drawn"


@pytest.mark.parametrize("preset", presets()["preset"], ids=lambda preset: preset["name"])
def test_what_a_preset_says_of_layers_holds_for_the_class_of_diffusers(preset: dict[str, Any]) -> None:
    import diffusers
    import torch

    denoiser = getattr(diffusers, preset["denoiser"], None)
    if denoiser is None:
        pytest.skip(f"this diffusers has no {preset['denoiser']}")
    siblings = [p for p in presets()["preset"] if p["pipeline"] == preset["pipeline"] and "shapes" in p]
    shape = next(iter(siblings[0]["shapes"].values()))
    with torch.device("meta"):
        module = denoiser(**shape)
        if preset["name"] == "Wan 2.2 A14B":
            module = Parts({"transformer": module, "transformer_2": denoiser(**shape)})
    table = table_of(module, [], name=preset["name"])
    study = preset["study"]
    policy = Policy(overrides=study["policy.overrides"], groups=study.get("policy.groups", {}))
    policy.check(table)
    kept = [layer for layer in table if policy.fixed_width(layer) == 16]
    assert sum(layer.n_weights for layer in kept) < 0.03 * sum(layer.n_weights for layer in table)
    assert {layer.role for layer in table if layer.role in ("first", "last")} <= {layer.role for layer in kept}
    published = any("to_q" in name for group in tied(table) for name in group)
    assert bool(study.get("policy.groups")) == published, "fused where the published checkpoint has one tensor"


def test_keys_and_shapes_of_presets_are_known_and_each_model_is_in_one_of_them() -> None:
    for preset in presets()["preset"]:
        assert preset.keys() <= {"name", "pipeline", "when", "denoiser", "study", "shapes"}
        assert preset["study"].keys() <= {
            "sampler.steps", "sampler.guidance", "sampler.call", "policy.overrides", "policy.groups", "export.targets",
        }  # fmt: skip
        rest = [p for p in presets()["preset"] if p["pipeline"] == preset["pipeline"]]
        assert all("when" in p for p in rest[:-1]), "the last of a class may take all, those before may not"


def test_a_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app(["init", "fmnist-unet"], standalone_mode=False)
    written = (tmp_path / "fmnist-unet.toml").read_text()
    with pytest.raises(ConfigError, match="exists already"):
        app(["init", "fmnist-unet"], standalone_mode=False)
    assert (tmp_path / "fmnist-unet.toml").read_text() == written
