"""Video pipelines."""
# fmt: off

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import diffusers as d
import transformers as t

from tests.support.pipelines.images import kandinsky5
from tests.support.pipelines.parts import *
from tests.support.pipelines.registry import VIDEO, tiny

SHORT = {"max_sequence_length": 48}
LARGER = VIDEO | {"height": 32, "width": 32}


def with_t5(kind: str, transformer: Any, autoencoder: Any, scheduler: Any, *, encoder: str = "T5", **more: Any) -> Any:
    """A pipeline of one T5 encoder."""
    return getattr(d, kind)(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(kind=encoder), vae=autoencoder, transformer=transformer, scheduler=scheduler, **more
    )


# --- Wan and its kin ---------------------------------------------------------------------------------------------------

WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 32,
    "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}


def unipc(**config: Any) -> Any:
    return d.UniPCMultistepScheduler(**{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0} | config)


def wan(*, two: bool = False) -> Any:
    second = {"transformer_2": d.WanTransformer3DModel(**WAN), "boundary_ratio": 0.875} if two else {"transformer_2": None}
    return with_t5("WanPipeline", d.WanTransformer3DModel(**WAN), wan_vae(), unipc(), encoder="UMT5", **second)


def sky_reels(kind: str) -> Any:
    return with_t5(kind, d.SkyReelsV2Transformer3DModel(**WAN), wan_vae(), unipc(flow_shift=8.0), encoder="UMT5")


def any_flow(kind: str, transformer: str, **config: Any) -> Any:
    module = getattr(d, transformer)(**WAN, gate_value=0.25, deltatime_type="r", **config)
    return with_t5(kind, module, wan_vae(), d.FlowMapEulerDiscreteScheduler(shift=5.0), encoder="UMT5")


def helios(kind: str, **scheduler: Any) -> Any:
    config = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
    transformer = d.HeliosTransformer3DModel(
        **config, rope_dim=(4, 4, 4), has_multi_term_memory_patch=True, guidance_cross_attn=True, zero_history_timestep=True,
        is_amplify_history=False,
    )
    return with_t5(kind, transformer, wan_vae(), d.HeliosScheduler(**scheduler), encoder="UMT5")


tiny("WanPipeline", **VIDEO)(wan)
tiny("WanPipeline:2.2", **VIDEO)(partial(wan, two=True))
tiny("SkyReelsV2Pipeline", **VIDEO | SHORT)(partial(sky_reels, "SkyReelsV2Pipeline"))
tiny("SkyReelsV2DiffusionForcingPipeline", **VIDEO | SHORT)(partial(sky_reels, "SkyReelsV2DiffusionForcingPipeline"))
tiny("AnyFlowPipeline", **VIDEO | SHORT)(partial(any_flow, "AnyFlowPipeline", "AnyFlowTransformer3DModel"))
tiny("AnyFlowFARPipeline", **VIDEO | SHORT)(lambda: any_flow(
    "AnyFlowFARPipeline", "AnyFlowFARTransformer3DModel", compressed_patch_size=(1, 4, 4), full_chunk_limit=3, chunk_partition=(1, 1, 1)
))
tiny("HeliosPipeline", **VIDEO | SHORT, guidance_scale=1.0)(
    partial(helios, "HeliosPipeline", stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
)
tiny("HeliosPyramidPipeline", height=64, width=64, num_frames=9, **SHORT, pyramid_num_inference_steps_list=[1, 1, 1])(
    partial(helios, "HeliosPyramidPipeline", use_dynamic_shifting=True, gamma=0.3)  # 1/3 makes a covariance of rank 3
)


@tiny("MotifVideoPipeline", **VIDEO | SHORT)
def _() -> Any:
    text = {k: v for k, v in DECODER.items() if k != "max_position_embeddings"} | {"hidden_size": 32, "dropout_rate": 0.0}
    encoder = t.T5Gemma2Encoder(t.T5Gemma2EncoderConfig(text_config=t.T5Gemma2TextConfig(**text)))
    transformer = d.MotifVideoTransformer3DModel(
        in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1, patch_size=1,
        text_embed_dim=32, rope_axes_dim=(4, 4, 4),
    )
    return d.MotifVideoPipeline(
        transformer=transformer, vae=wan_vae(), scheduler=flow(shift=7.0), text_encoder=encoder, tokenizer=gemma_tokenizer(),
        feature_extractor=None, guider=d.AdaptiveProjectedGuidance(),
    )


@tiny("SanaVideoPipeline", num_inference_steps=3, height=32, width=32, frames=9, complex_human_instruction=[], use_resolution_binning=False)
def _() -> Any:
    transformer = d.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=32, sample_size=8, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
    )
    scheduler = d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return d.SanaVideoPipeline(
        transformer=transformer, vae=wan_vae(), scheduler=scheduler, text_encoder=gemma_text(), tokenizer=gemma_tokenizer()
    )


# --- T5 ----------------------------------------------------------------------------------------------------------------


@tiny("CogVideoXPipeline", **VIDEO, max_sequence_length=16)
def _() -> Any:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=32, num_layers=1,
        sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=16,
    )
    autoencoder = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )
    scheduler = d.CogVideoXDDIMScheduler(
        **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing",
        clip_sample=False,
    )
    return with_t5("CogVideoXPipeline", transformer, autoencoder, scheduler)


@tiny("LTXPipeline", **LARGER)
def _() -> Any:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, num_layers=1,
        caption_channels=32,
    )
    autoencoder = d.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False), patch_size=1,
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
    )
    return with_t5("LTXPipeline", transformer, autoencoder, flow(shift=1.0, use_dynamic_shifting=True))


@tiny("AllegroPipeline", num_inference_steps=2, height=128, width=128, num_frames=24, max_sequence_length=16)
def _() -> Any:
    transformer = d.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=24, sample_width=8,
        sample_height=8, sample_frames=8, caption_channels=32,
    )
    autoencoder = d.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=128,
    )
    autoencoder.enable_tiling()  # it decodes no other way
    return with_t5("AllegroPipeline", transformer, autoencoder, d.DDIMScheduler())


@tiny("LattePipeline", num_inference_steps=3, height=16, width=16, video_length=2, clean_caption=False)
def _() -> Any:
    transformer = d.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32, in_channels=4,
        cross_attention_dim=24, out_channels=8, attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False,
        video_length=2,
    )
    return with_t5("LattePipeline", transformer, vae(), d.DDIMScheduler())


@tiny("MochiPipeline", **VIDEO | {"num_frames": 7}, max_sequence_length=16)
def _() -> Any:
    transformer = d.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12, text_embed_dim=32,
        time_embed_dim=4, max_sequence_length=16,
    )
    autoencoder = d.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5, latents_mean=[0.0] * 12, latents_std=[1.0] * 12,
    )
    return with_t5("MochiPipeline", transformer, autoencoder, flow(shift=1.0))


# --- Cosmos ------------------------------------------------------------------------------------------------------------


class NoChecker:
    """Stands for the safety checker of Cosmos, whose package and weights are not here; these weights are random."""

    def to(self, *_: Any) -> NoChecker:
        return self

    def check_text_safety(self, _: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos_transformer(channels: int = 16, *, inputs: int = 0, text: int = 32) -> Any:
    return d.CosmosTransformer3DModel(
        in_channels=inputs or channels, out_channels=channels, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=text, adaln_lora_dim=4, max_size=(4, 32, 32),
        concat_padding_mask=False,  # torchvision resizes it
    )


def cosmos(kind: str, transformer: Any, autoencoder: Any, scheduler: Any, **text: Any) -> Any:
    text = text or {"text_encoder": t5_text(), "tokenizer": t5_tokenizer()}
    cls = getattr(d, kind)
    importlib.import_module(cls.__module__).CosmosSafetyChecker = NoChecker  # it makes one when it is loaded, too
    pipe = cls(transformer=transformer, vae=autoencoder, scheduler=scheduler, **text)
    pipe.register_to_config(safety_checker=(None, None))
    return pipe


@tiny("CosmosTextToWorldPipeline", **LARGER | SHORT)
def _() -> Any:
    autoencoder = d.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,),
        resolution=64, num_layers=2, scaling_factor=1.0, spatial_compression_ratio=4, temporal_compression_ratio=4,
    )
    scheduler = d.EDMEulerScheduler(sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    return cosmos("CosmosTextToWorldPipeline", cosmos_transformer(4), autoencoder, scheduler)


tiny("Cosmos2TextToImagePipeline", num_inference_steps=3, height=32, width=32, **SHORT)(
    lambda: cosmos("Cosmos2TextToImagePipeline", cosmos_transformer(), wan_vae(), flow(shift=1.0, use_karras_sigmas=True))
)
tiny("Cosmos2_5_PredictBasePipeline", **LARGER | {"num_frames": 3, "max_sequence_length": 128})(lambda: cosmos(
    "Cosmos2_5_PredictBasePipeline", cosmos_transformer(inputs=17, text=64), wan_vae(), d.UniPCMultistepScheduler(),
    text_encoder=qwen25_vl_text(), tokenizer=qwen_tokenizer(),
))


@tiny("Cosmos3OmniPipeline", num_inference_steps=3, height=16, width=16, num_frames=1)
def _() -> Any:
    transformer = d.Cosmos3OmniTransformer(
        head_dim=6, hidden_act="relu2", hidden_size=6, intermediate_size=12, latent_channel=16, latent_patch_size=1, num_attention_heads=1,
        num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=16, qk_norm_for_text=False, rope_axes_dim=[1, 1, 1], vocab_size=300,
    )
    return d.Cosmos3OmniPipeline(
        transformer=transformer, text_tokenizer=qwen_tokenizer(), vae=wan_vae(), scheduler=d.UniPCMultistepScheduler(),
        sound_tokenizer=None, safety_checker=None, enable_safety_checker=False,
    )


# --- Decoders as text encoders -----------------------------------------------------------------------------------------


@tiny("EasyAnimatePipeline", **VIDEO | {"num_frames": 5}, negative_prompt="blurred")
def _() -> Any:
    transformer = d.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=32, num_layers=1,
        sample_width=16, sample_height=16, patch_size=2,
    )
    autoencoder = d.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3), latent_channels=4, layers_per_block=1,
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3), block_out_channels=(8, 8, 8, 8), norm_num_groups=2,
        spatial_group_norm=False,
    )
    text = DECODER | {"hidden_size": 32, "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    encoder = t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=261, video_token_id=262, vision_start_token_id=259, vision_end_token_id=260
    ))
    return d.EasyAnimatePipeline(
        transformer=transformer, vae=autoencoder, scheduler=flow(shift=1.0), text_encoder=encoder, tokenizer=qwen_tokenizer()
    )


@tiny("HunyuanVideoPipeline", **VIDEO, max_sequence_length=32, prompt_template={"template": "{}", "crop_start": 0})
def _() -> Any:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
    )
    return d.HunyuanVideoPipeline(
        transformer=transformer, vae=hunyuan_vae(), scheduler=flow(shift=7.0), text_encoder=decoder_text("LlamaModel"),
        tokenizer=qwen_tokenizer(), text_encoder_2=clip_text(), tokenizer_2=clip_tokenizer(),
    )


@tiny("HunyuanVideo15Pipeline", **VIDEO | {"num_inference_steps": 2})
def _() -> Any:
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1, mlp_ratio=2.0,
        patch_size=1, text_embed_dim=32, text_embed_2_dim=32, image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )
    autoencoder = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4, temporal_compression_ratio=2,
        downsample_match_channel=False, upsample_match_channel=False,
    )
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
    encoder = t.Qwen2_5_VLTextModel(t.Qwen2_5_VLTextConfig(**DECODER, hidden_size=32, rope_scaling=rope))
    return d.HunyuanVideo15Pipeline(
        transformer=transformer, vae=autoencoder, scheduler=flow(shift=7.0), text_encoder=encoder, tokenizer=qwen_tokenizer(),
        text_encoder_2=t5_text(vocab=384), tokenizer_2=t.ByT5Tokenizer(), guider=d.ClassifierFreeGuidance(guidance_scale=6.0),
    )


tiny("Kandinsky5T2VPipeline", **LARGER | {"num_frames": 5}, max_sequence_length=64)(lambda: kandinsky5(
    "Kandinsky5T2VPipeline", hunyuan_vae(16, block_out_channels=(8, 8), down_block_types=("HunyuanVideoDownBlock3D",) * 2,
                                         up_block_types=("HunyuanVideoUpBlock3D",) * 2)
))


def gemma3_text() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = t.Gemma3TextConfig(hidden_size=32, **DECODER)
    return t.Gemma3ForConditionalGeneration(t.Gemma3Config(text_config=text, vision_config=t.SiglipVisionConfig(**vision), image_token_index=4))


def ltx2(kind: str = "LTX2Pipeline", **config: Any) -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    transformer = d.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4,
        audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2,
        caption_channels=32, rope_double_precision=False, rope_type="split", **config,
    )
    connectors = LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=3, video_connector_num_attention_heads=4, video_connector_attention_head_dim=8,
        video_connector_num_layers=1, video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1, audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32, rope_double_precision=False, causal_temporal_positioning=False, rope_type="split",
    )
    autoencoder = d.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,), patch_size=1, decoder_causal=False,
    )
    audio = d.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, in_channels=2, resolution=32, latent_channels=2,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )
    return getattr(d, kind)(
        transformer=transformer, vae=autoencoder, audio_vae=audio, scheduler=flow(shift=1.0), text_encoder=gemma3_text(),
        tokenizer=gemma_tokenizer(), connectors=connectors, vocoder=vocoder,
    )


tiny("LTX2Pipeline", **LARGER | {"num_frames": 5}, frame_rate=25.0, max_sequence_length=16)(ltx2)
tiny("LTX2DFRPipeline", height=32, width=32, num_frames=9, frame_rate=25.0, max_sequence_length=16, sigmas=[1.0, 0.5])(
    partial(ltx2, "LTX2DFRPipeline", use_keyframes_abs_pos_embedding=True)
)


@tiny("Kandinsky6TI2VAPipeline", **LARGER | {"num_frames": 5}, max_sequence_length=64, sample_audio=False)
def _() -> Any:
    transformer = d.Kandinsky6Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, in_text_dim=32, in_text_dim2=32, time_dim=16, model_dim=16, ff_dim=32, num_text_blocks=1,
        num_visual_blocks=1, axes_dims=(4, 2, 2), in_audio_dim=4, out_audio_dim=4, text_token_padding=True, fix_modulation=True,
    )
    return d.Kandinsky6TI2VAPipeline(
        vae=hunyuan_vae(16), text_encoder=qwen25_vl_text(), tokenizer=qwen_tokenizer(), text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(), transformer=transformer, scheduler=flow(shift=7.0),
    )
