"""Roads of a model on a GPU, walked on tensors that only say that they lie there."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mpqsearch.artifacts import digest_file
from mpqsearch.core import BitMap, QuantFormat
from mpqsearch.export import TARGETS, ExportJob, get_exporter
from mpqsearch.models import discover
from tests.support.everything import ALL
from tests.support.fake_cuda import FakeCudaTensor, fake_cuda, on_gpu
from tests.support.inputs import known
from tests.support.tiny import tiny_denoiser

PAYLOADS = [name for name in TARGETS if get_exporter(name).payload and name not in ("onnx", "sdnq")]
"""Targets that write weights, but for two whose libraries trace or load a model with fake tensors of their own."""


def test_the_fake_fails_where_a_gpu_does() -> None:
    with fake_cuda():
        x = torch.ones(3, device="cuda")
        assert isinstance(x, FakeCudaTensor)
        assert x.device.type != "cpu"
        y = x * 2 + torch.tensor(1.0)
        assert isinstance(y, FakeCudaTensor)
        assert y.cpu().tolist() == [3.0, 3.0, 3.0]
        assert y[torch.tensor([0, 2])].sum().item() == 6.0
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises((TypeError, RuntimeError), match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="same device"):
            torch.where(torch.ones(3) > 0, x, x)
        y[1] = 2
        assert y.cpu().tolist() == [3.0, 2.0, 3.0]
        layer = on_gpu(torch.nn.Linear(3, 2))
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(1, 3))
        layer(torch.ones(1, 3, device="cuda")).sum().backward()
        assert isinstance(layer.weight.grad, FakeCudaTensor)


def contents(path: Path) -> dict[str, str]:
    """Digests of the tensors of a file, of the whole file where it is none of tensors; safetensors' headers are in no
    fixed order."""
    if path.suffix != ".safetensors":
        return {path.name: digest_file(path)}
    return {
        k: hashlib.sha256(v.view(torch.uint8).numpy().tobytes()).hexdigest()
        for k, v in load_file(path).items()
        if v.dim()
    }


@pytest.mark.parametrize("kind", ["unet", "dit"] if ALL else ["unet"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_an_export_from_a_gpu_is_that_from_the_cpu(name: str, kind: str, tmp_path: Path) -> None:
    target = get_exporter(name)
    if target.missing():
        pytest.skip(f"the consumer of {name} is not installed: {', '.join(target.missing())}")
    denoiser = tiny_denoiser(kind)
    table = discover(denoiser)
    weights = {la.name: np.array(4, dtype=np.uint8) for la in table}
    bit_map = BitMap(model_digest=table.digest, weights=weights, format=QuantFormat(rounding="gptq"))
    moments = {la.name: torch.eye(la.weights_per_channel).repeat(la.groups, 1, 1) for la in table}
    job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, statistics=known(moments=moments))
    target.write(tmp_path / "cpu", job)
    with fake_cuda():
        on_device = denoiser.with_module(on_gpu(denoiser.module))
        moved = {n: m.to("cuda") for n, m in moments.items()}
        files = target.write(tmp_path / "gpu", replace(job, denoiser=on_device, statistics=known(moments=moved)))
    assert all(isinstance(p, FakeCudaTensor) for p in on_device.module.parameters()), "the model stays where it is"
    names = {p.name for p in files} - {"export.json", "bitmap.json"}
    assert names
    for file in names:
        assert contents(tmp_path / "gpu" / file) == contents(tmp_path / "cpu" / file), file
