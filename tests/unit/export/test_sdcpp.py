"""stable-diffusion.cpp itself, through the wheel cyllama: it follows our rules, reads our GGUF files and generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from numpy.typing import NDArray
from safetensors.torch import save_file

from mpqsearch.export import ExportJob, get_exporter
from mpqsearch.export.gguf import FILE, load_with_diffusers, quantize
from mpqsearch.export.sdcpp import FILE as RULES
from mpqsearch.models.calls import capture
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.models.discover import discover
from mpqsearch.sampling import adapt
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


PROMPT, TOKENS = "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]
"""A prompt, and what the vocabulary of CLIP makes of it: beginning, five words, end."""

SIGMAS = [1.0, np.e / (np.e + 1.0)]
"""Noise levels of the program's simple scheduler for a FLUX without guidance in two steps."""


@torch.no_grad()
def flux(folder: Path) -> tuple[FluxPipeline, torch.Tensor]:
    """A FLUX of two blocks of each kind and its small autoencoder, of random weights but the published shapes where
    the program fixes them; the text encoder CLIP-L as ``clip.safetensors``, the decoder as ``tae.safetensors``. Also
    what the encoder says of `PROMPT` ``[1, 768]``."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=4096, pooled_projection_dim=768
    )
    denoiser.proj_out.weight.mul_(4)  # else all pictures are one grey
    vae = AutoencoderTiny(latent_channels=16)
    vae.decoder.layers[-1].weight.mul_(10)
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=49408)
    )
    weights = {n.removeprefix("text_model."): w.half() for n, w in clip.state_dict().items() if w.is_floating_point()}
    save_file({f"text_model.{n}": weight for n, weight in weights.items()}, folder / "clip.safetensors")
    save_file(vae.state_dict(), folder / "tae.safetensors")
    scheduler, no = FlowMatchEulerDiscreteScheduler(), dict.fromkeys(("text_encoder", "text_encoder_2"))
    pipe = FluxPipeline(scheduler, vae.eval(), tokenizer=None, tokenizer_2=None, transformer=denoiser.eval(), **no)
    pipe.set_progress_bar_config(disable=True)
    return pipe, clip.eval()(torch.tensor([TOKENS])).last_hidden_state[:, -1]


def drawn(pipe: FluxPipeline, pooled: torch.Tensor) -> NDArray[np.float64]:
    """What diffusers draws, in grey levels ``[64, 64, 3]``; without T5, as the program, which takes zeros then."""
    (image,) = pipe(
        prompt_embeds=torch.zeros(1, 256, 4096), pooled_prompt_embeds=pooled, sigmas=SIGMAS, height=64, width=64,
        generator=torch.Generator().manual_seed(5), output_type="np", num_inference_steps=2,
    ).images  # fmt: skip
    return np.asarray(image, dtype=np.float64) * 255


def generated(folder: Path, prompt: str) -> tuple[NDArray[np.float64], str]:
    """What stable-diffusion.cpp draws with our file, and what it logs."""
    said: list[str] = []
    sd.set_log_callback(lambda _, text: said.append(text))
    params = sd.SDContextParams(
        diffusion_model_path=str(folder / FILE), clip_l_path=str(folder.parent / "clip.safetensors"), n_threads=1
    )
    params.taesd_path, params.rng_type = str(folder.parent / "tae.safetensors"), sd.RngType.CPU  # noise as torch's
    with sd.SDContext(params) as context:
        (image,) = context.generate(
            prompt, width=64, height=64, seed=5, sample_steps=2, cfg_scale=1.0,
            sample_method=sd.SampleMethod.EULER, scheduler=sd.Scheduler.SIMPLE,
        )  # fmt: skip
    sd.set_log_callback(None)
    return image.to_numpy().astype(np.float64), "".join(said)


def rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def test_it_generates_with_our_file_what_diffusers_draws_with_it(tmp_path: Path) -> None:
    pipe, pooled = flux(tmp_path)
    with capture(pipe.transformer) as calls:
        full = drawn(pipe, pooled)
    denoiser = adapt(pipe.transformer, calls=calls, name="tiny-flux")
    kinds = set(exported("gguf", denoiser, tmp_path / "gguf").values())
    pipe.transformer = load_with_diffusers(tmp_path / "gguf")
    expected = drawn(pipe, pooled)
    image, log = generated(tmp_path / "gguf", PROMPT)
    other, _ = generated(tmp_path / "gguf", "a dog")
    assert len(kinds) == 12, "all types of the target but F16"
    assert "not in model file" not in log
    assert "unknown tensor" not in log
    assert rms(image - expected) < 0.6, "of 255 grey levels, 0.3 of them by rounding"
    assert rms(full - expected) > 10, "what the quantization changes"
    assert rms(image - other) > 2, "what another prompt changes"
