"""stable-diffusion.cpp itself, through the wheel cyllama: it follows our rules, and reads our GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import save_file

from mpqsearch.export import ExportJob, get_exporter
from mpqsearch.export.gguf import FILE, quantize
from mpqsearch.export.sdcpp import FILE as RULES
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.discover import discover
from tests.conformance.test_exporters import own_map, tiny_text, tiny_transformer

gguf = pytest.importorskip("gguf")
pytest.importorskip("libgguf")
sd = pytest.importorskip("cyllama.sd")


def tensors(file: Path) -> dict[str, Any]:
    return {str(t.name): t for t in gguf.GGUFReader(file).tensors}


def decoded(tensor: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.astype(np.float32).ravel()


def exported(target: str, denoiser: Denoiser, folder: Path) -> dict[str, str]:
    """Formats of the layers of an export for a random map of the target's own."""
    table = discover(denoiser)
    bit_map, choices = own_map(get_exporter(target), table, seed=2)
    get_exporter(target).write(folder, ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, choices=choices))
    return {la.name: choices.get(la.name, "F16") for la in table}


@pytest.mark.parametrize(("make", "prefix"), [(tiny_transformer, ""), (tiny_text, "unet.")])
def test_it_gives_every_layer_the_type_of_its_rule_and_our_bytes(
    make: Callable[[], Denoiser], prefix: str, tmp_path: Path
) -> None:
    denoiser = make()
    asked = exported("sdcpp", denoiser, tmp_path)
    weights = {name: tensor.half().contiguous() for name, tensor in denoiser.module.state_dict().items()}
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "in.safetensors")
    rules, out = (tmp_path / RULES).read_text().strip(), tmp_path / "out.gguf"
    assert sd.convert_model(str(tmp_path / "in.safetensors"), str(out), sd.SDType.F16, None, rules, False)
    made = {name.removeprefix(prefix): tensor for name, tensor in tensors(out).items()}
    assert {n: made[f"{n}.weight"].tensor_type.name for n in asked} == asked
    for name, kind in ((n, kind) for n, kind in asked.items() if kind != "F16"):
        weight = weights[f"{name}.weight"]
        evenly = np.ones(weight.shape[1], dtype=np.float32)  # the importance that the program takes
        assert np.array_equal(made[f"{name}.weight"].data, quantize(weight, kind, evenly)), (name, kind)


@pytest.mark.parametrize("make", [tiny_transformer, tiny_text])
def test_it_decodes_our_files_as_gguf_does(make: Callable[[], Denoiser], tmp_path: Path) -> None:
    exported("gguf", make(), tmp_path)
    ours, out = tensors(tmp_path / FILE), tmp_path / "out.gguf"
    assert sd.convert_model(str(tmp_path / FILE), str(out), sd.SDType.F32, None, "nothing=f32", False)
    made = tensors(out)
    assert set(made) == set(ours)
    assert sum(t.tensor_type.name == "F32" for t in made.values()) > sum(
        t.tensor_type.name == "F32" for t in ours.values()
    )
    for name, tensor in ours.items():
        np.testing.assert_allclose(decoded(made[name]), decoded(tensor), rtol=1e-6, atol=1e-7, err_msg=name)
