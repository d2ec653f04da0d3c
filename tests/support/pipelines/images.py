"""Image pipelines of transformers."""
# fmt: off

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers as d
import transformers as t

from tests.support.pipelines.parts import *
from tests.support.pipelines.registry import IMAGE, tiny

LARGER = IMAGE | {"height": 32, "width": 32}

# --- T5, CLIP or both --------------------------------------------------------------------------------------------------


def pixart(kind: str, **more: Any) -> Any:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4, cross_attention_dim=24,
        out_channels=8, caption_channels=32, use_additional_conditions=False,
    )
    scheduler = d.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return getattr(d, kind)(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), vae=vae(), transformer=transformer, scheduler=scheduler, **more
    )


tiny("PixArtAlphaPipeline", **IMAGE, use_resolution_binning=False)(partial(pixart, "PixArtAlphaPipeline"))
tiny("PixArtSigmaPipeline", **IMAGE, use_resolution_binning=False)(partial(pixart, "PixArtSigmaPipeline"))
tiny("PixArtSigmaPAGPipeline", **IMAGE, use_resolution_binning=False, pag_scale=3.0)(
    partial(pixart, "PixArtSigmaPAGPipeline", pag_applied_layers=["blocks.1"])
)


def sd3(kind: str = "StableDiffusion3Pipeline", **more: Any) -> Any:
    transformer = d.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )
    return getattr(d, kind)(
        transformer=transformer, scheduler=flow(), vae=vae(scale=1.5305, shift=0.0609, quant=False), text_encoder=clip_text(project=32),
        tokenizer=clip_tokenizer(), text_encoder_2=clip_text(project=32, act="gelu"), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(), tokenizer_3=t5_tokenizer(), **more,
    )


tiny("StableDiffusion3Pipeline", **IMAGE)(sd3)
tiny("StableDiffusion3PAGPipeline", **IMAGE, pag_scale=3.0)(
    partial(sd3, "StableDiffusion3PAGPipeline", pag_applied_layers=["transformer_blocks.1"])
)

FLUX: dict[str, Any] = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8],
}
WITH_T5 = {"max_sequence_length": 48}


def flux(*, guided: bool) -> Any:
    return d.FluxPipeline(
        scheduler=flow(use_dynamic_shifting=guided), vae=flux_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(),
        transformer=d.FluxTransformer2DModel(**FLUX, pooled_projection_dim=32, guidance_embeds=guided),
    )


def with_t5(kind: str, transformer: Any, *, encoder: str = "T5", **more: Any) -> Any:
    """A pipeline of one T5 encoder and the autoencoder of Flux."""
    return getattr(d, kind)(**{
        "scheduler": flow(), "vae": flux_vae(), "text_encoder": t5_text(kind=encoder), "tokenizer": t5_tokenizer(),
        "transformer": transformer,
    } | more)


tiny("FluxPipeline", **IMAGE)(partial(flux, guided=True))
tiny("FluxPipeline:schnell", **IMAGE, guidance_scale=0.0)(partial(flux, guided=False))
tiny("ChromaPipeline", **IMAGE | WITH_T5)(lambda: with_t5("ChromaPipeline", d.ChromaTransformer2DModel(
    **FLUX, approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16
)))
tiny("BriaPipeline", **IMAGE | WITH_T5)(lambda: with_t5("BriaPipeline", d.BriaTransformer2DModel(**FLUX)))
tiny("AuraFlowPipeline", **IMAGE | WITH_T5)(lambda: with_t5("AuraFlowPipeline", d.AuraFlowTransformer2DModel(
    sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
    caption_projection_dim=32, joint_attention_dim=32, pos_embed_max_size=64,
), encoder="UMT5"))
tiny("CogView3PlusPipeline", **IMAGE, max_sequence_length=16)(lambda: with_t5("CogView3PlusPipeline", d.CogView3PlusTransformer2DModel(
    in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4, text_embed_dim=32, time_embed_dim=8,
    condition_dim=2, pos_embed_max_size=8, sample_size=8,
), scheduler=d.CogVideoXDDIMScheduler(), vae=vae()))


def hunyuan_dit(kind: str, **more: Any) -> Any:
    transformer = d.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4, cross_attention_dim=32,
        cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
    )
    bert = t.BertModel(t.BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37))
    return getattr(d, kind)(
        transformer=transformer, vae=vae(), scheduler=d.DDPMScheduler(), text_encoder=bert, tokenizer=bert_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(256), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **more,
    )


tiny("HunyuanDiTPipeline", **IMAGE, use_resolution_binning=False)(partial(hunyuan_dit, "HunyuanDiTPipeline"))
tiny("HunyuanDiTPAGPipeline", **IMAGE, use_resolution_binning=False, pag_scale=3.0)(
    partial(hunyuan_dit, "HunyuanDiTPAGPipeline", pag_applied_layers=["blocks.1"])
)


@tiny("HiDreamImagePipeline", **IMAGE, max_sequence_length=48)
def _() -> Any:
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=8, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_channels=[32, 32], text_emb_dim=64, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
        max_resolution=(128, 128), llama_layers=(0, 1),
    )
    return d.HiDreamImagePipeline(
        scheduler=flow(), vae=flux_vae(), text_encoder=clip_text(project=32, length=128), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(project=32, length=128), tokenizer_2=clip_tokenizer(), text_encoder_3=t5_text(),
        tokenizer_3=t5_tokenizer(), text_encoder_4=decoder_text("LlamaForCausalLM"), tokenizer_4=qwen_tokenizer(), transformer=transformer,
    )


# --- Gemma -------------------------------------------------------------------------------------------------------------

SANA: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 32, "sample_size": 8, "patch_size": 1,
}
SANA_CALL = LARGER | {"complex_human_instruction": None, "use_resolution_binning": False}


def sana(kind: str = "SanaPipeline", *, scheduler: Any = None, config: dict[str, Any] = SANA, **more: Any) -> Any:
    return getattr(d, kind)(
        tokenizer=gemma_tokenizer(), text_encoder=gemma_text(), vae=sana_vae(), transformer=d.SanaTransformer2DModel(**config),
        scheduler=scheduler or flow(), **more,
    )


tiny("SanaPipeline", **SANA_CALL)(sana)
tiny("SanaPAGPipeline", **SANA_CALL, pag_scale=3.0)(partial(sana, "SanaPAGPipeline", pag_applied_layers=["transformer_blocks.0"]))
tiny("SanaSprintPipeline", **SANA_CALL | {"num_inference_steps": 2})(lambda: sana(
    "SanaSprintPipeline", scheduler=d.SCMScheduler(), config=SANA | {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
))


@tiny("LuminaPipeline", **IMAGE)
def _() -> Any:
    transformer = d.LuminaNextDiT2DModel(
        sample_size=4, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=1, num_kv_heads=1, multiple_of=16,
        norm_eps=1e-5, learn_sigma=True, cross_attention_dim=32, scaling_factor=1.0,
    )
    return d.LuminaPipeline(
        transformer=transformer, vae=vae(), scheduler=flow(), tokenizer=gemma_tokenizer(), text_encoder=gemma_text(kind="GemmaForCausalLM")
    )


@tiny("Lumina2Pipeline", **LARGER)
def _() -> Any:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=8, num_layers=2, num_attention_heads=1, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=[4, 2, 2], axes_lens=[300, 16, 16], cap_feat_dim=32,
    )
    return d.Lumina2Pipeline(
        transformer=transformer, scheduler=flow(shift=6.0), vae=flux_vae(), text_encoder=gemma_text(), tokenizer=gemma_tokenizer()
    )


def prx_transformer(**config: Any) -> Any:
    return d.PRXTransformer2DModel(**{
        "patch_size": 1, "in_channels": 4, "context_in_dim": 32, "hidden_size": 8, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
        "axes_dim": [2, 2],
    } | config)


def t5_gemma_text(kind: str = "T5GemmaEncoder") -> Any:
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    module = {**DECODER, "hidden_size": 32, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 4}
    config = t.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    if kind != "T5GemmaEncoder":
        return getattr(t, kind)(config)
    encoder = T5GemmaEncoder(config.encoder)
    encoder.config.encoder = module  # diffusers reads the folder as that of a whole T5Gemma
    return encoder


tiny("PRXPipeline", **LARGER, use_resolution_binning=False)(lambda: d.PRXPipeline(
    transformer=prx_transformer(), vae=vae(shift=0.0, quant=False), scheduler=flow(), text_encoder=t5_gemma_text(),
    tokenizer=gemma_tokenizer(256),
))
tiny("PRXPixelPipeline", **IMAGE, use_resolution_binning=False)(lambda: d.PRXPixelPipeline(
    transformer=prx_transformer(in_channels=3, bottleneck_size=8, resolution_embeds=True), scheduler=flow(),
    text_encoder=decoder_text("Qwen3Model"), tokenizer=qwen_tokenizer(), prompt_max_tokens=32,
))

# --- Qwen, Llama, GLM, Mistral -----------------------------------------------------------------------------------------

TEXT = {"max_sequence_length": 128}
FLUX2_CALL = IMAGE | TEXT | {"text_encoder_out_layers": (1,)}


def flux2_transformer(**config: Any) -> Any:
    return d.Flux2Transformer2DModel(**{
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 4, 4],
    } | config)


def flux2_klein(kind: str) -> Any:
    return getattr(d, kind)(
        scheduler=flow(), text_encoder=decoder_text("Qwen3ForCausalLM"), tokenizer=qwen_tokenizer(), vae=flux2_vae(),
        transformer=flux2_transformer(guidance_embeds=False),
    )


def mistral3(kind: str = "Mistral3ForConditionalGeneration") -> Any:
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37,
        "image_size": 30, "patch_size": 6, "head_dim": 8,
    }
    text = DECODER | {"model_type": "mistral", "hidden_size": 32, "sliding_window": None}
    return getattr(t, kind)(t.Mistral3Config(text_config=text, vision_config=vision, vision_feature_layer=-1, image_token_index=261))


tiny("Flux2Pipeline", **FLUX2_CALL)(lambda: d.Flux2Pipeline(
    scheduler=flow(), text_encoder=mistral3(), tokenizer=qwen_tokenizer(), vae=flux2_vae(), transformer=flux2_transformer()
))
tiny("Flux2KleinPipeline", **FLUX2_CALL)(partial(flux2_klein, "Flux2KleinPipeline"))
tiny("Flux2KleinKVPipeline", **FLUX2_CALL)(partial(flux2_klein, "Flux2KleinKVPipeline"))
tiny("ErnieImagePipeline", **IMAGE)(lambda: d.ErnieImagePipeline(
    transformer=d.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=16, out_channels=16, text_in_dim=32,
        rope_axes_dim=(8, 4, 4),
    ), vae=flux2_vae(), text_encoder=mistral3("Mistral3Model"), tokenizer=qwen_tokenizer(), scheduler=flow(),
))
tiny("OvisImagePipeline", **IMAGE | TEXT)(lambda: d.OvisImagePipeline(
    scheduler=flow(), vae=flux_vae(), text_encoder=decoder_text("Qwen3Model"), tokenizer=qwen_tokenizer(),
    transformer=d.OvisImageTransformer2DModel(**FLUX, out_channels=16),
))
tiny("LongCatImagePipeline", **IMAGE, enable_prompt_rewrite=False)(lambda: d.LongCatImagePipeline(
    scheduler=flow(), vae=flux_vae(16), text_encoder=qwen25_vl_text(), tokenizer=qwen_tokenizer(), text_processor=qwen_tokenizer(),
    transformer=d.LongCatImageTransformer2DModel(**FLUX | {"in_channels": 64}, pooled_projection_dim=32),
))


def qwen_image(kind: str, transformer: Any, **more: Any) -> Any:
    return getattr(d, kind)(transformer=transformer, vae=qwen_vae(), scheduler=flow(), **more)


def qwen() -> Any:
    return qwen_image("QwenImagePipeline", d.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    ), text_encoder=qwen25_vl_text(), tokenizer=qwen_tokenizer())


tiny("QwenImagePipeline", **LARGER | TEXT)(qwen)
tiny("QwenImagePipeline:guided", **LARGER | TEXT, negative_prompt=" ", true_cfg_scale=4.0)(qwen)
tiny("Krea2Pipeline", **LARGER | TEXT)(lambda: qwen_image("Krea2Pipeline", d.Krea2Transformer2DModel(
    in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
    timestep_embed_dim=8, text_hidden_dim=32, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
    text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
), text_encoder=qwen3_vl_text(kind="Qwen3VLModel"), tokenizer=qwen_tokenizer(), text_encoder_select_layers=(0, 1, 2)))
tiny("NucleusMoEImagePipeline", **LARGER | TEXT, return_index=-1)(
    lambda: qwen_image("NucleusMoEImagePipeline", d.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4), moe_enabled=False, capacity_factors=[8.0, 8.0],
    ), text_encoder=qwen3_vl_text(), processor=qwen3_vl_processor())
)


def z_image(kind: str, **more: Any) -> Any:
    siglip = {} if kind == "ZImagePipeline" else {"siglip_feat_dim": 16}
    transformer = d.ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32], **siglip,
    )
    return getattr(d, kind)(
        transformer=transformer, vae=flux_vae(16), scheduler=flow(), text_encoder=decoder_text("Qwen3Model"), tokenizer=qwen_tokenizer(),
        **more,
    )


def siglip() -> dict[str, Any]:
    config = t.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=4
    )
    return {"siglip": t.Siglip2VisionModel(config), "siglip_processor": t.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)}


tiny("ZImagePipeline", **LARGER | TEXT, cfg_normalization=False)(partial(z_image, "ZImagePipeline"))
tiny("ZImageOmniPipeline", **LARGER | TEXT)(lambda: z_image("ZImageOmniPipeline", **siglip()))


@tiny("Ideogram4Pipeline", **IMAGE | TEXT, guidance_scale=3.0, guidance_schedule=None)
def _() -> Any:
    config = {
        "in_channels": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "intermediate_size": 32, "adaln_dim": 16,
        "llm_features_dim": 13 * 32, "rope_theta": 10_000, "mrope_section": (2, 1, 1),
    }
    return d.Ideogram4Pipeline(
        scheduler=flow(), vae=flux2_vae(), text_encoder=qwen3_vl_text(kind="Qwen3VLModel", layers=36), tokenizer=qwen_tokenizer(),
        transformer=d.Ideogram4Transformer2DModel(**config), unconditional_transformer=d.Ideogram4Transformer2DModel(**config),
    )


@tiny("BriaFiboPipeline", **LARGER | TEXT)
def _() -> Any:
    transformer = d.BriaFiboTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=64,
        text_encoder_dim=32, axes_dims_rope=[0, 4, 4],
    )
    encoder = decoder_text("SmolLM3ForCausalLM", vocab_size=128_001, pad_token_id=0, bos_token_id=257, eos_token_id=258)
    return d.BriaFiboPipeline(
        scheduler=flow(), text_encoder=encoder, tokenizer=qwen_tokenizer(), transformer=transformer, vae=wan_vae()
    )


@tiny("BriaFibo2Pipeline", **IMAGE)
def _() -> Any:
    transformer = d.BriaFibo2Transformer2DModel(
        in_channels=4, dim=96, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=96, injection_layer_ids=(1,), perceiver_num_layers=1,
        min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=1, gist_min_text_len=2, gist_max_text_len=8, axes_dims=(16, 16, 16),
        axes_lens=(512, 32, 32),
    )
    return d.BriaFibo2Pipeline(
        transformer=transformer, scheduler=flow(), vae=flux2_vae(), text_encoder=qwen3_vl_text(layers=36), processor=qwen3_vl_processor()
    )


@tiny("QwenImage21Pipeline", **LARGER)
def _() -> Any:
    transformer = d.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, context_in_dim=32, axes_dims_rope=(4, 2, 2)
    )
    autoencoder = d.AutoencoderKLQwenImage21(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, is_residual=False
    )
    return d.QwenImage21Pipeline(
        scheduler=flow(), vae=autoencoder, text_encoder=qwen3_vl_text(), processor=qwen3_vl_processor(whole=True), transformer=transformer
    )


@tiny("CogView4Pipeline", **IMAGE, max_sequence_length=16, negative_prompt="blurred")
def _() -> Any:
    transformer = d.CogView4Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4, text_embed_dim=32, time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear", shift=1.0)
    encoder = decoder_text("GlmModel", pad_token_id=0)
    return d.CogView4Pipeline(
        transformer=transformer, vae=vae(), scheduler=scheduler, text_encoder=encoder, tokenizer=qwen_tokenizer()
    )


@tiny("OmniGenPipeline", **IMAGE)
def _() -> Any:
    transformer = d.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=1, in_channels=4, time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]}, vocab_size=300, pad_token_id=0,
    )
    return d.OmniGenPipeline(
        transformer=transformer, vae=vae(blocks=4), scheduler=flow(invert_sigmas=True, num_train_timesteps=1, shift=1.0),
        tokenizer=qwen_tokenizer(),
    )


@tiny("HunyuanImagePipeline", **IMAGE)
def _() -> Any:
    transformer = d.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        patch_size=(1, 1), text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(4, 4),
    )
    autoencoder = d.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=8, sample_size=128, scaling_factor=0.476986,
    )
    guiders = {
        name: d.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=step)
        for name, step in (("guider", 2), ("ocr_guider", 3))
    }
    return d.HunyuanImagePipeline(
        transformer=transformer, vae=autoencoder, scheduler=flow(shift=7.0), text_encoder=qwen25_vl_text(), tokenizer=qwen_tokenizer(),
        text_encoder_2=t5_text(vocab=384), tokenizer_2=t.ByT5Tokenizer(), **guiders,
    )


def kandinsky5(kind: str, autoencoder: Any, *, blocks: int = 2) -> Any:
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=16, in_text_dim=32, in_text_dim2=32, time_dim=16, out_visual_dim=16, model_dim=16, ff_dim=32, num_text_blocks=1,
        num_visual_blocks=blocks, axes_dims=(1, 1, 2), attention_type="regular",
    )
    return getattr(d, kind)(
        vae=autoencoder, text_encoder=qwen25_vl_text(), tokenizer=qwen_tokenizer(), text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(), transformer=transformer, scheduler=flow(shift=7.0),
    )


tiny("Kandinsky5T2IPipeline", num_inference_steps=2, max_sequence_length=64)(lambda: kandinsky5("Kandinsky5T2IPipeline", flux_vae(16), blocks=1))


@tiny("GlmImagePipeline", **LARGER, max_sequence_length=16)
def _() -> Any:
    transformer = d.GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32, time_embed_dim=16,
        condition_dim=8, prior_vq_quantizer_codebook_size=128,
    )
    text = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vision_vocab_size": 128, "pad_token_id": 0, "eos_token_id": 399,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": (4, 2, 2), "partial_rotary_factor": 1.0},
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 32, "patch_size": 8, "intermediate_size": 32}
    first = t.GlmImageForConditionalGeneration(t.GlmImageConfig(
        text_config=text, vision_config=vision, vq_config={"embed_dim": 32, "num_embeddings": 128, "latent_channels": 32},
        image_token_id=261, image_start_token_id=263, image_end_token_id=264,
    ))
    named = {"image_token": "<|image_pad|>", "grid_bos_token": "<|vision_start|>", "grid_eos_token": "<|vision_end|>"}
    processor = t.GlmImageProcessor(
        image_processor=t.GlmImageImageProcessorPil(), tokenizer=qwen_tokenizer(bos_token="<think>", extra_special_tokens=named)
    )
    processor.chat_template = CHAT
    return d.GlmImagePipeline(
        tokenizer=t5_tokenizer(), processor=processor, text_encoder=t5_text(), vision_language_encoder=first, scheduler=flow(),
        vae=vae(blocks=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4), transformer=transformer,
    )
