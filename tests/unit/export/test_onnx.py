"""The graph of a call, run by ONNX Runtime, against the module itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import BitMap, QuantFormat
from mpqsearch.errors import ConfigError
from mpqsearch.export import ExportJob, get_exporter
from mpqsearch.models import discover
from mpqsearch.models.calls import call_of, capture
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import adapt
from tests.support.everything import ALL
from tests.support.tiny import tiny_denoiser

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Pipelined(nn.Module):
    """Takes what pipelines give: nested conditions, a time without a batch axis, switches; predicts a variance too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 6, 3, padding=1)
        self.prompt = nn.Linear(5, 6)
        self.size = nn.Linear(3, 6)
        self.conv_out = nn.Conv2d(6, 4, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        mask: Tensor | None = None,
        added: dict[str, Tensor] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        assert not return_dict
        assert mask is None
        assert added is not None
        emb = self.prompt(encoder_hidden_states).mean(1) + self.size(added["size"]) + timestep / 1000
        return (self.conv_out(self.conv_in(sample).relu() * emb[:, :, None, None]),)


def arguments(batch: int, seed: int) -> dict[str, Any]:
    """In another order than that of the signature."""
    g = torch.Generator().manual_seed(seed)
    return {
        "added": {"size": torch.rand(batch, 3, generator=g)},
        "encoder_hidden_states": torch.randn(batch, 7, 5, generator=g),
        "mask": None,
        "return_dict": False,
        "sample": torch.randn(batch, 2, 4, 4, generator=g),
        "timestep": torch.tensor(37.0 * seed),
    }


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"] if ALL else ["asymmetric"])
def test_the_file_computes_what_the_quantized_model_does(tmp_path: Path, scheme: str) -> None:
    from mpqsearch.export.onnx import FILE, session

    torch.manual_seed(0)
    module = Pipelined()
    with capture(module) as calls, torch.no_grad():
        module(**arguments(2, 1))
    denoiser = adapt(module, calls=calls)
    table = discover(denoiser)
    widths = np.array([1, 3, 4, 8, 16, 2], dtype=np.uint8)
    bit_map = BitMap(
        model_digest=table.digest,
        weights={la.name: np.resize(widths, la.n_channels) for la in table},
        format=QuantFormat(scheme=scheme),
    )
    target = get_exporter("onnx")
    target.write(tmp_path, ExportJob(table=table, bit_map=bit_map, denoiser=denoiser))
    seen = target.verify(tmp_path)
    assert seen.ok, seen.summary()
    expected = quantize_model(module, table, bit_map).module
    runs = session(tmp_path / FILE)
    for batch, seed in ((2, 3), (3, 4), (1, 5)):  # the batch size is free
        given = arguments(batch, seed)
        raw = runs(**given)[0]
        with torch.no_grad():
            torch.testing.assert_close(raw, expected(**given)[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(call_of(module, (), given).replay(runs), raw[:, :2])


def test_containers_that_do_not_hold_the_map_are_named(tmp_path: Path) -> None:
    from mpqsearch.artifacts import read_json
    from mpqsearch.export.onnx import FILE

    torch.manual_seed(0)
    module = Pipelined()
    with capture(module) as calls, torch.no_grad():
        module(**arguments(2, 1))
    denoiser = adapt(module, calls=calls)
    table = discover(denoiser)
    target = get_exporter("onnx")
    for width in (8, 4):
        bit_map = BitMap(model_digest=table.digest, weights={la.name: np.array(width) for la in table})
        target.write(tmp_path, ExportJob(table=table, bit_map=bit_map, denoiser=denoiser))
        if width == 8:
            wide = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(wide)
    seen = target.compare(read_json(tmp_path / "export.json", "mpqsearch/export").data, target.read_back(tmp_path))
    assert any("conv_in: weights by bits of their container {8: 108}, planned {4: 108}" in p for p in seen.problems)


def test_three_levels_are_held_and_groups_of_inputs_are_refused(tmp_path: Path) -> None:
    denoiser = tiny_denoiser("dit")
    table, target = discover(denoiser), get_exporter("onnx")
    weights = {la.name: np.array(2) for la in table}

    def job(fmt: QuantFormat) -> ExportJob:
        return ExportJob(
            table=table, bit_map=BitMap(model_digest=table.digest, weights=weights, format=fmt), denoiser=denoiser
        )

    target.write(tmp_path, job(QuantFormat(scheme="ternary")))
    read = target.read_back(tmp_path)
    assert read["forward_error"] < 1e-5
    assert not read["problems"]
    with pytest.raises(ConfigError, match="one scale a channel here"):
        target.write(tmp_path, job(QuantFormat(scheme="ternary", group=16)))
