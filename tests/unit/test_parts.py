"""Text encoders and the autoencoder in the budget: they are parts of one model with the denoisers, and samples have
their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from mpqsearch.config import config_from
from mpqsearch.core import BitMap, Budget, LayerTable, Policy, QuantFormat
from mpqsearch.core.budget import uniform_map
from mpqsearch.distill import Trajectories
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, ModelError, UnknownNameError
from mpqsearch.export.packed import load_quantized, save_quantized
from mpqsearch.methods import MethodSpec, Programs
from mpqsearch.models import Denoiser, discover, open_streamed, weights_digest
from mpqsearch.profile import CalibrationSpec, WeightErrors, input_statistics, profile_model
from mpqsearch.profile.final_probes import final_effects
from mpqsearch.prompts import Prompt, Prompts
from mpqsearch.quant import QuantizedModel, quantize_model
from mpqsearch.sampling import SamplerSpec, latents, load_model, samples
from mpqsearch.sources import kept_components
from mpqsearch.stages import Run, layers
from mpqsearch.stages.preflight import preflight
from mpqsearch.stages.quantizing import _write_part
from tests.support import tiny_profile, tiny_table
from tests.support.pipelines import PROMPTS, TINY

PARTS = ("vae", "text_encoder", "unet")
SEEDS = [1_000_000, 1_000_001]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, _ = TINY["StableDiffusionPipeline"]()
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.half().float()  # as a file in 16 bits, which the packed one repeats exactly
    path = tmp_path_factory.mktemp("sd")
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Denoiser:
    asked = tuple(Prompt(text=text) for text in PROMPTS)
    spec = SamplerSpec(steps=2, guidance=3.0, batch=2, call={"height": 16, "width": 16})
    prompts = Prompts(splits={"report": asked, "calibration": asked})
    return load_model(str(folder), component=PARTS, sampler=spec, prompts=prompts)


@pytest.fixture(scope="module")
def table(model: Denoiser) -> LayerTable:
    return discover(model)


@pytest.fixture(scope="module")
def quantized(model: Denoiser, table: LayerTable) -> QuantizedModel:
    return quantize_model(model.module, table, uniform_map(table, Policy(), 3))


def text_layers(table: LayerTable) -> list[str]:
    return [la.name for la in table if la.role == "text"]


def test_the_others_are_parts_with_roles_of_their_own(model: Denoiser, table: LayerTable, folder: Path) -> None:
    modules: Any = model.module
    assert list(modules) == ["unet", "vae", "text_encoder"], (
        "denoisers come first, whatever order they are asked for in"
    )
    decoding = [la.name for la in table if la.role == "autoencoder"]
    assert {n.split(".")[1] for n in decoding} == {"decoder", "post_quant_conv"}
    assert all(table[n].macs for n in decoding)
    assert {n.split(".")[1] for n in table.by_name if n.startswith("vae")} - {"decoder", "post_quant_conv"} == {
        "encoder", "quant_conv"
    }  # fmt: skip
    rest = {la.name.partition(".")[0] for la in table if la.role not in ("text", "autoencoder", "unused")}
    assert rest == {"unet"}
    linear = [n for n, m in modules["text_encoder"].named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(text_layers(table)) == sorted(f"text_encoder.{n}" for n in linear)
    assert all(table[n].macs for n in text_layers(table))
    assert table.n_parameters == sum(p.numel() for p in modules.parameters())
    assert set(kept_components(str(folder), PARTS)) == set()


@pytest.mark.parametrize("role", ["text", "autoencoder"])
def test_an_error_of_a_part_is_followed_to_the_final_sample(model: Denoiser, table: LayerTable, role: str) -> None:
    """The effect of one weight error on ``v . x_final``, against the difference of two runs."""
    some = {r: [la for la in table if la.role == r][2] for r in (role, "text", "autoencoder", "attention")}
    name, generator = some[role].name, torch.Generator().manual_seed(0)  # every part has a layer that is looked at
    alone = replace(table, layers=tuple(some.values()))
    zeros = {la.name: torch.zeros(1, la.n_channels, la.weights_per_channel) for la in alone}
    error = 1e-3 * torch.randn(zeros[name][0].shape, generator=generator)
    errors = WeightErrors(alone, {"asymmetric": zeros | {name: error[None]}})
    plain, v = latents(model, SEEDS), torch.zeros(1)

    def along(final: torch.Tensor) -> torch.Tensor:
        nonlocal v
        v = torch.randn(final.shape, generator=generator)
        return v[None]

    effect = float(final_effects(model, alone, SEEDS, errors, along)["asymmetric"][0, 0, 0, 0])
    weight: Any = model.module.get_submodule(name).weight
    with torch.no_grad():
        weight.add_(error.reshape(weight.shape))
        moved = latents(model, SEEDS)
        weight.sub_(error.reshape(weight.shape))
    assert effect == pytest.approx(float((v * (moved - plain)).sum()), rel=0.05)


def test_a_profile_prices_all_kinds_of_parts(model: Denoiser, table: LayerTable) -> None:
    spec = CalibrationSpec(samples=1, probe_inputs=2, probes=1, sampler_seeds=1, sampler_probes=1, context_seeds=0)
    spec, policy = replace(spec, schemes=("asymmetric",)), Policy(widths=(2, 4))
    table = replace(table, layers=tuple(la for la in table if la.role in ("text", "time", "last", "autoencoder")))
    found = profile_model(model, table, policy, spec, QuantFormat(n_candidates=4))
    for role in ("text", "autoencoder"):
        names = [la.name for la in table if la.role == role]
        rows = np.concatenate([np.arange(table.n_channels)[found.rows(n)] for n in names])
        for key in ("sensitivity", "context_sensitivity", "output_error/asymmetric"):
            assert (found.arrays[key][rows] > 0).mean() > 0.5, key
        layers = [found.index[n] for n in names]
        assert (found.arrays["layer_sampler_error/asymmetric"][layers] > 0).all()
    assert found.calibration["timesteps"] == 2, "calls of encoder and autoencoder have no timestep"


def test_statistics_are_the_same_of_a_pipeline_that_never_ran(folder: Path, model: Denoiser, table: LayerTable) -> None:
    runner: Any = model.runner
    new = load_model(str(folder), component=PARTS, sampler=runner.spec, prompts=runner.prompts)
    few = replace(table, layers=tuple(la for la in table if la.role != "unused")[::20])
    ran, first = (input_statistics(one, few, [500_000]) for one in (model, new))
    for layer in few:
        a, b = (found[layer.name].second_moment for found in (ran, first))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()), msg=layer.name)


def test_samples_are_those_of_the_pipeline_with_both_parts(
    model: Denoiser, table: LayerTable, quantized: QuantizedModel, folder: Path, tmp_path: Path
) -> None:
    """Through the packed file, and through folders of diffusers and transformers."""
    save_quantized(tmp_path, quantized, table)
    loaded: Any = load_quantized(tmp_path)
    assert weights_digest(loaded) == weights_digest(quantized.module)
    (drawn,), (full,) = samples(model.with_module(quantized.module), [0, 1]), samples(model, [0, 1])
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, **loaded, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        list(PROMPTS[:2]),
        generator=[torch.Generator().manual_seed(s) for s in (0, 1)],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="np",
    ).images
    assert drawn.images is not None
    np.testing.assert_allclose(np.moveaxis(out, -1, 1) * 255, drawn.images.numpy(), atol=0.51)
    decoded = (drawn.latents / 2 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(np.moveaxis(out, -1, 1), decoded, atol=1e-5, err_msg="errors are those of pictures")
    assert not torch.equal(full.latents, drawn.latents)
    encoder: Any = quantized.module.text_encoder
    one = replace(
        quantized.bit_map,
        weights={**quantized.bit_map.weights, **dict.fromkeys(text_layers(table), np.array(16, np.uint8))},
    )
    whole = quantize_model(model.module, table, one)
    assert not torch.equal(
        latents(model.with_module(whole.module), [0]), latents(model.with_module(quantized.module), [0])
    )
    _write_part(tmp_path / "text_encoder", encoder, encoder)
    again = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    assert weights_digest(again) == weights_digest(encoder)


def test_tied_words_of_a_t5_are_stored_once(tmp_path: Path) -> None:
    from mpqsearch.models import Parts
    from mpqsearch.models.discover import table_of

    pipe, _ = TINY["PixArtAlphaPipeline"]()
    module = Parts({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder.half().float()})
    module["transformer"].half().float()
    table = table_of(module, (), name="tiny", digest="d")
    widths = {la.name: np.array(4, np.uint8) for la in table}
    model = quantize_model(module, table, BitMap(model_digest="d", weights=widths, format=QuantFormat()))
    save_quantized(tmp_path, model, table)
    assert weights_digest(load_quantized(tmp_path)) == weights_digest(model.module)
    stored = (tmp_path / "packed.safetensors").stat().st_size
    words = pipe.text_encoder.shared.weight.numel() * 2
    assert stored < sum(p.numel() for p in module.parameters()) * 2 * 4 / 16 + 1.5 * words + 100_000


@pytest.fixture(scope="module")
def two() -> Programs:
    """A table of a large and a small part, with a made-up profile."""
    sizes = {"large": tiny_table(6, 8, 40), "small": tiny_table(4)}
    layers = tuple(replace(la, name=f"{part}.{la.name}") for part, some in sizes.items() for la in some)
    kept = tuple(replace(k, name=f"{part}.{k.name}") for part, some in sizes.items() for k in some.kept)
    both = LayerTable(digest="0" * 64, layers=layers, kept=kept, model="two")
    return Programs(table=both, profile=tiny_profile(both), policy=Policy(), format=QuantFormat(), apart=tuple(sizes))


@pytest.mark.parametrize("allocator", ["ilp-channel", "ilp-layer", "uniform", "omq"])
def test_with_max_each_part_keeps_to_the_budget_as_if_it_were_alone(two: Programs, allocator: str) -> None:
    method = MethodSpec(name="m", allocator=allocator, loss="output" if allocator.startswith("ilp") else "auto")
    budget = Budget.parse("uniform:3")
    found = two.allocate(method, budget)
    for part in two.apart:
        alone = two.of_part(part)
        assert found.bit_map.only(alone.table.by_name).digest == alone.allocate(method, budget).bit_map.digest
    assert found.limit == two.limit(budget, method)
    assert found.totals[0].cost == found.size_bits
    together = replace(two, apart=()).allocate(method, Budget(quantity="bytes", limit=-(-found.size_bits // 8)))
    if allocator.startswith("ilp"):
        assert together.predicted_loss <= found.predicted_loss * (1 + 1e-6), "bits may go where they are needed"


def test_a_part_below_the_limit_takes_its_widest_widths(two: Programs) -> None:
    large, small = (two.table.part(n) for n in two.apart)
    budget = Budget(quantity="bytes", limit=0.4 * large.size_bytes)
    assert small.size_bytes < budget.limit
    found = two.allocate(MethodSpec(name="m", allocator="ilp-layer", loss="output"), budget)
    assert {int(found.bit_map.weights[n]) for n in small.by_name} == {8}
    with pytest.raises(InfeasibleBudgetError, match="smallest attainable"):
        two.allocate(MethodSpec(name="m", allocator="uniform"), Budget(quantity="bytes", limit=small.size_bytes / 8))
    with pytest.raises(ConfigError, match="program of its own"):
        two.program(MethodSpec(name="m", allocator="ilp-layer"), budget)


def test_a_study_takes_its_parts_from_the_budget(folder: Path, tmp_path: Path, table: LayerTable) -> None:
    said: list[str] = []
    study = {"model": {"source": str(folder), "device": "cpu"}, "budget": {"parts": PARTS, "combine": "max"}}
    run = Run(config=config_from(study), folder=tmp_path, say=said.append)
    assert layers(run).digest == table.digest
    assert run.apart == PARTS
    assert not any("not counted" in line for line in said), "all of the pipeline is"


def test_max_needs_two_parts(tmp_path: Path) -> None:
    config = config_from({"model": {"source": "fmnist-dit", "device": "cpu"}, "budget": {"combine": "max"}})
    with pytest.raises(ConfigError, match="has one denoiser"):
        _ = Run(config=config, folder=tmp_path).apart


def test_names_that_are_no_parts_are_refused(model: Denoiser, folder: Path, table: LayerTable) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown part 'tokenizer'. Known: .*unet.* stays as it is"):
        load_model(str(folder), component=("unet", "tokenizer"))
    with pytest.raises(UnknownNameError, match="text_encoder"):
        load_model(str(folder), component=("unet", "text_encodr"))
    for alone in ("text_encoder", ("vae", "text_encoder")):
        with pytest.raises(ModelError, match="name a denoiser"):
            load_model(str(folder), component=alone)
    with pytest.raises(ModelError, match="cannot be streamed"):
        open_streamed(str(folder), component=PARTS)
    with pytest.raises(ModelError, match="no pipeline"):
        load_model("fmnist-unet", component=PARTS)
    with pytest.raises(ConfigError, match="denoisers alone"):
        Trajectories(model)


def test_targets_without_a_place_for_encoders_are_refused_before_anything_is_measured(table: LayerTable) -> None:
    def check(exported: Sequence[str], **allocate: Any) -> list[str]:
        said: list[str] = []
        run = Run(config=config_from({"allocate": allocate}), folder=Path(), say=said.append)
        run.table = table
        preflight(run, targets=exported)
        return said

    refused = "vae, text_encoder is in the budget"
    with pytest.raises(ConfigError, match=f"quanto .* {refused}"):
        check(["quanto", "gguf"])
    with pytest.raises(ConfigError, match=f"gguf .* {refused}"):
        check([], targets=["gguf"])
    (named,) = check(["packed", "quanto"])
    assert "quanto holds a denoiser alone" in named, "packed is written"
    with pytest.raises(UnknownNameError, match="export --target auto` compares"):
        check([], targets=["auto"])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"budget": {"combine": "most"}}, "max, sum"),
        ({"budget": {"parts": ["unet", "unet"]}}, "different names"),
        ({"budget": {"parts": ["unet"], "combine": "max"}}, "names one"),
        ({"budget": {"parts": PARTS}, "model": {"component": "unet"}}, "model.component"),
        ({"budget": {"parts": PARTS}, "distill": {"methods": ["measured"]}}, "denoisers alone"),
    ],
)
def test_settings_that_contradict_the_parts_are_refused(more: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config_from(more)
