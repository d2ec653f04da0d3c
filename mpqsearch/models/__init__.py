"""Denoisers: loading their weights, finding their layers, recorded calls, and the embedded reference models."""

from mpqsearch.models.calls import Call, Calls, capture, load_calls, save_calls
from mpqsearch.models.denoiser import Denoiser, weights_digest
from mpqsearch.models.devices import resolve_device
from mpqsearch.models.discover import discover
from mpqsearch.models.runner import Denoises, Drawn, Hooks, Label, Parts, Runner
from mpqsearch.models.weights import StreamedModel, discover_streamed, open_streamed
from mpqsearch.sources import EMBEDDED, REFERENCE

__all__ = [
    "EMBEDDED",
    "REFERENCE",
    "Call",
    "Calls",
    "Denoiser",
    "Denoises",
    "Drawn",
    "Hooks",
    "Label",
    "Parts",
    "Runner",
    "StreamedModel",
    "capture",
    "discover",
    "discover_streamed",
    "load_calls",
    "open_streamed",
    "resolve_device",
    "save_calls",
    "weights_digest",
]
