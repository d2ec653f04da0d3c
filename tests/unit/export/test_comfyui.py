"""Checkpoints of ComfyUI under the names of the model's own code, decoded by comfy-kitchen, and those of others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpqsearch.artifacts import read_json
from mpqsearch.core import BitMap, LayerTable
from mpqsearch.errors import ArtifactError
from mpqsearch.export import ExportJob, get_exporter, read_map
from mpqsearch.export.allocation import allocate_for, formats_of
from mpqsearch.export.comfyui import FILE, FORMATS
from mpqsearch.export.contract import MANIFEST
from mpqsearch.models.calls import capture
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.discover import discover
from mpqsearch.sampling import adapt
from tests.conformance.test_exporters import own_map, tiny_transformer
from tests.support.denoisers import RECIPES, model_classes

TARGET = get_exporter("comfyui")


@pytest.fixture(scope="module")
def flux() -> tuple[Denoiser, LayerTable]:
    recipe, generator = RECIPES["FluxTransformer2DModel"], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = model_classes()["FluxTransformer2DModel"](**recipe.config).eval()
    with capture(module) as calls, torch.no_grad():
        module(**recipe.inputs(lambda *size: torch.randn(*size, generator=generator)), return_dict=False)
    denoiser = adapt(module, calls=calls, name="tiny-flux")
    return denoiser, discover(denoiser)


def test_layers_that_are_one_layer_there_are_allocated_and_stored_together(
    flux: tuple[Denoiser, LayerTable], tmp_path: Path
) -> None:
    if TARGET.missing():
        pytest.skip("comfy-kitchen is not installed")
    denoiser, table = flux
    widths_of = [FORMATS[n].width for n in formats_of(TARGET, table)]
    losses = {la.name: [i / width for width in widths_of] for i, la in enumerate(table)}
    solved = allocate_for(TARGET, table, losses, 200_000)
    groups = TARGET.tied(table)
    assert len(groups) == 3
    assert all(len({solved.choices.get(n, "") for n in group}) == 1 for group in groups)
    bit_map, names = own_map(TARGET, table, seed=3)
    parted = groups[0][0]  # it asks for another format than the layers that it is one with
    asked = min(TARGET.choices(table[parted]), key=lambda c: (c.name == names[parted], c.width))
    names[parted] = asked.name
    bit_map = replace(bit_map, weights=bit_map.weights | {parted: np.array(asked.width, dtype=np.uint8)})
    job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, choices=names)
    plan = {e.layer: e for e in TARGET.plan(job)}
    raised = [e for e in plan.values() if e.reason == "rounded_up"]
    assert raised
    assert all("one layer with" in e.detail for e in raised)
    TARGET.write(tmp_path, job)
    seen = TARGET.compare(read_json(tmp_path / MANIFEST, "mpqsearch/export").data, TARGET.read_back(tmp_path))
    assert seen.ok, seen.summary()
    assert seen.stored_bytes == seen.promised_bytes, "what is stored once is counted once"
    tensors = load_file(tmp_path / FILE)
    assert {"double_blocks.0.img_attn.qkv.comfy_quant", "single_blocks.0.linear1.weight"} <= set(tensors)
    assert not any("transformer_blocks" in name for name in tensors)
    other = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    (left := tmp_path / "left").mkdir()
    (left / "config.json").symlink_to(tmp_path / "config.json")
    spare = {n: t for n, t in tensors.items() if n != "txt_in.bias"} | {"y.weight": torch.ones(1)}
    save_file(spare, left / FILE)
    said = TARGET.read_back(left)["problems"]
    assert ["no tensor for 'context_embedder.bias'" in said[0], "no place for the tensor 'y.weight'" in said[1]] == [
        True
    ] * 2
    prefixed = {f"model.diffusion_model.{n}": t for n, t in tensors.items()}
    save_file(prefixed | {"vae.x.comfy_quant": other}, tmp_path / "whole.safetensors")
    widths = {n: e.will_get for n, e in plan.items()}
    for file in (FILE, "whole.safetensors"):
        read = read_map(tmp_path / file, table)
        assert read.source == "comfyui"
        assert {n: int(w) for n, w in read.bit_map.weights.items()} == widths


def test_each_format_is_decoded_to_its_promise_and_within_its_error(tmp_path: Path) -> None:
    if TARGET.missing():
        pytest.skip("comfy-kitchen is not installed")
    denoiser = tiny_transformer()
    table = discover(denoiser)
    weights = {n: m.weight.detach() for n, m in denoiser.module.named_modules() if isinstance(m, torch.nn.Linear)}
    errors = {}
    for name in FORMATS:
        choices = {la.name: name if name in {c.name for c in TARGET.choices(la)} else "full" for la in table}
        widths = {la.name: np.array(FORMATS[name].width, dtype=np.uint8) for la in table}
        bit_map = BitMap(model_digest=table.digest, weights=widths)
        job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, choices=choices)
        folder = tmp_path / name
        TARGET.write(folder, job)
        assert 8 * TARGET.sizes(folder)["stored_bytes"] == TARGET.promise(job, TARGET.plan(job)).total, name
        decoded = TARGET.weights(folder)
        held = [n for n in weights if choices[n] != "full"]
        assert held, name
        errors[name] = max(float((decoded[f"{n}.weight"] - weights[n]).norm() / weights[n].norm()) for n in held)
        for n in set(weights) - set(held):
            assert torch.equal(decoded[f"{n}.weight"], weights[n].half()), "all else is in half precision"
    limits = {8: 0.06, 6: 0.025, 4: 0.14}
    assert all(0 < errors[n] < limits[f.width] for n, f in FORMATS.items()), errors


@pytest.mark.parametrize(
    "marks",
    [
        {"proj_out_1.comfy_quant": json.dumps({"format": "int9"})},
        {"proj_out_1.comfy_quant": "{"},
        {"proj_out_1.comfy_quant": json.dumps(["nvfp4"])},
        {"proj_out_1.comfy_quant": " " * 5000},
    ],
)
def test_damaged_descriptions_are_refused(tmp_path: Path, marks: dict[str, str]) -> None:
    table = discover(tiny_transformer())
    tensors = {n: torch.tensor(list(t.encode()), dtype=torch.uint8) for n, t in marks.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError):
        read_map(tmp_path / "x.safetensors", table, "comfyui")


def test_older_files_mark_all_scaled_layers_at_once(tmp_path: Path) -> None:
    table = discover(tiny_transformer())
    names = ["proj_out_1", "transformer_blocks.0.attn1.to_q"]
    tensors = {f"{n}.scale_weight": torch.ones(()) for n in names} | {"scaled_fp8": torch.zeros(2)}
    save_file(tensors, tmp_path / "old.safetensors")
    read = read_map(tmp_path / "old.safetensors", table)
    assert {n for n, w in read.bit_map.weights.items() if int(w) == 8} == set(names)
