"""Reference statistics of real data: safetensors with mean, covariance and a subset of features, and what they were
made with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from mpqsearch.artifacts import atomic_write
from mpqsearch.errors import ArtifactError
from mpqsearch.metrics.extractors import FeatureExtractor
from mpqsearch.metrics.frechet import FeatureStatistics
from mpqsearch.models import REFERENCE
from mpqsearch.untrusted import build, parse_json, quoted


class _Made(TypedDict):
    """What is said of a data set beside its statistics."""

    n: str
    name: str
    extractor: str


@dataclass(frozen=True, kw_only=True)
class DataReference:
    """Statistics of a data set under one extractor; ``features`` ``[m, d]`` is a random subset for kernel distances."""

    name: str
    statistics: FeatureStatistics
    features: Tensor
    extractor: str


def save_reference(path: Path, features: Tensor, extractor: FeatureExtractor, name: str, subset: int = 2000) -> None:
    """Write the statistics of all ``features`` ``[n, d]`` and a seeded random subset of them."""
    from safetensors.torch import save

    statistics = FeatureStatistics.of(features)
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:subset]
    tensors = {
        "mean": statistics.mean,
        "covariance": statistics.covariance,
        "features": features[chosen].half().contiguous(),
    }
    metadata = {"n": str(statistics.n), "extractor": extractor.label, "name": name}
    with atomic_write(path) as handle:
        handle.write(save(tensors, metadata={"mpqsearch": json.dumps(metadata)}))


def load_reference(path: Path | None, extractor: FeatureExtractor) -> DataReference | None:
    """Statistics from ``path``, or the embedded ones of the extractor, or None when it has none.

    Raises `ArtifactError` when they were made with another extractor.
    """
    from safetensors import SafetensorError, safe_open

    file = path or REFERENCE / extractor.name / "reference.safetensors"
    if path is None and not file.is_file():
        return None
    if not file.is_file():
        raise ArtifactError(f"the reference statistics {file} do not exist")
    try:
        with safe_open(file, "pt") as handle:
            metadata = build(_Made, parse_json((handle.metadata() or {}).get("mpqsearch", "{}"), str(file)), str(file))
            mean, covariance, features = (handle.get_tensor(k) for k in ("mean", "covariance", "features"))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is damaged or holds no reference statistics: {error}") from error
    n, width = metadata["n"], len(mean) if mean.dim() else 0
    if not (n.isdecimal() and len(n) < 19 and covariance.shape == (width, width) and features.shape[1:] == (width,)):
        shapes = [tuple(t.shape) for t in (mean, covariance, features)]
        raise ArtifactError(f"{file}: mean, covariance and features of {quoted(n)} samples have the shapes {shapes}")
    if not all(bool(torch.isfinite(t).all()) for t in (mean, covariance, features)):
        raise ArtifactError(f"{file} holds a number that is NaN or infinite: make the statistics again")
    if metadata["extractor"] != extractor.label:
        raise ArtifactError(
            f"{file} was made with the extractor {quoted(metadata['extractor'])}, this one is {extractor.label}. "
            "Make the statistics again."
        )
    return DataReference(
        name=metadata["name"],
        statistics=FeatureStatistics.from_covariance(int(n), mean, covariance),
        features=features.float(),
        extractor=metadata["extractor"],
    )
