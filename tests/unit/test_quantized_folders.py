"""A quantized model as diffusers folders, which diffusers loads."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from mpqsearch.config import Config
from mpqsearch.core import Policy, uniform_map
from mpqsearch.models import discover
from mpqsearch.models.runner import parts_of
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import load_model
from mpqsearch.stages import Run
from mpqsearch.stages.quantizing import write_model_folder
from tests.support.pipelines import TINY


@pytest.mark.parametrize("name", ["WanPipeline:2.2", "DDPMPipeline"])
def test_every_denoiser_of_a_pipeline_has_a_folder(tmp_path: Path, name: str) -> None:
    pipe, _ = TINY[name]()
    pipe.save_pretrained(tmp_path / "pipeline")
    denoiser = load_model(str(tmp_path / "pipeline"))
    table = discover(denoiser, examples=())
    bit_map = uniform_map(table, Policy(roles={}), 3)
    module = quantize_model(denoiser.module, table, bit_map).module
    run = Run(config=Config(), folder=tmp_path / "run", given=denoiser)
    write_model_folder(run, tmp_path / "quantized", module, bit_map)
    assert (tmp_path / "quantized" / "bitmap.json").is_file()
    for part, quantized in parts_of(module).items():
        again = getattr(diffusers, type(quantized).__name__).from_pretrained(tmp_path / "quantized" / part)
        assert again.state_dict().keys() == quantized.state_dict().keys()
        for key, value in quantized.state_dict().items():
            torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    weights = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)]
    assert all(len(row.unique()) <= 8 for weight in weights for row in weight)
