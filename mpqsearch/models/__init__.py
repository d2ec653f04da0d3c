"""Adapters to one ``denoise(x, t, cond)`` call, layer discovery, and the embedded reference models."""

from mpqsearch.models.calls import Call, Calls, capture, load_calls, make_call, save_calls
from mpqsearch.models.denoiser import Condition, Denoiser, Denoises, Given, adapt, weights_digest
from mpqsearch.models.devices import resolve_device
from mpqsearch.models.discover import discover, example_condition
from mpqsearch.models.loader import load_model
from mpqsearch.models.weights import StreamedModel, discover_streamed, open_streamed
from mpqsearch.sources import EMBEDDED, REFERENCE

__all__ = [
    "EMBEDDED",
    "REFERENCE",
    "Call",
    "Calls",
    "Condition",
    "Denoiser",
    "Denoises",
    "Given",
    "StreamedModel",
    "adapt",
    "capture",
    "discover",
    "discover_streamed",
    "example_condition",
    "load_calls",
    "load_model",
    "make_call",
    "open_streamed",
    "resolve_device",
    "save_calls",
    "weights_digest",
]
