"""Text encoders, autoencoders and schedulers that tiny pipelines share."""
# fmt: off

from __future__ import annotations

import functools
import io
import string
import tempfile
from pathlib import Path
from typing import Any

import diffusers as d  # both libraries load a class when it is asked for
import transformers as t
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

# --- Tokenizers of single characters -----------------------------------------------------------------------------------

CHARACTERS = sorted(set(string.printable) - set(string.whitespace))
LETTERS = sorted(ByteLevel.alphabet())


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer(length: int = 77) -> Any:
    tokens = [*LETTERS, *(a + "</w>" for a in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return t.CLIPTokenizer(vocab=numbered(tokens), merges=[], model_max_length=length)


def t5_tokenizer(length: int = 77) -> Any:
    letters = [(a, -3.0 - i / 20) for i, a in enumerate(["▁", *CHARACTERS])]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return t.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def roberta_tokenizer(length: int = 77) -> Any:
    """That of XLM-RoBERTa."""
    letters = [(a, -3.0 - i / 20) for i, a in enumerate(["▁", *CHARACTERS])]
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, ("<mask>", 0.0)]
    return t.XLMRobertaTokenizer(vocab=vocab, model_max_length=length)


def bert_tokenizer(length: int = 77) -> Any:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *("##" + a for a in CHARACTERS)]
    return t.BertTokenizer(vocab=numbered(tokens), model_max_length=length)


def gemma_tokenizer(length: int = 300) -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    return t.GemmaTokenizer(vocab=numbered(tokens), merges=[], model_max_length=length, add_bos_token=True)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ c.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<think>",
    "</think>",
]


def qwen_tokenizer(length: int = 1024, **more: Any) -> Any:
    return t.Qwen2Tokenizer(
        vocab=numbered(LETTERS + SPECIAL), merges=[], model_max_length=length, chat_template=CHAT,
        **{"additional_special_tokens": SPECIAL[1:]} | more,
    )


@functools.cache
def _sentencepiece() -> tempfile.TemporaryDirectory[str]:
    """A folder with a model of sentencepiece; it lives as long as the process."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(CHARACTERS)] * 2), model_writer=written, model_type="char", vocab_size=len(CHARACTERS) + 4,
        hard_vocab_limit=False, minloglevel=2,
    )
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "tokenizer.model").write_bytes(written.getvalue())
    return folder


def chatglm_tokenizer() -> Any:
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    return ChatGLMTokenizer(f"{_sentencepiece().name}/tokenizer.model", model_max_length=64)


# --- Text encoders of two layers ---------------------------------------------------------------------------------------


def clip_text(width: int = 32, *, project: int = 0, act: str = "quick_gelu", length: int = 77) -> nn.Module:
    config = t.CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, hidden_act=act,
        max_position_embeddings=length, bos_token_id=512, eos_token_id=513, pad_token_id=513, projection_dim=project or width,
    )
    return (t.CLIPTextModelWithProjection if project else t.CLIPTextModel)(config)


def t5_text(width: int = 32, *, kind: str = "T5", vocab: int = 128) -> nn.Module:
    """A T5 or UMT5 encoder."""
    config = getattr(t, f"{kind}Config")(
        vocab_size=vocab, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0
    )
    return getattr(t, f"{kind}EncoderModel")(config)


DECODER: dict[str, Any] = {
    "vocab_size": 300, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 2048,
}


def decoder_text(kind: str, width: int = 32, **config: Any) -> nn.Module:
    """A decoder, such as ``Qwen3Model`` or ``LlamaForCausalLM``."""
    family = kind.removesuffix("Model").removesuffix("ForCausalLM")
    return getattr(t, kind)(getattr(t, f"{family}Config")(**DECODER | {"hidden_size": width} | config))


def gemma_text(width: int = 32, kind: str = "Gemma2Model") -> nn.Module:
    return decoder_text(kind, width, bos_token_id=2, eos_token_id=1, pad_token_id=0)


_ROPE: dict[str, Any] = {"rope_type": "default", "type": "default"}


def qwen25_vl_text(width: int = 32) -> nn.Module:
    text = DECODER | {"hidden_size": width, "rope_scaling": _ROPE | {"mrope_section": [1, 1, 2]}, "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 37, "num_heads": 2, "out_hidden_size": width}
    return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=261, video_token_id=262, vision_start_token_id=259, vision_end_token_id=260
    ))


def qwen3_vl_text(width: int = 32, kind: str = "Qwen3VLForConditionalGeneration", layers: int = 2) -> nn.Module:
    text = DECODER | {
        "hidden_size": width, "num_hidden_layers": layers, "rope_scaling": _ROPE | {"mrope_section": [1, 1, 2]}, "rope_theta": 1e6
    }
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 37, "num_heads": 2, "out_hidden_size": width, "deepstack_visual_indexes": [0]
    }
    return getattr(t, kind)(t.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=261, video_token_id=262, vision_start_token_id=259, vision_end_token_id=260
    ))


def qwen3_vl_processor(*, whole: bool = False) -> Any:
    """Its tokenizer, all that text needs of it; the ``whole`` one asks for torchvision."""
    if not whole:
        return qwen_tokenizer()
    return t.Qwen3VLProcessor(
        image_processor=t.Qwen2VLImageProcessor(), tokenizer=qwen_tokenizer(), video_processor=t.Qwen3VLVideoProcessor(), chat_template=CHAT
    )


# --- Autoencoders ------------------------------------------------------------------------------------------------------


def vae(channels: int = 4, *, scale: float = 0.18215, shift: float | None = None, quant: bool = True, blocks: int = 2, **more: Any) -> Any:
    return d.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 16, 16, 16)[:blocks], down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=scale,
        shift_factor=shift, use_quant_conv=quant, use_post_quant_conv=quant, **more,
    )


def flux_vae(channels: int = 4, *, blocks: int = 2) -> Any:
    return vae(channels, scale=0.3611, shift=0.1159, quant=False, blocks=blocks)


def flux2_vae(channels: int = 4) -> Any:
    return d.AutoencoderKLFlux2(
        sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
    )


def wan_vae(channels: int = 16, **more: Any) -> Any:
    return d.AutoencoderKLWan(**{
        "base_dim": 3, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]
    } | more)


def qwen_vae() -> Any:
    return d.AutoencoderKLQwenImage(
        base_dim=12, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def hunyuan_vae(channels: int = 4, **more: Any) -> Any:
    return d.AutoencoderKLHunyuanVideo(**{
        "latent_channels": channels, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    } | more)


def sana_vae() -> Any:
    return d.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1], downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )


# --- Schedulers --------------------------------------------------------------------------------------------------------

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Betas of Stable Diffusion."""


def flow(**config: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | config)
