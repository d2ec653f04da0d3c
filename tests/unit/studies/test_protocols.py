"""Each protocol of studies/protocols draws and measures a tiny model of its class; only paths and counts are others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpqsearch.config import load_config
from mpqsearch.metrics.lpips import alexnet
from mpqsearch.stages import Run, layers
from mpqsearch.stages.preflight import preflight
from mpqsearch.stages.references import full_record
from tests.support.pipelines import TINY
from tests.support.pipelines.unets import ldm, text_unet

PROTOCOLS = Path(__file__).parents[3] / "studies/protocols"


@dataclass(frozen=True)
class Tiny:
    """A tiny model for a protocol: its pipeline, the size of its pictures if they have any, and its file of prompts."""

    pipeline: str
    size: int = 0
    prompts: Any = None


CAPTIONS = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(40)],
    "annotations": [{"image_id": i, "id": i, "caption": f"boat {i}"} for i in range(40)],
}
MJHQ = {f"name{i}": {"category": "art", "prompt": f"boat {i}"} for i in range(40)}
GENEVAL = "\n".join(json.dumps({"tag": "single_object", "prompt": f"a photo of a boat {i}"}) for i in range(40))

MODELS = {
    "ldm4-imagenet": Tiny(""),
    "lsun-bedroom": Tiny("LDMPipeline"),
    "dit-xl-2": Tiny("DiTPipeline"),
    "sd15-coco": Tiny("StableDiffusionPipeline", 32, CAPTIONS),
    "mjhq-svdquant": Tiny("FluxPipeline", 32, MJHQ),
    "few-step-klein": Tiny("Flux2KleinPipeline", 32, GENEVAL),
}


def test_every_protocol_has_a_tiny_model() -> None:
    assert {path.stem for path in PROTOCOLS.glob("*.toml")} == {*MODELS, "lsun-church"}
    assert load_config(PROTOCOLS / "lsun-church.toml").sampler.steps == 500  # as lsun-bedroom otherwise


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of layers as LPIPS reads them; their values are random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({f"features.{k}": v for k, v in alexnet()[0].state_dict().items()}, path)
    return path


def class_ldm(folder: Path) -> None:
    pipe = ldm()
    text_unet(16, in_channels=3, out_channels=3).save_pretrained(folder / "unet")
    pipe.vqvae.save_pretrained(folder / "vqvae")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    save_file({"weight": torch.randn(11, 16)}, folder / "classes.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_a_protocol_runs(name: str, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, study = MODELS[name], PROTOCOLS / f"{name}.toml"
    meant = load_config(study)
    changes: dict[str, Any] = {"model.device": "cpu", "model.dtype": "float32", "allocate.budgets": ["uniform:4"]}
    changes |= {"evaluate.samples": 3, "evaluate.extractor": "random-conv"}
    changes |= dict.fromkeys(("evaluate.extractor_weights", "evaluate.reference"), "")
    changes |= {"evaluate.scorers": [near(text, weights) for text in meant.evaluate.scorers]}
    if model.pipeline:
        pipe, call = TINY[model.pipeline]()
        pipe.save_pretrained(tmp_path / "model")
        changes |= {"model.source": str(tmp_path / "model"), "sampler.steps": 2, "sampler.batch": 2}
        own = {k: v for k, v in call.items() if k not in ("num_inference_steps", "guidance_scale", "output_type")}
        size = dict.fromkeys(("height", "width"), model.size) if model.size else {}
        changes |= {"sampler.call": {**own, **meant.sampler.call, **size}}
    else:
        class_ldm(tmp_path)
        monkeypatch.setenv("LDM4_IMAGENET", str(tmp_path))
    if model.prompts is not None:
        prompts = tmp_path / Path(meant.prompts.file).name
        prompts.write_text(model.prompts if isinstance(model.prompts, str) else json.dumps(model.prompts))
        changes |= {"prompts.file": str(prompts), "prompts.report": min(meant.prompts.report, 20)}
    if meant.prompts.calibration_file:
        (tmp_path / "coco.txt").write_text("a cat\na dog\na bird\na fish\na cow\n")
        changes |= {"prompts.calibration_file": str(tmp_path / "coco.txt")}
    run = Run(config=load_config(study, settings=changes), folder=tmp_path / "run", say=lambda _: None)
    layers(run)
    preflight(run, "a protocol")
    record = full_record(run)
    assert record.n_samples == 3
    assert ("clip_score" in record.metrics) == any(text.startswith("clip:") for text in meant.evaluate.scorers)
    assert run.picture is not None
    assert run.picture[0] == 3


def near(text: str, weights: Path) -> str:
    """A scorer with a file that is here."""
    name = text.partition(":")[0]
    return {"ssim": text, "lpips": f"lpips:{weights}"}.get(name, f"{name}:fmnist-clip")
