"""The nouns that every stage passes on. numpy only: nothing here knows of torch, solvers or files."""

from mpqsearch.core.bitmap import BitMap
from mpqsearch.core.budget import Budget, StorageModel, average_bits, bops, size_bits, size_bytes, uniform_map
from mpqsearch.core.formats import CODEBOOKS, FULL_PRECISION, WIDTHS, QuantFormat
from mpqsearch.core.layers import ROLES, KeptParameter, LayerSpec, LayerTable
from mpqsearch.core.metric import MetricValue, StudyRecord
from mpqsearch.core.policy import Policy
from mpqsearch.core.profile import SensitivityProfile

__all__ = [
    "CODEBOOKS",
    "FULL_PRECISION",
    "ROLES",
    "WIDTHS",
    "BitMap",
    "Budget",
    "KeptParameter",
    "LayerSpec",
    "LayerTable",
    "MetricValue",
    "Policy",
    "QuantFormat",
    "SensitivityProfile",
    "StorageModel",
    "StudyRecord",
    "average_bits",
    "bops",
    "size_bits",
    "size_bytes",
    "uniform_map",
]
