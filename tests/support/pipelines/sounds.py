"""Pipelines that make sound."""
# fmt: off

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.support.denoisers import disturb
from tests.support.pipelines.images import t5_gemma_text
from tests.support.pipelines.parts import *
from tests.support.pipelines.registry import tiny


def oobleck(channels: int = 4) -> Any:
    return d.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=channels, channel_multiples=[2, 4],
        sampling_rate=4,
    )


@tiny("StableAudioPipeline", num_inference_steps=3, audio_end_in_s=1.0)
def _() -> Any:
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    transformer = d.StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=4, num_key_value_attention_heads=2, out_channels=4,
        num_attention_heads=2, cross_attention_input_dim=32, global_states_input_dim=64, cross_attention_dim=4, time_proj_dim=8,
    )
    return d.StableAudioPipeline(
        vae=oobleck(), text_encoder=t5_text(), tokenizer=t5_tokenizer(10), transformer=transformer,
        projection_model=StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32),
        scheduler=d.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"),
    )


@tiny("StableAudio3Pipeline", num_inference_steps=3, duration=1.0)
def _() -> Any:
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    transformer = d.StableAudio3DiTModel(
        io_channels=8, embed_dim=32, depth=2, num_heads=4, cond_token_dim=32, global_cond_dim=32, local_add_cond_dim=5,
        timestep_features_dim=16, ff_mult=2, num_memory_tokens=3, use_differential_attention=False,
    )
    autoencoder = d.AutoencoderSAME(
        audio_channels=2, patch_size=2, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,), encoder_transformer_depths=(1,),
        latent_dim=8, use_differential_attention=False, dim_heads=4, ff_mult=2, sampling_rate=16,
    )
    disturb(autoencoder)
    return d.StableAudio3Pipeline(
        transformer=transformer, scheduler=flow(num_train_timesteps=1, shift=1.0), vae=autoencoder,
        text_encoder=t5_gemma_text("T5GemmaEncoderModel"), tokenizer=gemma_tokenizer(64),
        duration_embedder=StableAudio3DurationEmbedder(output_dim=32, fourier_dim=16),
    )


@tiny("LongCatAudioDiTPipeline", num_inference_steps=3, audio_duration_s=0.1)
def _() -> Any:
    transformer = d.LongCatAudioDiTTransformer(
        dit_dim=64, dit_depth=1, dit_heads=4, dit_text_dim=32, latent_dim=8, text_conv=False
    )
    autoencoder = d.LongCatAudioDiTVae(
        in_channels=1, channels=16, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16, downsampling_ratio=2,
    )
    return d.LongCatAudioDiTPipeline(
        vae=autoencoder, text_encoder=t5_text(kind="UMT5"), tokenizer=t5_tokenizer(), transformer=transformer
    )


@tiny("AceStepPipeline", num_inference_steps=2, audio_duration=4.0, max_text_length=64)
def _() -> Any:
    from diffusers.pipelines.ace_step import modeling_ace_step as parts

    size: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
    }
    transformer = d.AceStepTransformer1DModel(**size, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8)
    condition = parts.AceStepConditionEncoder(
        **size, text_hidden_dim=32, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1
    )
    pooled = size | {"audio_acoustic_hidden_dim": 8, "pool_window_size": 2, "num_attention_pooler_hidden_layers": 1}
    return d.AceStepPipeline(
        transformer=transformer, condition_encoder=condition, vae=oobleck(8), text_encoder=decoder_text("Qwen3Model"),
        tokenizer=qwen_tokenizer(), scheduler=flow(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=parts.AceStepAudioTokenizer(**pooled, fsq_dim=32, fsq_input_levels=[4, 4, 4]),
        audio_token_detokenizer=parts.AceStepAudioTokenDetokenizer(**pooled),
    )


@tiny("AudioLDM2Pipeline", num_inference_steps=3, audio_length_in_s=0.1, max_new_tokens=4, num_waveforms_per_prompt=1)
def _() -> Any:
    unet = d.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=32, cross_attention_dim=((None, 16, 32), (None, 16, 32)),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    text = {
        "vocab_size": 300, "hidden_size": 8, "intermediate_size": 37, "num_attention_heads": 1, "num_hidden_layers": 1, "projection_dim": 16,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }
    audio = {
        "spec_size": 8, "window_size": 4, "num_mel_bins": 8, "intermediate_size": 37, "depths": [1, 1], "num_attention_heads": [1, 1],
        "num_hidden_layers": 1, "hidden_size": 192, "projection_dim": 16, "patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4,
    }
    clap = t.ClapModel(t.ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    vocoder = t.SpeechT5HifiGan(t.SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]], normalize_before=False,
    ))
    for parameter in vocoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    language = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=300, n_positions=128))
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *LETTERS]
    return d.AudioLDM2Pipeline(
        vae=vae(in_channels=1, out_channels=1), text_encoder=clap, text_encoder_2=t5_text(), language_model=language, unet=unet,
        projection_model=d.AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16),
        tokenizer=t.RobertaTokenizer(vocab=numbered(letters), merges=[], model_max_length=77), tokenizer_2=t5_tokenizer(),
        feature_extractor=t.ClapFeatureExtractor(), scheduler=d.DDIMScheduler(**SD, clip_sample=False), vocoder=vocoder,
    )
