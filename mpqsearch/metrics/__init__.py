"""Features, then statistics, then values: three steps, each on its own."""

from mpqsearch.metrics.evaluate import Evaluation, Reference, distance_to_full_precision, evaluate
from mpqsearch.metrics.extractors import EXTRACTORS, FeatureExtractor, load_extractor, module_extractor
from mpqsearch.metrics.frechet import FeatureStatistics, KernelDistance, PairedKernelDistance, frechet_distance
from mpqsearch.metrics.reference import DataReference, load_reference, save_reference

__all__ = [
    "EXTRACTORS",
    "DataReference",
    "Evaluation",
    "FeatureExtractor",
    "FeatureStatistics",
    "KernelDistance",
    "PairedKernelDistance",
    "Reference",
    "distance_to_full_precision",
    "evaluate",
    "frechet_distance",
    "load_extractor",
    "load_reference",
    "module_extractor",
    "save_reference",
]
