"""Tiny models and profiles for tests, shipped so that extensions can use them too."""

from tests.support.tiny import (
    tiny_denoiser,
    tiny_dit,
    tiny_profile,
    tiny_prompted_pipeline,
    tiny_table,
    tiny_text_unet,
    tiny_unet,
)

__all__ = [
    "tiny_denoiser",
    "tiny_dit",
    "tiny_profile",
    "tiny_prompted_pipeline",
    "tiny_table",
    "tiny_text_unet",
    "tiny_unet",
]
