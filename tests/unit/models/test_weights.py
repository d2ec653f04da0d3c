"""Models on disk: the same structure, digest and weights as the loaded model, without loading it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpqsearch.errors import ModelError, NumericsError, UnknownNameError
from mpqsearch.models import discover, discover_streamed, open_streamed
from mpqsearch.sampling import adapt, load_model
from tests.support.tiny import tiny_dit, tiny_unet

FILE = "diffusion_pytorch_model.safetensors"


def write(folder: Path, kind: str = "unet", dtype: torch.dtype = torch.float32, shard: str = "10GB") -> Path:
    model = (tiny_unet if kind == "unet" else tiny_dit)()
    model.to(dtype).save_pretrained(folder, safe_serialization=True, max_shard_size=shard)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("name", ["fmnist-unet", "fmnist-dit"])
def test_streamed_discovery_is_that_of_the_loaded_model(name: str) -> None:
    assert discover_streamed(open_streamed(name)) == discover(load_model(name))


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard", ["10GB", "10KB"])
def test_layers_digest_and_weights_by_dtype_and_shard(
    tmp_path: Path, kind: str, dtype: torch.dtype, shard: str
) -> None:
    folder = write(tmp_path / "m", kind, dtype, shard)
    shards = len(list(folder.glob("*.safetensors")))
    assert shards == 1 if shard == "10GB" else shards > 1
    streamed, loaded = open_streamed(str(folder)), load_model(str(folder))
    seen: list[tuple[int, int]] = []
    table = discover_streamed(streamed, progress=lambda _label, done, total: seen.append((done, total)))
    assert table == discover(loaded)
    assert seen[-1][0] == seen[-1][1] == sum(p.numel() for p in loaded.module.state_dict().values()) * dtype.itemsize
    assert streamed.n_bytes == seen[-1][1]
    for key, value in loaded.module.state_dict().items():
        read = streamed.read(key)
        assert read.dtype == dtype
        assert torch.equal(read.float(), value)
    assert all(p.is_meta for p in streamed.module.parameters())


def test_the_component_of_a_pipeline_is_streamed(tmp_path: Path) -> None:
    for seed, part in ((0, "unet"), (1, "unet_2")):
        tiny_unet(seed).save_pretrained(tmp_path / "pipe" / part)  # type: ignore[operator]
    unet, kind = ["diffusers", "UNet2DModel"], {"_class_name": "DDPMPipeline"}
    parts = kind | {"unet": unet, "unet_2": unet, "vae": [None, None]}
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps(parts))
    source = str(tmp_path / "pipe")
    for part in ("", "unet", "unet_2"):
        streamed = open_streamed(source, component=part)
        assert streamed.name == "pipe"
        assert streamed.digest() == load_model(source, component=part).digest
    assert open_streamed(source, component="unet_2").digest() == adapt(tiny_unet(1), sample_shape=(1, 8, 8)).digest
    with pytest.raises(UnknownNameError, match="did you mean 'unet_2'"):
        open_streamed(source, component="unet_3")
    index.write_text(json.dumps(kind | {"prior": unet}))  # as pipelines of Kandinsky and Würstchen
    (tmp_path / "pipe" / "unet").rename(tmp_path / "pipe" / "prior")
    assert open_streamed(source).digest() == load_model(source).digest
    index.write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(UnknownNameError, match="unet/transformer/prior/decoder"):
        open_streamed(source)
    with pytest.raises(ModelError, match="no pipeline"):
        open_streamed(f"{source}/prior", component="unet")


def test_a_structure_that_does_not_run_keeps_shapes_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "m")
    streamed = open_streamed(str(folder))
    full = discover_streamed(streamed)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError("no meta kernel")

    streamed.module.forward = refuse  # type: ignore[method-assign, assignment]
    table = discover_streamed(streamed)
    assert "MACs are 0" in caplog.text
    assert {la.name for la in table} == {la.name for la in full}
    assert all(la.macs == 0 for la in table)
    assert [la.role for la in table if la.role in ("first", "last")] == ["first", "last"]
    assert all(la.weight_shape == full[la.name].weight_shape for la in table)
    assert table.digest == full.digest


def test_shared_parameters_are_read_from_the_one_that_is_stored(tmp_path: Path) -> None:
    streamed = open_streamed(str(write(tmp_path / "m")))
    module = streamed.module
    key = "down_blocks.0.resnets.0.conv2.weight"
    other = "up_blocks.1.resnets.0.conv2.weight"
    assert module.get_parameter(key).shape == module.get_parameter(other).shape
    module.get_submodule(other[:-7]).weight = module.get_parameter(key)
    tensors = load_file(tmp_path / "m" / FILE)
    del tensors[other]
    save_file(tensors, tmp_path / "m" / FILE)
    from mpqsearch.models.files import weight_files
    from mpqsearch.models.weights import _placed

    places = dict(_placed(tmp_path / "m", module, weight_files(tmp_path / "m").tensors()))
    assert places[other] == places[key]
    shared = replace(streamed, stored=places)
    assert torch.equal(shared.read(other), tensors[key])
    assert shared.n_bytes == sum(t.nbytes for t in tensors.values())


Refusal = Callable[[str], object]


@pytest.mark.parametrize("opened", [open_streamed, load_model])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path, opened: Refusal) -> None:
    folder = write(tmp_path / "m")
    tensors = load_file(folder / FILE)

    def refused(match: str, error: type[Exception] = ModelError, **changed: Tensor) -> None:
        save_file({**tensors, **changed}, folder / FILE, {"format": "pt"})
        with pytest.raises(error, match=match):
            opened(str(folder))

    refused(r"conv_in\.weight.* shape", **{"conv_in.weight": torch.zeros(8, 2, 3, 3)})
    for dtype, name in ((torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")):
        codes = torch.zeros(8, 1, 3, 3, dtype=dtype)
        refused(f"'conv_in.weight' is stored as {name}.*quantized already.*checkpoint", **{"conv_in.weight": codes})
    refused("quantized already: they come with 'conv_in.weight_scale'", **{"conv_in.weight_scale": torch.ones(1)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    refused("quantized already .by torchao.")


@pytest.mark.parametrize("opened", [open_streamed, load_model])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.diffusion_model.", "unet."])
def test_keys_that_are_missing_are_named_with_their_likely_prefix(tmp_path: Path, opened: Refusal, prefix: str) -> None:
    folder = write(tmp_path / "m")
    tensors = load_file(folder / FILE)
    key = "mid_block.attentions.0.to_q.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, folder / FILE, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"lack 1 keys of the configured model, such as {re.escape(key)}.*incomplete"):
        opened(str(folder))
    save_file({prefix + k: v for k, v in tensors.items()}, folder / FILE, {"format": "pt"})
    match = rf"lack {len(tensors)} keys .*under the prefix '{re.escape(prefix)}'"
    with pytest.raises(ModelError, match=match):
        opened(str(folder))


@pytest.mark.parametrize("opened", [open_streamed, load_model])
def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path, opened: Refusal) -> None:
    folder = write(tmp_path / "sharded", shard="10KB")
    part = sorted(folder.glob("*.safetensors"))[1]
    part.unlink()
    with pytest.raises(ModelError, match=rf"1 are not in its folder: {re.escape(part.name)}"):
        opened(str(folder))
    (index,) = folder.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "../gone.safetensors"}}))
    with pytest.raises(ModelError, match="each shard names a file"):
        opened(str(folder))
    index.write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        opened(str(folder))

    folder = write(tmp_path / "m")
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged"):
        opened(str(folder))
    (folder / FILE).rename(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no diffusion_pytorch_model\.safetensors .*model\.safetensors"):
        opened(str(folder))
    (folder / "model.safetensors").rename(folder / FILE)
    (folder / FILE).write_bytes(whole)
    (folder / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(ModelError, match="NoSuchModel"):
        opened(str(folder))
    with pytest.raises(UnknownNameError, match="no folder here"):
        opened(str(tmp_path / "nothing"))


@pytest.mark.parametrize("shard", ["10GB", "10KB"])
def test_a_folder_with_one_variant_loads(tmp_path: Path, shard: str) -> None:
    model = tiny_unet().half()
    model.save_pretrained(tmp_path / "m", variant="fp16", max_shard_size=shard)  # type: ignore[operator]
    streamed, loaded = open_streamed(str(tmp_path / "m")), load_model(str(tmp_path / "m"))
    assert discover_streamed(streamed) == discover(loaded)
    assert load_model(str(tmp_path / "m"), dtype="stored").digest == adapt(model, sample_shape=(1, 8, 8)).digest
    model.save_pretrained(tmp_path / "other", variant="other")  # type: ignore[operator]
    shutil.copy(tmp_path / "other" / "diffusion_pytorch_model.other.safetensors", tmp_path / "m")
    with pytest.raises(ModelError, match="several variants"):
        load_model(str(tmp_path / "m"))
    shutil.copy(write(tmp_path / "plain") / FILE, tmp_path / "m")
    assert load_model(str(tmp_path / "m"), dtype="stored").digest == load_model(str(tmp_path / "plain")).digest


def test_streamed_weights_must_be_finite(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    tensors = load_file(folder / FILE)
    save_file({**tensors, "conv_in.weight": torch.full((8, 1, 3, 3), torch.nan)}, folder / FILE)
    with pytest.raises(NumericsError, match=r"conv_in\.weight"):
        discover_streamed(open_streamed(str(folder)))
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "down_block_types": ["Nothing"]}))
    with pytest.raises(ModelError, match="cannot build UNet2DModel"):
        open_streamed(str(folder))
