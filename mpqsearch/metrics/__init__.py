"""Features, then statistics, then values: three steps, each on its own."""

from mpqsearch.metrics.evaluate import (
    Evaluation,
    Measure,
    Reference,
    distance_to_full_precision,
    evaluate,
    features_of,
    measures,
)
from mpqsearch.metrics.extractors import (
    AUTO,
    EXTRACTORS,
    FeatureExtractor,
    extractor_for,
    load_extractor,
    module_extractor,
)
from mpqsearch.metrics.frechet import FeatureStatistics, frechet_distance
from mpqsearch.metrics.named import SCORERS, load_scorer
from mpqsearch.metrics.reference import DataReference, load_reference, save_reference
from mpqsearch.metrics.scorers import PSNR, SSIM, Scorer
from mpqsearch.metrics.store import SampleStore
from mpqsearch.metrics.text import clip_scorer

__all__ = [
    "AUTO",
    "EXTRACTORS",
    "PSNR",
    "SCORERS",
    "SSIM",
    "DataReference",
    "Evaluation",
    "FeatureExtractor",
    "FeatureStatistics",
    "Measure",
    "Reference",
    "SampleStore",
    "Scorer",
    "clip_scorer",
    "distance_to_full_precision",
    "evaluate",
    "extractor_for",
    "features_of",
    "frechet_distance",
    "load_extractor",
    "load_reference",
    "load_scorer",
    "measures",
    "module_extractor",
    "save_reference",
]
