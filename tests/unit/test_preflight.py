"""What is wrong is said before anything is measured, in the words of the user's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mpqsearch.config import config_from
from mpqsearch.core import LayerTable
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, ModelError, MpqsearchError, UnknownNameError
from mpqsearch.stages import Run, layers, prepare, profiling
from mpqsearch.stages.preflight import check_sampling, preflight, require_targets
from tests.support.pipelines import TINY

CALL = {"num_inference_steps": 2, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline folders by name, and a file of prompts."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name in ("StableDiffusionPipeline", "DiTPipeline", "WanPipeline", "StableAudioPipeline"):
        pipe, _ = TINY[name]()
        pipe.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("".join(f"boat {i}\n" for i in range(20)))
    return folder


def run_of(folders: Path, where: Path, name: str, **tables: Mapping[str, Any]) -> Run:
    """A run of a pipeline, with further settings by table."""
    data: dict[str, Any] = {
        "model": {"source": str(folders / name), "device": "cpu"},
        "sampler": {"call": CALL},
        "prompts": {"file": str(folders / "prompts.txt")},
        "evaluate": {"extractor": "random-conv"},
    }
    config = config_from({**data, **tables})
    return Run(config=config, folder=where, say=lambda _text: None)


@pytest.mark.parametrize(
    ("name", "tables", "error", "message"),
    [
        ("StableDiffusionPipeline", {"evaluate": {"extractor": "fmnist-cnn"}}, ConfigError, r"fmnist-cnn reads .*16"),
        ("StableDiffusionPipeline", {"prompts": {}}, ConfigError, "draws prompts: name a file of them"),
        ("StableDiffusionPipeline", {"sampler": {"call": {"hight": 16}}}, UnknownNameError, "did you mean 'height'"),
        ("StableDiffusionPipeline", {"allocate": {"budgets": ["0.5bit"]}}, InfeasibleBudgetError, "0.5bit allows"),
        ("StableDiffusionPipeline", {"allocate": {"budgets": ["17bit"]}}, ConfigError, "above full precision"),
        ("StableDiffusionPipeline", {"allocate": {"budgets": ["uniform:9"]}}, ConfigError, "must lie in 1..8 bits"),
        (
            "StableDiffusionPipeline",
            {"evaluate": {"scorers": ["clip:no/clip"]}},
            ModelError,
            r"no/clip.* has no config\.json",
        ),
        (
            "DiTPipeline",
            {"sampler": {}, "prompts": {}, "evaluate": {"scorers": ["clip:fmnist-clip"]}},
            ConfigError,
            "given none",
        ),
        (
            "DiTPipeline",
            {"sampler": {}, "prompts": {}, "evaluate": {"scorers": ["lpips:no.pth"]}},
            ModelError,
            "alexnet",
        ),
        (
            "StableDiffusionPipeline",
            {"evaluate": {"scorers": ["tests.unit.metrics.test_quality:one_number"]}},
            ConfigError,
            r"one_number.* must give a tensor \[1\] for one picture",
        ),
        ("DiTPipeline", {"sampler": {}, "prompts": {"classes": [3, 1000]}}, ConfigError, "class 1000 does not exist"),
        (
            "StableAudioPipeline",
            {"sampler": {"call": {"num_inference_steps": 2, "audio_end_in_s": 1.0}}, "search": {"trials": 3}},
            ConfigError,
            'search.error = "features"',
        ),
    ],
)
def test_nothing_is_measured_of_a_study_that_cannot_be_finished(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    tables: dict[str, Any],
    error: type[MpqsearchError],
    message: str,
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(profiling, "profile", measured)
    with pytest.raises(error, match=message):
        prepare(run_of(folders, tmp_path, name, **tables), "a study")
    assert {p.name for p in tmp_path.iterdir()} <= {"layers.json", "stats"}


def test_the_shape_of_pictures_is_known_before_there_are_any_and_then_without_the_model(
    folders: Path, tmp_path: Path
) -> None:
    shapes = {"StableDiffusionPipeline": (3, 16, 16), "DiTPipeline": (3, 16, 16), "WanPipeline": (9, 3, 16, 16)}
    calls = {"DiTPipeline": {}, "WanPipeline": {**CALL, "num_frames": 9}}
    for name, shape in shapes.items():
        prompts = {} if name == "DiTPipeline" else {"file": str(folders / "prompts.txt")}
        tables = {"sampler": {"call": calls.get(name, CALL)}, "prompts": prompts}
        table: LayerTable | None = None
        for again in (False, True):
            run = run_of(folders, tmp_path / name, name, **tables)
            found = layers(run)
            assert table in (None, found)
            table = found
            preflight(run, "a study")
            assert run.picture == shape
            assert ("denoiser" in run.__dict__) is not again


def test_sound_is_measured_without_pictures(folders: Path, tmp_path: Path) -> None:
    sampler = {"call": {"num_inference_steps": 2, "audio_end_in_s": 1.0}}
    run = run_of(folders, tmp_path, "StableAudioPipeline", sampler=sampler)
    check_sampling(run, "a study")
    assert run.picture is None


def test_encoded_prompts_and_settings_of_the_call_are_part_of_what_was_made(folders: Path, tmp_path: Path) -> None:
    first = run_of(folders, tmp_path, "StableDiffusionPipeline")
    inputs = first.source_inputs
    assert run_of(folders, tmp_path, "StableDiffusionPipeline").source_inputs == inputs
    larger = run_of(folders, tmp_path, "StableDiffusionPipeline", sampler={"call": {**CALL, "height": 32}})
    assert {k for k, v in larger.source_inputs.items() if inputs[k] != v} == {"model_settings"}
    other = folders / "other.txt"
    other.write_text("".join(f"tree {i}\n" for i in range(20)))
    asked = run_of(folders, tmp_path, "StableDiffusionPipeline", prompts={"file": str(other)})
    assert {k for k, v in asked.source_inputs.items() if inputs[k] != v} == {"prompts"}
    layers(first)
    (kept,) = tmp_path.glob("stats/prompts-*")
    assert list(kept.glob("*.safetensors"))


def test_a_target_that_is_not_installed_is_missed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpqsearch.export import get_exporter

    run = Run(config=config_from({"export": {"targets": ["neutral", "quanto"]}}), folder=tmp_path)
    monkeypatch.setattr(type(get_exporter("quanto")), "imports", ("no_such_library",))
    with pytest.raises(ConfigError, match="no_such_library is not installed. Run: pip install"):
        require_targets(run)
