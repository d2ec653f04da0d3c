"""Adapters to one ``denoise(x, t, cond)`` call, layer discovery, and the embedded reference models."""

from mpqsearch.models.denoiser import Condition, Denoiser, Denoises, adapt, weights_digest
from mpqsearch.models.discover import discover, example_condition
from mpqsearch.models.loader import EMBEDDED, REFERENCE, load_model

__all__ = [
    "EMBEDDED",
    "REFERENCE",
    "Condition",
    "Denoiser",
    "Denoises",
    "adapt",
    "discover",
    "example_condition",
    "load_model",
    "weights_digest",
]
