"""Model folders that are damaged, or made to do harm: a message in seconds, in bounded memory, and no code is run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpqsearch.errors import MpqsearchError
from mpqsearch.models import open_streamed
from mpqsearch.models.loader import load_part, load_pipeline
from mpqsearch.sampling import load_model
from tests.support.pipelines import TINY
from tests.support.tiny import tiny_unet

FILE = "diffusion_pytorch_model.safetensors"
Harm = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_unet(0).save_pretrained(folder)
    return folder


def config(name: str = "config.json", **changes: Any) -> Harm:
    def harm(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return harm


def text(name: str, content: str | bytes) -> Harm:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def weights(header: Any, *, tail: bytes = b"\0" * 64) -> Harm:
    raw = json.dumps(header).encode()
    return text(FILE, struct.pack("<Q", len(raw)) + raw + tail)


def cut(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100])


def lacking(key: str = "conv_in.weight", name: str = FILE) -> Harm:
    def harm(folder: Path) -> None:
        tensors = load_file(folder / name)
        del tensors[key]
        save_file(tensors, folder / name, {"format": "pt"})

    return harm


def pipe(folder: Path) -> None:
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


def shards(names: Any) -> Harm:
    def harm(folder: Path) -> None:
        (folder / FILE).rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
        (folder / f"{FILE}.index.json").write_text(json.dumps(names))

    return harm


def loop(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(folder / FILE)


HARM: dict[str, tuple[Harm, str]] = {
    "a billion layers": (config(layers_per_block=10**9), "modules|cannot build"),
    "a million blocks": (
        config(down_block_types=["DownBlock2D"] * 10**5, up_block_types=["UpBlock2D"] * 10**5,
               block_out_channels=[8] * 10**5),
        "modules|cannot build",
    ),
    "a wide layer": (config(block_out_channels=[2**40, 2**40]), "shape|cannot build"),
    "another class": (config(_class_name="AutoPipelineForText2Image"), "no model of diffusers"),
    "a pipeline's class": (config(_class_name="DiffusionPipeline"), "no model of diffusers"),
    "a function's name": (config(_class_name="__builtins__"), "no model of diffusers"),
    "a class that is a list": (config(_class_name=["pipeline", "MyPipe"]), "no model of diffusers"),
    "wrong types": (config(block_out_channels="many"), "cannot build"),
    "deep": (text("config.json", "[" * 100_000), "deeper than"),
    "no object": (text("config.json", "[]"), "should be a table"),
    "two keys": (text("config.json", '{"a": 1, "a": 2}'), "twice"),
    "no text": (text("config.json", b"\xff\xfe\x00"), "no valid JSON"),
    "cut off": (cut, "damaged"),
    "a header of 2^60 bytes": (text(FILE, struct.pack("<Q", 2**60)), "damaged"),
    "an offset behind the end": (
        weights({"conv_in.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**12]}}), "damaged"
    ),
    "a shape of 10^18": (
        weights({"conv_in.weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 64]}}), "damaged"
    ),
    "a negative offset": (
        weights({"conv_in.weight": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}), "damaged"
    ),
    "a missing key": (lacking(), "lack 1 keys"),
    "a pipe": (pipe, "is no file|holds no"),
    "a link to itself": (loop, "is no file|holds no|damaged"),
    "a missing shard": (shards({"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}), "shards"),
    "a shard elsewhere": (shards({"weight_map": {"a": "../../etc/passwd"}}), "names a file"),
    "shards of no kind": (shards({"weight_map": [1, 2]}), "weight_map should be a table"),
    "no index": (shards([]), "should be a table"),
}  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("name", HARM)
@pytest.mark.parametrize("opened", ["loaded", "streamed"])
def test_a_harmful_folder_ends_in_a_message(name: str, opened: str, whole: Path, tmp_path: Path) -> None:
    harm, message = HARM[name]
    folder = tmp_path / "m"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    harm(folder)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MpqsearchError, match=message):
        if opened == "loaded":
            load_part(folder, dtype="float32", device=torch.device("cpu"))
        else:
            open_streamed(str(folder))
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5e6  # kB


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    TINY["StableDiffusionPipeline"]()[0].save_pretrained(folder)
    return folder


def endless(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to("/dev/zero")


ENCODER, KEY = "text_encoder/config.json", "embeddings.position_embedding.weight"
PARTS: dict[str, tuple[Harm, str]] = {
    "a billion layers of text": (config(ENCODER, num_hidden_layers=10**9), "far more modules"),
    "a wide text encoder": (config(ENCODER, hidden_size=2**34), "far more values"),
    "a key of the text encoder": (lacking(KEY, "text_encoder/model.safetensors"), "lack 1 keys"),
    "a billion layers to decode": (config("vae/config.json", layers_per_block=10**9), "far more modules"),
    "a key of the decoder": (lacking("decoder.conv_in.bias", f"vae/{FILE}"), "lack 1 keys"),
    "a configuration without end": (endless, "is no file"),
    "a tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer is no folder"),
    "a billion timesteps": (config("scheduler/scheduler_config.json", num_train_timesteps=10**9), "should be 1..1,0"),
    "a call of a list": (text("sampler.json", '{"call": [1]}'), "call should be a table"),
}


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("name", PARTS)
def test_a_harmful_component_of_a_pipeline_ends_in_a_message(name: str, pipeline: Path, tmp_path: Path) -> None:
    harm, message = PARTS[name]
    shutil.copytree(pipeline, tmp_path / "p")
    harm(tmp_path / "p")
    began = time.process_time()
    with pytest.raises(MpqsearchError, match=message):
        load_model(str(tmp_path / "p")).runner.examples(nn.Identity())
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["pipeline", "MyPipe"], "unet": ["diffusers", "UNet2DModel"]},
        {"_class_name": "DDPMPipeline", "unet": ["diffusers", "DiffusionPipeline"]},
        {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["pipeline", "MyScheduler"]},
        {"_class_name": "DDPMPipeline", "../unet": ["diffusers", "UNet2DModel"], "unet": ["diffusers", "UNet2DModel"]},
        {"_class_name": "DiffusionPipeline", "unet": ["diffusers", "UNet2DModel"]},
    ],
)
def test_a_folder_runs_no_code_of_its_own(index: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for file in whole.iterdir():
        (tmp_path / "unet" / file.name).write_bytes(file.read_bytes())
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("pipeline.py", "unet/pipeline.py", "unet/unet.py", "unet/MyPipe.py"):
        (tmp_path / name).write_text(code)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(MpqsearchError):
        load_pipeline("p", tmp_path, dtype="float32", device=torch.device("cpu")).open({})
    assert not (tmp_path / "ran").exists()
