"""Tiny models and profiles for tests, shipped so that extensions can use them too."""

from mpqsearch.testing.tiny import tiny_denoiser, tiny_dit, tiny_profile, tiny_table, tiny_unet

__all__ = ["tiny_denoiser", "tiny_dit", "tiny_profile", "tiny_table", "tiny_unet"]
