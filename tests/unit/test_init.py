"""The study that `mpqsearch init` writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpqsearch.cli import app
from mpqsearch.cli.init import study_for
from mpqsearch.config import load_config
from mpqsearch.errors import ConfigError
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


def test_a_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app(["init", "fmnist-unet"], standalone_mode=False)
    written = (tmp_path / "fmnist-unet.toml").read_text()
    with pytest.raises(ConfigError, match="exists already"):
        app(["init", "fmnist-unet"], standalone_mode=False)
    assert (tmp_path / "fmnist-unet.toml").read_text() == written
