"""The nouns that every stage passes on. numpy only: nothing here knows of torch, solvers or files."""

from mpqsearch.core.bitmap import BitMap
from mpqsearch.core.budget import Budget, bops, uniform_map
from mpqsearch.core.formats import FULL_PRECISION, SCHEMES, QuantFormat
from mpqsearch.core.layers import ROLES, KeptParameter, LayerSpec, LayerTable
from mpqsearch.core.metric import MetricValue, StudyRecord
from mpqsearch.core.policy import LayerRules, Policy
from mpqsearch.core.profile import SensitivityProfile
from mpqsearch.core.stored import (
    StoredBits,
    average_bits,
    coded_bits,
    scale_count,
    size_bits,
    size_bytes,
    stored_total,
    unquantized_bits,
)

__all__ = [
    "FULL_PRECISION",
    "ROLES",
    "SCHEMES",
    "BitMap",
    "Budget",
    "KeptParameter",
    "LayerRules",
    "LayerSpec",
    "LayerTable",
    "MetricValue",
    "Policy",
    "QuantFormat",
    "SensitivityProfile",
    "StoredBits",
    "StudyRecord",
    "average_bits",
    "bops",
    "coded_bits",
    "scale_count",
    "size_bits",
    "size_bytes",
    "stored_total",
    "uniform_map",
    "unquantized_bits",
]
