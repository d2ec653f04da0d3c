"""Models on disk: the same structure, digest and weights as the loaded model, without loading it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpqsearch.errors import ModelError, NumericsError
from mpqsearch.models import EMBEDDED, discover, discover_streamed, load_model, open_streamed
from tests.support.tiny import tiny_dit, tiny_unet

FILE = "diffusion_pytorch_model.safetensors"


def write(folder: Path, kind: str = "unet", dtype: torch.dtype = torch.float32, shard: str = "10GB") -> Path:
    model = (tiny_unet if kind == "unet" else tiny_dit)()
    model.to(dtype).save_pretrained(folder, safe_serialization=True, max_shard_size=shard)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("name", EMBEDDED)
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


def test_pipelines_and_their_parts(tmp_path: Path) -> None:
    write(tmp_path / "pipe" / "unet")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    streamed = open_streamed(str(tmp_path / "pipe"))
    assert streamed.name == "pipe"
    (tmp_path / "pipe" / "unet").rename(tmp_path / "pipe" / "vae")
    with pytest.raises(ModelError, match="neither a unet nor a transformer"):
        open_streamed(str(tmp_path / "pipe"))


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
    from mpqsearch.models.weights import _placed

    places = dict(_placed(tmp_path / "m", module))
    assert places[other] == places[key]
    shared = replace(streamed, stored=places)
    assert torch.equal(shared.read(other), tensors[key])
    assert shared.n_bytes == sum(t.nbytes for t in tensors.values())


def test_folders_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder with config\.json"):
        open_streamed(str(tmp_path / "nothing"))
    folder = write(tmp_path / "m")
    tensors = load_file(folder / FILE)

    save_file({k: v for k, v in tensors.items() if k != "conv_in.weight"}, folder / FILE)
    with pytest.raises(ModelError, match=r"lack conv_in\.weight"):
        open_streamed(str(folder))

    save_file({**tensors, "conv_in.weight": torch.zeros(8, 2, 3, 3)}, folder / FILE)
    with pytest.raises(ModelError, match=r"'conv_in\.weight' is stored with the shape \(8, 2, 3, 3\)"):
        open_streamed(str(folder))

    save_file({**tensors, "conv_in.weight": torch.zeros(8, 1, 3, 3, dtype=torch.int8)}, folder / FILE)
    with pytest.raises(ModelError, match="is it quantized already"):
        open_streamed(str(folder))

    save_file({**tensors, "conv_in.weight": torch.full((8, 1, 3, 3), torch.nan)}, folder / FILE)
    with pytest.raises(NumericsError, match=r"conv_in\.weight"):
        discover_streamed(open_streamed(str(folder)))

    (folder / FILE).write_bytes(b"not a file of tensors")
    with pytest.raises(ModelError, match="damaged"):
        open_streamed(str(folder))

    save_file(tensors, folder / "other.safetensors")
    (folder / FILE).rename(folder / "third.safetensors")
    with pytest.raises(ModelError, match="2 safetensors files and no index"):
        open_streamed(str(folder))

    index = folder / f"{FILE}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors"):
        open_streamed(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": "../gone.safetensors"}}))
    with pytest.raises(ModelError, match="not in its folder"):
        open_streamed(str(folder))
    index.write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        open_streamed(str(folder))

    (folder / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(ModelError, match="NoSuchModel"):
        open_streamed(str(folder))
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "down_block_types": ["Nothing"]}))
    with pytest.raises(ModelError, match="cannot build UNet2DModel"):
        open_streamed(str(folder))
