"""What was made from a file is known by the file's content: nothing is reused after a change under the same path."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpqsearch import artifacts, sources
from mpqsearch.config import config_from
from mpqsearch.errors import ConfigError, StaleArtifactError
from mpqsearch.metrics import FeatureExtractor, extractors
from mpqsearch.metrics.reference import save_reference
from mpqsearch.models import capture, save_calls
from mpqsearch.models.files import WEIGHTS
from mpqsearch.sampling import load_model
from mpqsearch.sources import FileDigests, model_files
from mpqsearch.stages import Run, allocations, evaluate, layers, profile
from mpqsearch.stages.preflight import check_sampling
from tests.support import tiny_unet

WEIGHT_FILE = f"{WEIGHTS}.safetensors"


def retrain(file: Path, key: str = "conv_in.weight") -> None:
    """Other weights in place: same names, same size, and even the same time of the last change."""
    before = file.stat()
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key] * 1.5}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a scheduler."""
    tiny_unet().save_pretrained(tmp_path / "model", safe_serialization=True)  # type: ignore[operator]
    DDPMScheduler().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def a_run(tmp_path: Path, model: Path, *, overwrite: bool = False, **settings: Any) -> Run:
    """The same command, given again."""
    config = config_from(
        {
            "model": {"source": str(model), "device": "cpu"},
            "policy": {"widths": [2, 4]},
            "sampler": {"steps": 2, "batch": 4},
            "quantizer": {"n_candidates": 8},
            "methods": [{"name": "ilp", "allocator": "ilp-layer", "loss": "output"}],
            "calibration": {
                "samples": 2,
                "probe_inputs": 2,
                "probes": 1,
                "sampler_seeds": 0,
                "schemes": ["asymmetric"],
            },
            "evaluate": {"samples": 4, "extractor": "own", **settings},
        }
    )
    return Run(config=config, folder=tmp_path / "run", overwrite=overwrite, say=lambda _text: None)


@pytest.fixture(autouse=True)
def own_extractor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An extractor whose weights are a file."""
    file = tmp_path / "extractor.safetensors"
    torch.manual_seed(0)
    save_file({"weight": torch.randn(6, 64)}, file, {"format": "pt"})

    def make(weights: Path | None, _device: torch.device) -> FeatureExtractor:
        layer = nn.Linear(64, 6, bias=False)
        layer.load_state_dict(load_file(weights or file))
        digest = artifacts.digest_of(layer.weight.tolist())
        return FeatureExtractor(name="own", dim=6, digest=digest, features=lambda x: flat(layer, x))

    def flat(layer: nn.Module, images: Tensor) -> Tensor:
        features: Tensor = layer(images.flatten(1).float() / 255)
        return features

    monkeypatch.setitem(extractors.EXTRACTORS, "own", make)
    return file


def everything(run: Run) -> tuple[str, list[Path]]:
    """Digest of the layers' model, and the files of metrics after all stages."""
    table = layers(run)
    measured = profile(run)
    assert measured is not None
    assert measured.model_digest == table.digest
    assert all(bit_map.model_digest == table.digest for _, _, bit_map, _ in allocations(run))
    evaluate(run)
    return table.digest, sorted(run.path("metrics").glob("*.json"))


def test_a_model_that_was_retrained_in_place_is_stale_and_made_again(tmp_path: Path, folder: Path) -> None:
    settings = {"extractor_weights": str(tmp_path / "extractor.safetensors")}
    first, metrics = everything(a_run(tmp_path, folder, **settings))
    times = {p: p.stat().st_mtime_ns for p in metrics}
    assert everything(a_run(tmp_path, folder, **settings)) == (first, metrics)
    assert times == {p: p.stat().st_mtime_ns for p in metrics}  # reused

    retrain(folder / WEIGHT_FILE)
    again = a_run(tmp_path, folder, **settings)
    with pytest.raises(StaleArtifactError, match=r"layers\.json was made from other inputs: model_files .*--overwrite"):
        layers(again)
    table = layers(a_run(tmp_path, folder, overwrite=True, **settings))
    assert table.digest == load_model(str(folder)).digest != first
    again.table = table
    with pytest.raises(StaleArtifactError, match=r"profile\.json was made from other inputs: model .*model_files"):
        profile(again)
    forced = a_run(tmp_path, folder, overwrite=True, **settings)
    layers(forced)
    measured = profile(forced)
    assert measured is not None
    again.profile = measured
    with pytest.raises(StaleArtifactError, match=r"allocation\.json was made from other inputs"):
        allocations(again)
    second, after = everything(a_run(tmp_path, folder, overwrite=True, **settings))
    assert second == table.digest
    assert len(after) == 2 * len(metrics)  # of other models, beside the old ones
    assert everything(a_run(tmp_path, folder, **settings)) == (second, after)


def test_a_scheduler_that_was_changed_in_place_is_another_model(tmp_path: Path, folder: Path) -> None:
    layers(a_run(tmp_path, folder))
    file = folder / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    with pytest.raises(StaleArtifactError, match="model_files"):
        layers(a_run(tmp_path, folder))


def test_a_model_that_only_moved_is_the_same(tmp_path: Path, folder: Path) -> None:
    table = layers(a_run(tmp_path, folder))
    moved = folder.rename(tmp_path / "elsewhere")
    assert layers(a_run(tmp_path, moved)) == table


def test_other_weights_of_the_extractor_measure_again(tmp_path: Path, folder: Path, own_extractor: Path) -> None:
    settings = {"extractor_weights": str(own_extractor)}
    run = a_run(tmp_path, folder, **settings)
    table = layers(run)
    measured = profile(run)
    assert measured is not None

    def distances() -> tuple[float, set[str]]:
        again = a_run(tmp_path, folder, **settings)
        again.table, again.profile = table, measured
        records = evaluate(again)
        (found,) = (r.metrics["fd_fp"].value for r in records if r.method == "ilp")
        return found, {p.name for p in run.path("metrics").iterdir()}

    before, files = distances()
    assert distances() == (before, files)
    retrain(own_extractor, "weight")
    after, more = distances()
    assert after == pytest.approx(1.5**2 * before, rel=1e-3)  # features are 1.5 times as large
    assert files < more


def test_the_extractor_follows_the_pictures_or_is_refused_before_anything_is_sampled(
    tmp_path: Path, folder: Path
) -> None:
    assert a_run(tmp_path, folder, extractor="auto").extractor.name == "random-conv"
    with pytest.raises(ConfigError, match=r"fmnist-cnn reads pictures \(1, 28, 28\) .* these are \(1, 8, 8\)"):
        check_sampling(a_run(tmp_path, folder, extractor="fmnist-cnn"), "an evaluation")


def test_references_and_recorded_calls_are_known_by_content(tmp_path: Path, folder: Path, own_extractor: Path) -> None:
    run = a_run(tmp_path, folder, reference=str(tmp_path / "reference.safetensors"))
    for seed in (0, 1):
        features = torch.randn(50, 6, generator=torch.Generator().manual_seed(seed))
        save_reference(tmp_path / "reference.safetensors", features, run.extractor, "data")
        digest = run.evaluation_inputs["reference"]
        assert digest == artifacts.digest_file(tmp_path / "reference.safetensors")
    calls = tmp_path / "calls.safetensors"
    recorded = Run(config=config_from({"calibration": {"captured": str(calls)}}), folder=tmp_path / "other")
    digests = {recorded.source_inputs["calls"]}  # absent
    for value in (1.0, 2.0):
        module = tiny_unet()
        with torch.no_grad(), capture(module) as made:
            module(torch.full((1, 1, 8, 8), value), torch.tensor(3), class_labels=torch.tensor([0]))
        save_calls(calls, made)
        digests.add(recorded.source_inputs["calls"])
    assert len(digests) == 3


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read."""
    names: list[str] = []
    digest: Callable[[Path], str] = artifacts.digest_file

    def read(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(sources.artifacts, "digest_file", read)
    return names


def test_a_file_that_did_not_change_is_read_once(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SETTLED_S", 0.0)
    file, record = tmp_path / "weights", tmp_path / "stats" / "digests.json"
    file.write_bytes(b"first")
    first = FileDigests(record).of(file)
    assert FileDigests(record).of(file) == first
    assert hashed == ["weights"]
    file.write_bytes(b"other")  # as long as before
    assert FileDigests(record).of(file) != first
    assert hashed == ["weights"] * 2
    record.write_text("{")
    assert FileDigests(record).of(file) != first
    file.unlink()
    assert FileDigests(record).of(file) == "absent"


def test_a_file_that_was_written_just_now_is_read_again(tmp_path: Path, hashed: list[str]) -> None:
    file, record = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"first")
    digests = FileDigests(record)
    assert digests.of(file) == digests.of(file)
    assert hashed == ["weights"] * 2  # a second write within the clock's tick would not show
    assert not record.exists()


def test_files_of_a_model_are_those_that_are_loaded(tmp_path: Path, folder: Path) -> None:
    assert model_files("owner/name") is None
    embedded = model_files("fmnist-unet")
    assert embedded is not None
    assert {"config.json", "denoiser.json", WEIGHT_FILE} <= embedded.keys()
    assert (model_files(str(folder)) or {}).keys() == {"config.json", "scheduler_config.json", WEIGHT_FILE}
    pipe = tmp_path / "pipe"
    for part in ("unet", "other", "text_encoder"):
        tiny_unet().save_pretrained(pipe / part, safe_serialization=True)  # type: ignore[operator]
    parts = {p: ["diffusers", "UNet2DModel"] for p in ("unet", "other", "text_encoder")}
    parts |= {"scheduler": ["diffusers", "DDPMScheduler"], "safety_checker": [None, None]}
    (pipe / "model_index.json").write_text(json.dumps(parts))
    (pipe / "scheduler").mkdir()
    (pipe / "scheduler" / "scheduler_config.json").write_text("{}")
    (pipe / "unet" / "old.bin").write_bytes(b"never loaded")
    (pipe / "sampler.json").write_text("{}")
    whole = {f"{part}/{file}" for part in ("unet", "other", "text_encoder") for file in ("config.json", WEIGHT_FILE)}
    for component in ("", "other"):
        files = model_files(str(pipe), component)
        assert files is not None
        assert files.keys() == {"model_index.json", "sampler.json", "scheduler/scheduler_config.json", *whole}


@pytest.mark.parametrize("component", ["", "unet_2"])
def test_weights_only_reads_the_component_that_is_named(tmp_path: Path, component: str) -> None:
    for seed, part in ((0, "unet"), (1, "unet_2")):
        tiny_unet(seed).save_pretrained(tmp_path / "pipe" / part)  # type: ignore[operator]
    DDPMScheduler().save_pretrained(tmp_path / "pipe" / "scheduler")
    index: dict[str, object] = {part: ["diffusers", "UNet2DModel"] for part in ("unet", "unet_2")}
    index |= {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    source = str(tmp_path / "pipe")
    settings = {"model": {"source": source, "component": component}, "calibration": {"weights_only": True}}
    run = Run(config=config_from(settings), folder=tmp_path / "run", say=lambda _text: None)
    assert layers(run).digest == load_model(source, component=component).digest
