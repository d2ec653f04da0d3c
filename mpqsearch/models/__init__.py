"""Adapters to one `denoise(x, t, cond)` call, layer discovery, and the embedded reference models."""
