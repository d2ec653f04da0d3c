"""What a consumer decodes from a file: its weights, and biases that are corrected for them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from mpqsearch.core import BitMap
from mpqsearch.errors import ArtifactError
from mpqsearch.export import ExportJob, get_exporter
from mpqsearch.export.check import forward_errors, put_weights, source_of
from mpqsearch.export.gguf import dequantize, quantize
from mpqsearch.export.quanto import torch_kernels
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.discover import discover
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import adapt
from tests.support.inputs import known

TARGETS = {"packed": (3, 4), "quanto": (2, 4), "gguf": (4, 5), "torchao": (3, 4), "sdnq": (3, 4), "comfyui": (4, 8)}


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    return adapt(module, sample_shape=(1, 8, 8), name="tiny-dit", n_classes=4)


@pytest.mark.parametrize("name", TARGETS)
def test_biases_make_good_the_mean_error_of_what_the_file_holds(name: str, denoiser: Denoiser, tmp_path: Path) -> None:
    target = get_exporter(name)
    if target.missing():
        pytest.skip(f"the consumer of {name} is not installed: {', '.join(target.missing())}")
    table, low_high = discover(denoiser), TARGETS[name]
    widths = {la.name: np.array(low_high[i % 2], dtype=np.uint8) for i, la in enumerate(table)}
    generator = torch.Generator().manual_seed(1)
    means = {la.name: torch.randn(la.groups, la.weights_per_channel, generator=generator) for la in table}
    statistics = known(means=means)
    bit_map = BitMap(model_digest=table.digest, weights=widths)
    evaluated = quantize_model(denoiser.module, table, bit_map, statistics=statistics, bias_correction=True).module
    job = ExportJob(
        table=table,
        bit_map=bit_map,
        denoiser=denoiser,
        statistics=statistics,
        bias_correction=True,
        evaluated=lambda call: call.replay(evaluated),
    )
    target.write(tmp_path, job)
    delivered = put_weights(source_of(job).module, target.weights(tmp_path))
    before, after = dict(denoiser.module.named_modules()), dict(delivered.named_modules())
    for layer in table:
        ours, theirs = after[layer.name], before[layer.name]
        error = (ours.weight - theirs.weight).flatten(1)
        if theirs.bias is None or not bool(error.any()):
            continue
        expected = theirs.bias - error @ means[layer.name][0]
        torch.testing.assert_close(ours.bias, expected, rtol=2e-3, atol=2e-3, msg=f"{name}: {layer.name}")
        if name in ("quanto", "sdnq"):
            choice = target.choice_of(layer, f"{'qint' if name == 'quanto' else 'uint'}{widths[layer.name]}")
            asked = target.round_trip(theirs.weight, layer, choice).numpy()
            np.testing.assert_allclose(
                asked, ours.weight.numpy(), atol=1e-6, err_msg="what is priced is what is written"
            )
    errors = forward_errors(tmp_path, delivered)
    assert errors["forward_error"] <= 2e-3, "what is measured is what was written"
    if name == "packed":
        assert errors["evaluated_error"] <= 2e-3, "our codes, and biases in half precision"
    if not target.loading:  # ComfyUI itself
        return
    shown: dict[str, object] = {}
    with torch_kernels() if name == "quanto" else nullcontext():
        exec(target.loading.format(cls="DiTTransformer2DModel", folder=tmp_path.as_posix()), shown)
        loaded = shown["model"]
        assert isinstance(loaded, torch.nn.Module)
        found = forward_errors(tmp_path, loaded.float() if name == "packed" else loaded)
    assert found["forward_error"] <= 2e-2, "what the card says loads the file"


def test_a_value_that_a_file_lacks_is_named(denoiser: Denoiser) -> None:
    module = source_of(
        ExportJob(table=(table := discover(denoiser)), bit_map=plain_map(table), denoiser=denoiser)
    ).module
    values = dict(module.state_dict())
    del values["proj_out_2.bias"]
    with pytest.raises(ArtifactError, match=r"'proj_out_2.bias' should have the shape \(4,\); what was read has none"):
        put_weights(module, values)


def plain_map(table: object) -> BitMap:
    return BitMap(model_digest=table.digest, weights={la.name: np.array(8, dtype=np.uint8) for la in table})  # type: ignore[attr-defined]


def test_gguf_weighs_the_error_by_the_importance_of_columns() -> None:
    pytest.importorskip("libgguf")
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    weight, importance = torch.randn(16, 64), np.geomspace(1e-3, 1e3, 64).astype(np.float32)
    squared = [
        (dequantize(quantize(weight, "Q4_0", given), "Q4_0") - weight).square().numpy() @ importance
        for given in (None, importance)
    ]
    assert squared[1].sum() < 0.8 * squared[0].sum()
