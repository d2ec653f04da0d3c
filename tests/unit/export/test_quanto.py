from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpqsearch.artifacts import read_json
from mpqsearch.core import FULL_PRECISION, BitMap, LayerSpec, LayerTable
from mpqsearch.errors import ConfigError
from mpqsearch.export import ExportJob, Verification
from mpqsearch.export.contract import MANIFEST
from mpqsearch.export.quanto import MAP, QuantoTarget, quantized_copy
from mpqsearch.models import Denoiser, discover
from mpqsearch.sampling import adapt
from tests.support.tiny import tiny_denoiser


def table_of(*shapes: tuple[int, ...], kind: str = "Linear") -> LayerTable:
    layers = tuple(LayerSpec(name=f"layer{i}", kind=kind, weight_shape=s) for i, s in enumerate(shapes))
    return LayerTable(digest="d", layers=layers)


def plan_of(table: LayerTable, widths: dict[str, Any]) -> list[tuple[int | None, str]]:
    weights = {n: np.array(w, dtype=np.uint8) for n, w in widths.items()}
    job = ExportJob(table=table, bit_map=BitMap(model_digest="d", weights=weights))
    return [(e.will_get, e.reason) for e in QuantoTarget().plan(job)]


@pytest.mark.parametrize(
    ("asked", "planned"),
    [
        (1, (2, "rounded_up")),
        (2, (2, "exact")),
        (3, (4, "rounded_up")),
        (5, (8, "rounded_up")),
        (8, (8, "exact")),
        (16, (16, "kept_full_precision")),
        ([3, 5, 3, 5], (4, "collapsed_channels")),
        ([2, 2, 3, 4], (4, "collapsed_channels")),
        ([16, 16, 16, 4], (16, "rounded_up")),
    ],
)
def test_rounding_of_one_layer(asked: Any, planned: tuple[int, str]) -> None:
    assert plan_of(table_of((4, 6)), {"layer0": asked}) == [planned]


def test_other_kinds_stay_at_full_precision() -> None:
    assert plan_of(table_of((4, 6, 3), kind="Conv1d"), {"layer0": 4}) == [(FULL_PRECISION, "unsupported_kind")]


LAYERS = {"conv_in": 4, "conv_out": 8, "time_embedding.linear_1": 2}
"""Layers of the tiny U-Net that are quantized here; all others keep full precision."""


def tiny_job() -> tuple[Denoiser, ExportJob]:
    denoiser = tiny_denoiser()
    table = discover(denoiser)
    weights = {la.name: np.array(LAYERS.get(la.name, FULL_PRECISION), dtype=np.uint8) for la in table}
    return denoiser, ExportJob(
        table=table, bit_map=BitMap(model_digest=table.digest, weights=weights), denoiser=denoiser
    )


def seen_in(folder: Path) -> Verification:
    """What `verify` says after the digests of the files, in this process."""
    exporter = QuantoTarget()
    return exporter.compare(read_json(folder / MANIFEST, "mpqsearch/export").data, exporter.read_back(folder))


class Plain(nn.Module):
    """No diffusers model: it has no configuration from which another process could build it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.outer(self.inner(x).relu() * (timestep > 0)[:, None, None, None]),)


def test_a_module_that_is_no_diffusers_model_is_written_and_not_read(tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    denoiser = adapt(Plain(), sample_shape=(1, 6, 6))
    table = discover(denoiser)
    bit_map = BitMap(model_digest=table.digest, weights={la.name: np.array(4) for la in table})
    exporter = QuantoTarget()
    exporter.write(tmp_path, ExportJob(table=table, bit_map=bit_map, denoiser=denoiser))
    seen = exporter.verify(tmp_path)
    assert not seen.ok
    assert "only models of diffusers" in seen.problems[0]


def rewrite(folder: Path, change: Any) -> None:
    """Change a file of an export and the digest that guards it, as a faulty writer would have."""
    from mpqsearch.artifacts import digest_file, write_json

    change(folder)
    path = folder / "export.json"
    manifest = json.loads(path.read_text())
    manifest["data"]["files"] = {n: digest_file(folder / n) for n in manifest["data"]["files"]}
    write_json(
        path,
        manifest["schema"],
        manifest["data"],
        manifest["inputs"],
        map(path.parent.joinpath, manifest.get("files", ())),
    )


def test_verify_sees_what_quanto_ignores(tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    from safetensors.torch import load_file, save_file

    _, job = tiny_job()
    exporter = QuantoTarget()

    def misname(folder: Path) -> None:
        qmap = json.loads((folder / MAP).read_text())
        qmap["no.such.layer"] = qmap.pop("conv_in")
        (folder / MAP).write_text(json.dumps(qmap))

    exporter.write(tmp_path, job)
    assert seen_in(tmp_path).ok
    rewrite(tmp_path, misname)
    seen = seen_in(tmp_path)
    assert [(e.layer, e.planned, e.got) for e in seen.entries if not e.ok] == [("conv_in", 4, 16)]

    def lose_a_bias(folder: Path) -> None:
        path = folder / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        del state["conv_norm_out.bias"]
        save_file(state, path)

    exporter.write(tmp_path, job)
    rewrite(tmp_path, lose_a_bias)
    assert any("'conv_norm_out.bias'" in p for p in seen_in(tmp_path).problems)

    def shift(folder: Path) -> None:
        path = folder / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        state["conv_out.bias"] += 1.0
        save_file(state, path)

    exporter.write(tmp_path, job)
    rewrite(tmp_path, shift)
    seen = seen_in(tmp_path)
    assert any("forward pass differs" in p for p in seen.problems)
    assert "forward pass" in seen.summary()


def test_the_codes_are_those_of_the_width(tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    denoiser, job = tiny_job()
    clone = quantized_copy(denoiser.module, QuantoTarget().plan(job))
    from mpqsearch.export.quanto import torch_kernels

    with torch_kernels():
        weight = clone.conv_in.weight.dequantize()
    levels = [len(torch.unique(row)) for row in weight]
    assert max(levels) <= 16
    assert min(levels) > 4
    step = (denoiser.module.conv_in.weight.amax((1, 2, 3)) - denoiser.module.conv_in.weight.amin((1, 2, 3))) / 15
    worst = (weight - denoiser.module.conv_in.weight).abs().amax((1, 2, 3))
    assert bool((worst <= 0.5001 * step + 1e-6).all()), (
        "rounding to the nearest of 16 levels over the range of each row"
    )


def test_torch_kernel_undoes_quantos_packing() -> None:
    packed_tensor = pytest.importorskip("optimum.quanto.tensor.packed")
    from mpqsearch.export.quanto import _unpack

    for bits in (2, 4):
        codes = torch.arange(2**bits, dtype=torch.uint8).repeat(8).reshape(-1, 4)
        packed = packed_tensor.PackedTensor.pack(codes, bits)
        assert torch.equal(_unpack(packed._data, bits)[: len(codes)], codes)


def test_a_model_is_needed() -> None:
    _, job = tiny_job()
    with pytest.raises(ConfigError, match="needs the model"):
        QuantoTarget().write(Path("nowhere"), ExportJob(table=job.table, bit_map=job.bit_map))


def test_a_layer_that_the_model_does_not_have(tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    denoiser, job = tiny_job()
    plan = [e for e in QuantoTarget().plan(job) if e.will_get != FULL_PRECISION]
    from dataclasses import replace

    with pytest.raises(ConfigError, match="absent"):
        quantized_copy(denoiser.module, [replace(plan[0], layer="absent"), *plan[1:]])


def test_a_missing_library_gives_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantoTarget, "imports", ("optimum.quanto", "no_such_package.quanto"))
    _, job = tiny_job()
    with pytest.raises(
        ConfigError, match=r"no_such_package.quanto is not installed. Run: pip install 'optimum-quanto'"
    ):
        QuantoTarget().write(tmp_path, job)
    assert list(tmp_path.iterdir()) == []


def test_the_package_needs_neither_torch_nor_the_consumer() -> None:
    import subprocess
    import sys

    code = (
        "import sys, mpqsearch.export, mpqsearch.report, mpqsearch.pareto\n"
        "bad = {'torch', 'optimum', 'diffusers', 'pulp', 'optuna', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
