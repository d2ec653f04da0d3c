"""Pipelines of U-Nets, and those that take a class or noise alone."""
# fmt: off

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers as d
import transformers as t

from tests.support.pipelines.parts import *
from tests.support.pipelines.registry import IMAGE, MISFITS, tiny

NOISE: dict[str, Any] = {"num_inference_steps": 3}

# --- Noise and classes -------------------------------------------------------------------------------------------------


def pixel_unet(classes: int | None = None, *, size: int = 16) -> Any:
    return d.UNet2DModel(
        sample_size=size, block_out_channels=(16, 32), layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, num_class_embeds=classes,
    )


def dit(out: int = 8) -> Any:
    transformer = d.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=out
    )
    return d.DiTPipeline(transformer=transformer, vae=vae(), scheduler=d.DDIMScheduler(clip_sample=False))


def ldm(classes: int | None = None) -> Any:
    autoencoder = d.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, latent_channels=3, norm_num_groups=4, num_vq_embeddings=32, vq_embed_dim=3, sample_size=32,
    )
    scheduler = d.DDIMScheduler(**SD | {"beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False})
    return d.LDMPipeline(vqvae=autoencoder, unet=pixel_unet(classes, size=8), scheduler=scheduler)


def with_scheduler(pipe: Any, scheduler: Any) -> Any:
    """Past the check of its class that some pipelines make."""
    pipe.register_modules(scheduler=scheduler)
    return pipe


def score_sde() -> Any:
    unet = d.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"), time_embedding_type="fourier",
    )
    return d.ScoreSdeVePipeline(unet=unet, scheduler=d.ScoreSdeVeScheduler())


tiny("DDPMPipeline", **NOISE)(lambda: d.DDPMPipeline(unet=pixel_unet(), scheduler=d.DDPMScheduler()))
tiny("DDIMPipeline", **NOISE)(lambda: d.DDIMPipeline(unet=pixel_unet(), scheduler=d.DDIMScheduler()))
tiny("ConsistencyModelPipeline", num_inference_steps=2)(
    lambda: d.ConsistencyModelPipeline(unet=pixel_unet(10), scheduler=d.CMStochasticIterativeScheduler(num_train_timesteps=40))
)
tiny("DiTPipeline", **NOISE, guidance_scale=4.0)(dit)
tiny("LDMPipeline", **NOISE)(ldm)
# Its corrector steps by norms of the whole batch
tiny("ScoreSdeVePipeline", into=MISFITS, num_inference_steps=2)(score_sde)
# The LDM-4 of ImageNet: LDMPipeline takes no class
tiny("LDMPipeline:class-conditional", into=MISFITS)(lambda: ldm(1001))
# SiT: DiTPipeline scales inputs, which flow schedulers do not know
tiny("DiTPipeline:flow", into=MISFITS)(lambda: with_scheduler(dit(4), flow()))
tiny("DDPMPipeline:flow", into=MISFITS)(lambda: with_scheduler(d.DDPMPipeline(unet=pixel_unet(), scheduler=d.DDPMScheduler()), flow()))
tiny("DDPMPipeline:EDM", into=MISFITS)(
    lambda: with_scheduler(d.DDPMPipeline(unet=pixel_unet(), scheduler=d.DDPMScheduler()), d.EDMEulerScheduler())
)

# --- Stable Diffusion and its kin --------------------------------------------------------------------------------------

NO_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text_unet(width: int = 32, **config: Any) -> Any:
    return d.UNet2DConditionModel(**{
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": width, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    } | config)


def sd(kind: str = "StableDiffusionPipeline", *, scheduler: Any = None, **unet: Any) -> Any:
    return getattr(d, kind)(
        vae=vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=text_unet(**unet), **NO_CHECKER,
        scheduler=scheduler or d.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1),
    )


def sdxl_unet(**config: Any) -> Any:
    return text_unet(64, **{
        "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32,
    } | config)


def sdxl(kind: str = "StableDiffusionXLPipeline", scheduler: Any = None, **more: Any) -> Any:
    return getattr(d, kind)(
        vae=vae(scale=0.13025), text_encoder=clip_text(), text_encoder_2=clip_text(project=32, act="gelu"), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=sdxl_unet(),
        scheduler=scheduler or d.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1), **more,
    )


def ddim(**config: Any) -> Any:
    return d.DDIMScheduler(**SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | config)


def lcm() -> Any:
    return sd("LatentConsistencyModelPipeline", scheduler=d.LCMScheduler(**SD), time_cond_proj_dim=16)


tiny("StableDiffusionPipeline", **IMAGE)(sd)
tiny("StableDiffusionPipeline:v-prediction", **IMAGE)(lambda: sd(scheduler=ddim(prediction_type="v_prediction")))  # 2.1
tiny("StableDiffusionPAGPipeline", **IMAGE, pag_scale=3.0)(lambda: sd("StableDiffusionPAGPipeline"))
tiny("StableDiffusionXLPipeline", **IMAGE)(lambda: sdxl(add_watermarker=False))
tiny("StableDiffusionXLPipeline:turbo", **IMAGE | {"guidance_scale": 0.0, "num_inference_steps": 2})(
    lambda: sdxl(scheduler=d.EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing"), add_watermarker=False)
)
tiny("StableDiffusionXLPAGPipeline", **IMAGE, pag_scale=3.0)(
    lambda: sdxl("StableDiffusionXLPAGPipeline", add_watermarker=False, pag_applied_layers=["mid"])
)
tiny("LatentConsistencyModelPipeline", **IMAGE)(lcm)


def animate(kind: str = "AnimateDiffPipeline") -> Any:
    adapter = d.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4
    )
    return getattr(d, kind)(
        unet=text_unet(), scheduler=ddim(beta_schedule="linear"), vae=vae(), motion_adapter=adapter, text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
    )


def animate_xl() -> Any:
    adapter = d.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4,
        use_motion_mid_block=False,
    )
    return sdxl("AnimateDiffSDXLPipeline", ddim(beta_schedule="linear"), motion_adapter=adapter)


FILM = IMAGE | {"num_frames": 2}
tiny("AnimateDiffPipeline", **FILM)(animate)
tiny("AnimateDiffPAGPipeline", **FILM, pag_scale=3.0)(lambda: animate("AnimateDiffPAGPipeline"))
tiny("AnimateDiffSDXLPipeline", **FILM)(animate_xl)


@tiny("LDMTextToImagePipeline", **IMAGE)
def _() -> Any:
    return d.LDMTextToImagePipeline(vqvae=vae(), bert=clip_text(), tokenizer=clip_tokenizer(), unet=text_unet(), scheduler=ddim())


@tiny("IFPipeline", **IMAGE)
def _() -> Any:
    unet = text_unet(
        sample_size=16, in_channels=3, out_channels=6, encoder_hid_dim=32, addition_embed_type="text", addition_embed_type_num_heads=2,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_norm="group_norm", act_fn="gelu",
        resnet_time_scale_shift="scale_shift", attention_head_dim=8,
    )
    scheduler = d.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, variance_type="learned_range"
    )
    return d.IFPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), unet=unet, scheduler=scheduler, watermarker=None, **NO_CHECKER
    )


def kolors(kind: str = "KolorsPipeline", **more: Any) -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=200, hidden_size=32, ffn_hidden_size=37, kv_channels=8, num_attention_heads=4, seq_length=64,
        multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True, original_rope=True,
    )
    unet = sdxl_unet(cross_attention_dim=32, projection_class_embeddings_input_dim=6 * 8 + 32)
    return getattr(d, kind)(
        vae=vae(scale=0.13025), text_encoder=ChatGLMModel(config, empty_init=False), tokenizer=chatglm_tokenizer(), unet=unet,
        scheduler=d.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1), **more,
    )


tiny("KolorsPipeline", **IMAGE, max_sequence_length=64)(kolors)
tiny("KolorsPAGPipeline", **IMAGE, max_sequence_length=64, pag_scale=3.0)(
    lambda: kolors("KolorsPAGPipeline", pag_applied_layers=["mid"])
)


# --- A prior, then a U-Net ---------------------------------------------------------------------------------------------


def prior(width: int = 32) -> Any:
    return d.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=width, num_layers=1)


def unclip_scheduler(**config: Any) -> Any:
    return d.UnCLIPScheduler(**{"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 10.0} | config)


@tiny("StableUnCLIPPipeline", **IMAGE, prior_num_inference_steps=2)
def _() -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    prior_scheduler = d.DDPMScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0, beta_schedule="squaredcos_cap_v2"
    )
    return d.StableUnCLIPPipeline(
        prior_tokenizer=clip_tokenizer(), prior_text_encoder=clip_text(project=32), prior=prior(), prior_scheduler=prior_scheduler,
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=32), tokenizer=clip_tokenizer(), text_encoder=clip_text(),
        image_noising_scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), vae=vae(),
        unet=text_unet(class_embed_type="projection", projection_class_embeddings_input_dim=64), scheduler=ddim(),
    )


def kandinsky_unet(embed: str, hidden: str) -> Any:
    return text_unet(
        out_channels=8, addition_embed_type=embed, encoder_hid_dim=32, encoder_hid_dim_type=hidden,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
    )


def movq() -> Any:
    return d.VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), latent_channels=4,
        norm_num_groups=4, norm_type="spatial", num_vq_embeddings=12, up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        vq_embed_dim=4,
    )


def of_prior() -> dict[str, Any]:
    vision = t.CLIPVisionConfig(
        hidden_size=32, image_size=32, projection_dim=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1, patch_size=16
    )
    return {
        "prior_prior": prior(), "prior_text_encoder": clip_text(project=32), "prior_tokenizer": clip_tokenizer(),
        "prior_scheduler": unclip_scheduler(), "prior_image_encoder": t.CLIPVisionModelWithProjection(vision),
        "prior_image_processor": t.CLIPImageProcessor(crop_size=32, size=32),
    }


KANDINSKY = IMAGE | {"height": 64, "width": 64, "prior_num_inference_steps": 2}


@tiny("KandinskyCombinedPipeline", **KANDINSKY)
def _() -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        transformerDimSize=32, imageDimSize=32, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1,
        vocab_size=128, max_position_embeddings=90,
    )
    return d.KandinskyCombinedPipeline(
        text_encoder=MultilingualCLIP(config), tokenizer=roberta_tokenizer(), unet=kandinsky_unet("text_image", "text_image_proj"),
        scheduler=ddim(), movq=movq(), **of_prior(),
    )


@tiny("KandinskyV22CombinedPipeline", **KANDINSKY)
def _() -> Any:
    return d.KandinskyV22CombinedPipeline(
        unet=kandinsky_unet("image", "image_proj"), scheduler=d.DDPMScheduler(), movq=movq(), **of_prior()
    )


@tiny("Kandinsky3Pipeline", **IMAGE | {"height": 32, "width": 32})
def _() -> Any:
    unet = d.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3, block_out_channels=(8, 16),
        cross_attention_dim=4, encoder_hid_dim=32,
    )
    scheduler = d.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return d.Kandinsky3Pipeline(unet=unet, scheduler=scheduler, movq=movq(), text_encoder=t5_text(), tokenizer=t5_tokenizer())


@tiny("ShapEPipeline", num_inference_steps=2, output_type="latent")
def _() -> Any:
    from diffusers.pipelines.shap_e.renderer import ShapERenderer

    shap_prior = d.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, embedding_dim=16, num_embeddings=32, embedding_proj_dim=16, time_embed_dim=64,
        num_layers=1, clip_embed_dim=32, additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer",
        encoder_hid_proj_type=None, added_emb_type=None,
    )
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=16, d_hidden=8, n_output=12, background=(0.1, 0.1, 0.1)
    )
    scheduler = d.HeunDiscreteScheduler(
        num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True, clip_sample=True
    )
    return d.ShapEPipeline(
        prior=shap_prior, text_encoder=clip_text(16, project=16), tokenizer=clip_tokenizer(), scheduler=scheduler,
        shap_e_renderer=renderer,
    )


def dreamlite(kind: str) -> Any:
    unet = d.DreamLiteUNetModel(
        sample_size=8, down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), block_out_channels=(16, 32), cross_attention_dim=32,
        attention_head_dim=8, layers_per_block=1, norm_num_groups=4, transformer_layers_per_block=1,
    )
    autoencoder = d.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    return getattr(d, kind)(
        text_encoder=qwen3_vl_text(), tokenizer=qwen_tokenizer(), processor=qwen3_vl_processor(), vae=autoencoder, unet=unet,
        scheduler=flow(),
    )


tiny("DreamLitePipeline", **IMAGE | {"height": 64, "width": 64})(partial(dreamlite, "DreamLitePipeline"))
tiny("DreamLiteMobilePipeline", **IMAGE | {"height": 64, "width": 64})(partial(dreamlite, "DreamLiteMobilePipeline"))
