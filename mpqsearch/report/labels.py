"""What metrics are called, and how their numbers are written."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricText:
    """``title`` for an axis, ``heading`` for a column, ``places`` after the decimal point, ``unit`` behind a number."""

    title: str
    heading: str
    places: int
    unit: str = ""


_TEXTS = {
    "fd_data": MetricText("Fréchet distance to data", "FD to data", 3),
    "fd_fp": MetricText("Fréchet distance to full precision", "FD to full precision", 3),
    "kid_data": MetricText("Kernel distance to data", "KD to data", 3),
    "kid_fp": MetricText("Kernel distance to full precision", "KD to full precision", 3),
    "paired_psnr": MetricText("PSNR to full precision, same noise (dB)", "PSNR, dB", 2, " dB"),
    "paired_mse": MetricText("Squared error to full precision, same noise", "Squared error", 4),
    "class_accuracy": MetricText("Samples in the class that was asked for", "Right class", 3),
    "clip_score": MetricText("CLIP score of picture and prompt", "CLIP score", 2),
    "clip_iqa": MetricText("CLIP-IQA, quality of the picture", "CLIP-IQA", 3),
    "pick_score": MetricText("PickScore of picture and prompt", "PickScore", 2),
    "lpips": MetricText("LPIPS to full precision, same noise", "LPIPS", 3),
    "ssim": MetricText("SSIM to full precision, same noise", "SSIM", 3),
    "cmmd_data": MetricText("CMMD to data", "CMMD to data", 3),
    "cmmd_fp": MetricText("CMMD to full precision", "CMMD to full precision", 3),
    "attributes_recognised": MetricText("Attributes asked for that are recognised", "Attributes", 3),
}

BITS_TITLE = "stored bits per parameter, everything counted"


def metric_text(name: str) -> MetricText:
    """The texts of a metric; its own name for one that is not known here."""
    return _TEXTS.get(name, MetricText(name, name, 4))


def number(value: float, places: int) -> str:
    """Fixed decimals, or three digits in scientific form where these would show nothing but zeros; "" for NaN."""
    if value != value:
        return ""
    if value and abs(value) < 10**-places:
        return f"{value:.2e}"
    return f"{value:,.{places}f}"


def slug(text: str) -> str:
    """Letters, digits and dashes of a label, for file names and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"
