from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpqsearch.core import Policy
from mpqsearch.errors import ModelError, NumericsError, UnknownNameError
from mpqsearch.models import REFERENCE, Calls, Parts, capture, discover
from mpqsearch.models.judge import Scene
from mpqsearch.sampling import SamplerSpec, adapt, load_model, samples
from tests.support import tiny_denoiser, tiny_dit, tiny_unet
from tests.support.denoisers import build


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_every_parameter_is_a_layer_or_is_kept_with_a_reason(kind: str) -> None:
    denoiser = tiny_denoiser(kind)
    table = discover(denoiser)
    assert table.n_parameters == sum(p.numel() for p in denoiser.module.parameters())
    assert {k.reason for k in table.kept} <= {"bias", "normalization", "embedding table"}
    roles = [la.role for la in table]
    assert roles.count("first") == roles.count("last") == 1
    assert all(la.macs > 0 for la in table)


def test_roles_of_a_unet_and_a_transformer() -> None:
    unet, dit = (discover(tiny_denoiser(kind)) for kind in ("unet", "dit"))
    assert unet["conv_in"].role == "first"
    assert unet["conv_out"].role == "last"
    assert unet["time_embedding.linear_1"].role == "time"
    assert unet["up_blocks.0.resnets.0.conv_shortcut"].role == "skip"  # fed with torch.cat([hidden, residual])
    assert unet["down_blocks.1.resnets.0.conv_shortcut"].role == "shortcut"
    assert unet["down_blocks.0.downsamplers.0.conv"].role == "resample"
    assert unet["mid_block.attentions.0.to_q"].role == "attention"
    assert unet["mid_block.resnets.0.conv1"].role == "conv"
    assert dit["pos_embed.proj"].role == "first"
    assert dit["proj_out_2"].role == "last"
    assert dit["transformer_blocks.0.norm1.linear"].role == "norm"
    assert dit["transformer_blocks.0.ff.net.2"].role == "feed-forward"
    assert dit["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"].role == "time"


def roles_of(name: str) -> dict[str, str]:
    module, inputs = build(name)
    with torch.no_grad(), capture(module) as calls:
        module(**inputs)
    return {la.name: la.role for la in discover(adapt(module, calls=calls))}


def test_conditions_of_a_transformer_are_told_apart_by_what_they_depend_on() -> None:
    flux, chroma = roles_of("FluxTransformer2DModel"), roles_of("ChromaTransformer2DModel")
    assert flux["time_text_embed.timestep_embedder.linear_1"] == "time"
    assert (
        flux["time_text_embed.guidance_embedder.linear_1"] == flux["time_text_embed.text_embedder.linear_1"] == "class"
    )
    assert flux["context_embedder"] == "linear"  # a token each: no condition of the whole
    assert flux["transformer_blocks.0.norm1.linear"] == "norm"
    assert flux["single_transformer_blocks.0.proj_mlp"] == "feed-forward"
    assert (
        flux["single_transformer_blocks.0.proj_out"] == "linear"
    )  # attention beside feed-forward is no skip connection
    assert chroma["distilled_guidance_layer.layers.0.linear_1"] == "time"


def test_skip_connections_are_seen_or_known_by_name() -> None:
    unet, hunyuan, control = (
        roles_of(n) for n in ("UNet2DConditionModel", "HunyuanDiT2DModel", "UNetControlNetXSModel")
    )
    skips = [n for n, role in unet.items() if role == "skip"]
    assert skips == [n for n in unet if re.match(r"up_blocks\.\d\.resnets\.\d\.conv_shortcut", n)]
    assert unet["down_blocks.1.resnets.0.conv_shortcut"] == "shortcut"
    block = "mid_block.attentions.0.transformer_blocks.0"  # a whole block under the name of attention
    assert {unet[f"{block}.{n}"] for n in ("ff.net.0.proj", "ff.net.2")} == {"feed-forward"}
    assert {unet[f"{block}.{n}"] for n in ("attn1.to_q", "attn2.to_out.0")} == {"attention"}
    assert {n for n, role in hunyuan.items() if role == "skip"} == {n for n in hunyuan if n.endswith("skip_linear")}
    assert control["mid_block.ctrl_midblock.resnets.0.conv_shortcut"] == "skip"  # two networks' streams


def test_projections_that_consumers_fuse_are_found_by_their_common_input() -> None:
    module, inputs = build("SD3Transformer2DModel")
    with torch.no_grad(), capture(module) as calls:
        module(**inputs)
    groups: dict[str, set[str]] = {}
    for layer in discover(adapt(module, calls=calls)):
        if layer.fuse:
            groups.setdefault(layer.fuse, set()).add(layer.name.rpartition(".")[2])
    assert groups["transformer_blocks.0.attn.[to]"] == {"to_q", "to_k", "to_v"}
    assert groups["transformer_blocks.0.attn.[add_proj]"] == {"add_q_proj", "add_k_proj", "add_v_proj"}
    unet = discover(tiny_denoiser())
    assert unet["mid_block.attentions.0.to_q"].fuse == unet["mid_block.attentions.0.to_v"].fuse != ""
    module, inputs = build("UNet2DConditionModel")  # across: the queries have another input than keys and values
    with torch.no_grad(), capture(module) as calls:
        module(**inputs)
    cross = {
        la.name.rpartition(".")[2]: la.fuse
        for la in discover(adapt(module, calls=calls))
        if "mid_block" in la.name and "attn2" in la.name
    }
    assert cross["to_k"] == cross["to_v"] != ""
    assert cross["to_q"] == ""


class Pooled(nn.Module):
    """Attention of torch itself, whose output weight is used without calling its layer, and a branch that does not
    run."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.middle = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.outlet = nn.Linear(8, 4)

    def denoise(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        h = self.inlet(x)
        h = self.attention(h, h, h)[0] if t is not None else self.other(h)
        out: Tensor = self.outlet(self.middle(h))
        return out


def test_what_cannot_be_measured_is_kept_or_held_at_eight_bits(caplog: pytest.LogCaptureFixture) -> None:
    denoiser = adapt(Pooled(), sample_shape=(5, 4))
    table = discover(denoiser)
    reasons = {k.name: k.reason for k in table.kept}
    assert reasons["attention.out_proj.weight"].startswith("its weight is used without calling the layer")
    assert reasons["attention.in_proj_weight"].startswith("unknown module MultiheadAttention")
    assert table["other"].role == "unused"
    assert "other" in caplog.text
    assert Policy().fixed_width(table["other"]) == 8
    assert table.n_parameters == sum(p.numel() for p in denoiser.module.parameters())


def test_macs_of_known_layers() -> None:
    unet = discover(tiny_denoiser())
    assert unet["conv_in"].macs == 8 * 8 * 8 * 9  # 8 channels, 8x8 positions, 1x3x3 weights
    assert unet["down_blocks.0.downsamplers.0.conv"].macs == 8 * 4 * 4 * 8 * 9
    assert unet["time_embedding.linear_1"].macs == 8 * 32


class Odd(nn.Module):
    """A user's module: a convolution, a shared one, a bare parameter and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(1, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.down = nn.Conv2d(4, 1, 2, stride=2)
        self.twin = nn.Conv2d(4, 1, 2, stride=2)
        self.twin.weight = self.down.weight
        self.gate = nn.Parameter(torch.ones(3))

    def denoise(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        h = self.up(self.inlet(x)) * self.gate.mean() + 0 * t.view(-1, 1, 1, 1)
        out: Tensor = self.down(h) + self.twin(h)
        return out


def test_own_modules_work_and_nothing_is_skipped_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    denoiser = adapt(Odd(), sample_shape=(1, 6, 6))
    table = discover(denoiser)
    assert [la.name for la in table] == ["inlet", "up", "down"]
    assert (table["up"].n_channels, table["up"].macs) == (4, 4 * 36 * 2 * 4)
    reasons = {k.name: k.reason for k in table.kept}
    assert reasons["twin.weight"] == "shares the weight of down"
    assert reasons["gate"].startswith("unknown module Odd")
    assert "gate" in caplog.text
    assert table.n_parameters == sum(p.numel() for p in denoiser.module.parameters())


def test_model_folders_load_with_their_scheduler(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    model = tiny_unet()
    model.save_pretrained(tmp_path / "m", safe_serialization=True)  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"names no scheduler.*scheduler_config\.json"):
        list(samples(load_model(str(tmp_path / "m")), [0]))
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "m")
    denoiser = load_model(str(tmp_path / "m"))
    assert denoiser.digest == adapt(model, sample_shape=(1, 8, 8)).digest
    assert denoiser.runner.scheduler["beta_schedule"] == "squaredcos_cap_v2"  # type: ignore[attr-defined, index]
    (drawn,) = samples(denoiser, [6, 7])
    assert drawn.labels == (1, 2)  # of 5, the null class included: the configuration does not say which it is
    assert drawn.images is not None
    assert drawn.images.shape == (2, 1, 8, 8)
    (tmp_path / "m" / "denoiser.json").write_text(
        json.dumps({"n_classes": 4, "null_class": 4, "data_range": [-2.0, 2.0]})
    )
    named = load_model(str(tmp_path / "m"), sampler=SamplerSpec(guidance=2.0))
    (wide,) = samples(named, [6, 7])
    assert wide.labels == (2, 3)
    assert torch.equal(wide.images, ((wide.latents + 2) * (255 / 4)).round().to(torch.uint8))  # type: ignore[arg-type]


def test_bad_sources_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="fmnist-unet"):
        load_model("fmnist-unett")
    with pytest.raises(ModelError, match=r"neither config\.json nor model_index\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="pickle checkpoint"):
        load_model(str(tmp_path / "model.ckpt"))
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="only pickle checkpoints"):
        load_model(str(folder))
    (folder / "config.json").write_text(json.dumps({"_class_name": "Nonsense"}))
    (folder / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="'Nonsense'"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load_model(str(folder))


def test_damaged_and_nan_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_unet()
    model.save_pretrained(tmp_path / "m", safe_serialization=True)  # type: ignore[operator]
    weights = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="is damaged"):
        load_model(str(tmp_path / "m"))
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(NumericsError, match=r"conv_in\.weight"):
        adapt(model, sample_shape=(1, 8, 8))


def test_models_that_cannot_be_called_are_refused() -> None:
    with pytest.raises(ModelError, match=r"denoise\(x, t, cond\)"):
        adapt(nn.Linear(2, 2), sample_shape=(2,))


@pytest.mark.parametrize("name", ["fmnist-unet", "fmnist-dit"])
def test_embedded_models_load_with_classes_and_a_range(name: str) -> None:
    denoiser = load_model(name)
    runner: Any = denoiser.runner
    assert (runner.n_classes, runner.null_class, runner.sample_shape) == (10, 10, (1, 28, 28))
    assert runner.picture(denoiser.module) == (1, 28, 28)
    assert 0.9e6 < sum(p.numel() for p in denoiser.module.parameters()) < 2.0e6


@pytest.mark.parametrize(
    ("name", "pipeline", "scheduler"),
    [
        ("fmnist-t2i", "StableDiffusionPipeline", "DDIMScheduler"),
        ("fmnist-flow", "StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_embedded_pipelines_load_with_prompts_and_how_they_are_meant_to_be_drawn(
    name: str, pipeline: str, scheduler: str
) -> None:
    denoiser = load_model(name)
    runner = denoiser.runner
    assert runner.picture(denoiser.module) == (3, 64, 64)
    assert runner.identity["pipeline"] == pipeline
    assert json.loads((REFERENCE / name / "model_index.json").read_text())["scheduler"][1] == scheduler
    assert all(Scene.parse(str(label)) for label in runner.labels(range(50)))
    assert 2.5e6 < sum(p.numel() for p in denoiser.module.parameters()) < 3.5e6
    files = sum(p.stat().st_size for p in (REFERENCE / name).rglob("*") if p.is_file())
    assert files < 8e6


def test_two_denoisers_are_one_model_with_two_parts() -> None:
    parts = Parts({"transformer": tiny_dit(0), "transformer_2": tiny_dit(1)})
    alone = tiny_denoiser("dit")
    (example,) = alone.runner.examples(alone.module)
    calls = Calls([replace(example, part="transformer"), replace(example, part="transformer_2")])
    table, single = discover(adapt(parts, calls=calls)), discover(alone)
    names = [la.name for la in single]
    assert [la.name for la in table] == [f"{part}.{name}" for part in parts for name in names]
    assert [la.role for la in table] == [la.role for la in single] * 2, "each part has its first and its last layer"
    assert [la.macs for la in table] == [la.macs for la in single] * 2
    by_names = discover(adapt(parts, calls=calls), examples=())
    assert {la.name for la in by_names if la.role == "first"} == {
        "transformer.pos_embed.proj",
        "transformer_2.pos_embed.proj",
    }
