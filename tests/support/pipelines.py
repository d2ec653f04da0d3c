"""Tiny pipelines of diffusers with random weights and the real structure, and arguments to call them with.

``TINY[name]()`` gives a pipeline and the arguments of its call, without prompts, classes, generators and the kind of
output; `arguments` adds those for a batch of seeds. A name is that of the pipeline class, with a variant after a colon.
Nothing is downloaded: tokenizers hold single characters. Each builds in milliseconds and runs in well under a second.
"""

from __future__ import annotations

import functools
import inspect
import string
from collections.abc import Callable, Mapping
from typing import Any

import diffusers as d  # both libraries load a class when it is asked for
import torch
import transformers as t
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from tests.support.denoisers import disturb

Built = tuple[d.DiffusionPipeline, dict[str, Any]]

TINY: dict[str, Callable[[], Built]] = {}
"""Pipelines that make their output from text, a class or noise alone."""

MISFITS: dict[str, Callable[[], Built]] = {}
"""Folders in which the pipeline class cannot run the model: the rest of the field reads them component by component."""

PROMPTS = ("a lighthouse", "two red cats", "a blue house by the sea", "rain on a tin roof")


def prompt_of(seed: int) -> str:
    """The prompt of the sample with this seed."""
    return PROMPTS[seed % len(PROMPTS)]


def arguments(pipe: d.DiffusionPipeline, call: Mapping[str, Any], seeds: tuple[int, ...]) -> dict[str, Any]:
    """All arguments for one batch: a generator, and a prompt or class, for each sample. Give them once: generators
    move on."""
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"output_type": "np"} | dict(call)
    given["generator"] = [torch.Generator().manual_seed(s) for s in seeds]
    if "prompt" in takes:
        given["prompt"] = [prompt_of(s) for s in seeds]
    if "class_labels" in takes:
        given["class_labels"] = [s % 10 for s in seeds]
    if "batch_size" in takes:
        given["batch_size"] = len(seeds)
    return given


def tiny(name: str, *, into: dict[str, Callable[[], Built]] = TINY, **call: Any) -> Any:
    """Enters a function that makes a pipeline, with the arguments of its call."""

    def enter(make: Callable[[], d.DiffusionPipeline]) -> Callable[[], d.DiffusionPipeline]:
        @functools.wraps(make)
        def build() -> Built:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                pipe = make()
                for part in modules(pipe):
                    if type(part).__module__.startswith("diffusers.") and "autoencoder" not in type(part).__module__:
                        disturb(part)
                    part.eval().requires_grad_(False)
            pipe.set_progress_bar_config(disable=True)
            return pipe, dict(call)

        into[name] = build
        return make

    return enter


def modules(pipe: d.DiffusionPipeline) -> list[nn.Module]:
    """The modules among its components."""
    return [c for c in pipe.components.values() if isinstance(c, nn.Module)]


IMAGE: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16}
VIDEO: dict[str, Any] = IMAGE | {"num_frames": 9}

# --- Text: tokenizers of single characters, encoders of one or two layers ---------------------------------------------

CHARACTERS = sorted(set(string.printable) - set(string.whitespace))


def clip_tokenizer(length: int = 77) -> Any:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(a + "</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"]
    return t.CLIPTokenizer(vocab={a: i for i, a in enumerate(tokens)}, merges=[], model_max_length=length)


def t5_tokenizer(length: int = 77) -> Any:
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((a, -3.0 - i / 20) for i, a in enumerate(["▁", *CHARACTERS])),
    ]
    return t.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def gemma_tokenizer(length: int = 300) -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    return t.GemmaTokenizer(vocab={a: i for i, a in enumerate(tokens)}, merges=[], model_max_length=length)


def clip_text(width: int = 32, *, project: int = 0, act: str = "quick_gelu", length: int = 77) -> nn.Module:
    config = t.CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, hidden_act=act,
        max_position_embeddings=length, bos_token_id=512, eos_token_id=513, pad_token_id=513, projection_dim=project or width,
    )  # fmt: skip
    return (t.CLIPTextModelWithProjection if project else t.CLIPTextModel)(config)


def t5_text(width: int = 32, *, kind: str = "T5") -> nn.Module:
    """A T5 or UMT5 encoder."""
    config = getattr(t, f"{kind}Config")(
        vocab_size=128, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0
    )  # fmt: skip
    return getattr(t, f"{kind}EncoderModel")(config)


_DECODER: dict[str, Any] = {
    "vocab_size": 128, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def gemma_text(width: int = 32) -> nn.Module:
    return t.Gemma2Model(t.Gemma2Config(hidden_size=width, bos_token_id=2, eos_token_id=1, pad_token_id=0, **_DECODER))


# --- Autoencoders ------------------------------------------------------------------------------------------------------


def vae(
    channels: int = 4, *, scale: float = 0.18215, shift: float | None = None, quant: bool = True, blocks: int = 2
) -> Any:
    return d.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 16, 16, 16)[:blocks], down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=scale,
        shift_factor=shift, use_quant_conv=quant, use_post_quant_conv=quant,
    )  # fmt: skip


def flux_vae(channels: int = 4, *, blocks: int = 2) -> Any:
    return vae(channels, scale=0.3611, shift=0.1159, quant=False, blocks=blocks)


def wan_vae() -> Any:
    return d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def sana_vae() -> Any:
    return d.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1], downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip


# --- Schedulers --------------------------------------------------------------------------------------------------------

_SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SD_DDIM = _SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def flow(**config: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | config)


# --- Pixels, classes and noise -----------------------------------------------------------------------------------------


def pixel_unet(classes: int | None = None, *, size: int = 16) -> Any:
    return d.UNet2DModel(
        sample_size=size, block_out_channels=(16, 32), layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, num_class_embeds=classes,
    )  # fmt: skip


def dit_transformer(out: int = 8) -> Any:
    return d.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=out,
    )


@tiny("DDPMPipeline", num_inference_steps=3)
def _() -> Any:
    return d.DDPMPipeline(unet=pixel_unet(), scheduler=d.DDPMScheduler())


@tiny("DDIMPipeline", num_inference_steps=3)
def _() -> Any:
    return d.DDIMPipeline(unet=pixel_unet(), scheduler=d.DDIMScheduler())


@tiny("ConsistencyModelPipeline", num_inference_steps=2)
def _() -> Any:
    return d.ConsistencyModelPipeline(
        unet=pixel_unet(10), scheduler=d.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_max=80.0)
    )


@tiny("DiTPipeline", num_inference_steps=3, guidance_scale=4.0)
def _() -> Any:
    scheduler = d.DDIMScheduler(clip_sample=False, beta_schedule="linear")
    return d.DiTPipeline(transformer=dit_transformer(), vae=vae(), scheduler=scheduler)


def vq_vae() -> Any:
    return d.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, latent_channels=3, norm_num_groups=4, num_vq_embeddings=32, vq_embed_dim=3, sample_size=32,
    )  # fmt: skip


def ldm(classes: int | None = None) -> Any:
    scheduler = d.DDIMScheduler(**_SD | {"beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False})
    return d.LDMPipeline(vqvae=vq_vae(), unet=pixel_unet(classes, size=8), scheduler=scheduler)


@tiny("LDMPipeline", num_inference_steps=3)
def _() -> Any:
    return ldm()


@tiny("ScoreSdeVePipeline", into=MISFITS, num_inference_steps=2)  # its corrector steps by norms of the whole batch
def _() -> Any:
    unet = d.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"), time_embedding_type="fourier",
    )  # fmt: skip
    return d.ScoreSdeVePipeline(unet=unet, scheduler=d.ScoreSdeVeScheduler())


@tiny("LDMPipeline:class-conditional", into=MISFITS)  # the LDM-4 of ImageNet; LDMPipeline takes no class
def _() -> Any:
    return ldm(1001)


@tiny("DiTPipeline:flow", into=MISFITS)  # SiT: DiTPipeline scales inputs, which flow schedulers do not know
def _() -> Any:
    pipe = d.DiTPipeline(transformer=dit_transformer(4), vae=vae(), scheduler=d.DDIMScheduler())
    pipe.register_modules(scheduler=flow())
    return pipe


@tiny("DDPMPipeline:flow", into=MISFITS)
def _() -> Any:
    pipe = d.DDPMPipeline(unet=pixel_unet(), scheduler=d.DDPMScheduler())
    pipe.register_modules(scheduler=flow())
    return pipe


@tiny("DDPMPipeline:EDM", into=MISFITS)
def _() -> Any:
    pipe = d.DDPMPipeline(unet=pixel_unet(), scheduler=d.DDPMScheduler())
    pipe.register_modules(scheduler=d.EDMEulerScheduler())
    return pipe


# --- Stable Diffusion and its kin --------------------------------------------------------------------------------------


def text_unet(width: int = 32, **config: Any) -> Any:
    return d.UNet2DConditionModel(
        **{
            "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": width, "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
        } | config
    )  # fmt: skip


def sd(scheduler: Any = None, kind: str = "StableDiffusionPipeline", **unet: Any) -> Any:
    return getattr(d, kind)(
        vae=vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=text_unet(**unet), safety_checker=None,
        scheduler=scheduler or d.PNDMScheduler(**_SD, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl_unet() -> Any:
    return text_unet(
        64, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip


def sdxl(scheduler: Any = None, kind: str = "StableDiffusionXLPipeline", **more: Any) -> Any:
    return getattr(d, kind)(
        vae=vae(scale=0.13025), text_encoder=clip_text(), text_encoder_2=clip_text(project=32, act="gelu"), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=sdxl_unet(), add_watermarker=False,
        scheduler=scheduler or d.EulerDiscreteScheduler(**_SD, timestep_spacing="leading", steps_offset=1), **more,
    )  # fmt: skip


@tiny("StableDiffusionPipeline", **IMAGE)
def _() -> Any:
    return sd()


@tiny("StableDiffusionPipeline:v-prediction", **IMAGE)  # 2.1
def _() -> Any:
    return sd(d.DDIMScheduler(**_SD_DDIM, prediction_type="v_prediction"))


@tiny("StableDiffusionXLPipeline", **IMAGE)
def _() -> Any:
    return sdxl()


@tiny("StableDiffusionXLPipeline:turbo", **IMAGE | {"guidance_scale": 0.0, "num_inference_steps": 2})
def _() -> Any:
    return sdxl(d.EulerAncestralDiscreteScheduler(**_SD, timestep_spacing="trailing"))


@tiny("LatentConsistencyModelPipeline", **IMAGE)
def _() -> Any:
    return sd(d.LCMScheduler(**_SD_DDIM), "LatentConsistencyModelPipeline", time_cond_proj_dim=16)


# --- Image transformers ------------------------------------------------------------------------------------------------


def pixart(kind: str) -> Any:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4, cross_attention_dim=24,
        out_channels=8, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return getattr(d, kind)(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), vae=vae(), transformer=transformer, scheduler=scheduler
    )


@tiny("PixArtAlphaPipeline", **IMAGE, use_resolution_binning=False)
def _() -> Any:
    return pixart("PixArtAlphaPipeline")


@tiny("PixArtSigmaPipeline", **IMAGE, use_resolution_binning=False)
def _() -> Any:
    return pixart("PixArtSigmaPipeline")


def sd3(kind: str = "StableDiffusion3Pipeline") -> Any:
    transformer = d.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return getattr(d, kind)(
        transformer=transformer, scheduler=flow(), vae=vae(scale=1.5305, shift=0.0609, quant=False), text_encoder=clip_text(project=32),
        tokenizer=clip_tokenizer(), text_encoder_2=clip_text(project=32, act="gelu"), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


@tiny("StableDiffusion3Pipeline", **IMAGE)
def _() -> Any:
    return sd3()


def flux(*, guided: bool) -> Any:
    transformer = d.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=guided,
    )  # fmt: skip
    return d.FluxPipeline(
        scheduler=flow(use_dynamic_shifting=guided), vae=flux_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


@tiny("FluxPipeline", **IMAGE)
def _() -> Any:
    return flux(guided=True)


@tiny("FluxPipeline:schnell", **IMAGE, guidance_scale=0.0)
def _() -> Any:
    return flux(guided=False)


_SANA: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 32, "sample_size": 8, "patch_size": 1,
}  # fmt: skip
_SANA_CALL = IMAGE | {"height": 32, "width": 32, "complex_human_instruction": None}


def sana(kind: str = "SanaPipeline", scheduler: Any = None, **config: Any) -> Any:
    return getattr(d, kind)(
        tokenizer=gemma_tokenizer(), text_encoder=gemma_text(), vae=sana_vae(), transformer=d.SanaTransformer2DModel(**_SANA | config),
        scheduler=scheduler or flow(),
    )  # fmt: skip


@tiny("SanaPipeline", **_SANA_CALL, use_resolution_binning=False)
def _() -> Any:
    return sana()


@tiny("Lumina2Pipeline", **IMAGE)
def _() -> Any:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=8, num_layers=2, num_attention_heads=1, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=[4, 2, 2], axes_lens=[300, 16, 16], cap_feat_dim=32,
    )  # fmt: skip
    return d.Lumina2Pipeline(
        transformer=transformer, scheduler=flow(shift=6.0), vae=flux_vae(), text_encoder=gemma_text(), tokenizer=gemma_tokenizer()
    )  # fmt: skip


# --- Video -------------------------------------------------------------------------------------------------------------

_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 32,
    "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip


def wan(*, two: bool = False) -> Any:
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return d.WanPipeline(
        tokenizer=t5_tokenizer(512), text_encoder=t5_text(kind="UMT5"), vae=wan_vae(), scheduler=scheduler,
        transformer=d.WanTransformer3DModel(**_WAN), transformer_2=d.WanTransformer3DModel(**_WAN) if two else None,
        boundary_ratio=0.875 if two else None,
    )  # fmt: skip


@tiny("WanPipeline", **VIDEO)
def _() -> Any:
    return wan()


@tiny("WanPipeline:2.2", **VIDEO)
def _() -> Any:
    return wan(two=True)


@tiny("CogVideoXPipeline", **VIDEO, max_sequence_length=16)
def _() -> Any:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=32, num_layers=1,
        sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=16,
    )  # fmt: skip
    autoencoder = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    scheduler = d.CogVideoXDDIMScheduler(
        **_SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing",
        clip_sample=False,
    )  # fmt: skip
    return d.CogVideoXPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), vae=autoencoder, transformer=transformer, scheduler=scheduler
    )


@tiny("LTXPipeline", **VIDEO | {"height": 32, "width": 32})
def _() -> Any:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, num_layers=1,
        caption_channels=32,
    )  # fmt: skip
    autoencoder = d.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False), patch_size=1,
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
    )  # fmt: skip
    return d.LTXPipeline(
        scheduler=flow(shift=1.0, use_dynamic_shifting=True), vae=autoencoder, text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


# --- Sound -------------------------------------------------------------------------------------------------------------


def oobleck(channels: int = 4) -> Any:
    return d.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=channels, channel_multiples=[2, 4],
        sampling_rate=4,
    )  # fmt: skip


@tiny("StableAudioPipeline", num_inference_steps=3, audio_end_in_s=1.0)
def _() -> Any:
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    transformer = d.StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=4, num_key_value_attention_heads=2, out_channels=4,
        num_attention_heads=2, cross_attention_input_dim=32, global_states_input_dim=64, cross_attention_dim=4, time_proj_dim=8,
    )  # fmt: skip
    return d.StableAudioPipeline(
        vae=oobleck(), text_encoder=t5_text(), tokenizer=t5_tokenizer(10), transformer=transformer,
        projection_model=StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32),
        scheduler=d.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"),
    )  # fmt: skip
