"""Fake quantization of weights and activations: range search, schemes, integer codes, trainable modules."""

from mpqsearch.quant.activations import (
    ActivationQuantizer,
    ActivationTable,
    activation_table_of,
)
from mpqsearch.quant.apply import QuantizedModel, QuantizedRows, quantize_model, quantize_weight
from mpqsearch.quant.gptq import gptq_rows
from mpqsearch.quant.modules import (
    build_student,
    convert,
    param_groups,
)
from mpqsearch.quant.ranges import RangeCollector, search_range
from mpqsearch.quant.rows import RowQuantizer, decode, encode, fit_rows, rows_of, weight_of
from mpqsearch.quant.smoothing import smooth_inputs
from mpqsearch.quant.statistics import RowStatistics, Statistics
from mpqsearch.quant.tables import (
    error_tables,
    kurtosis,
    width_errors,
)

__all__ = [
    "ActivationQuantizer",
    "ActivationTable",
    "QuantizedModel",
    "QuantizedRows",
    "RangeCollector",
    "RowQuantizer",
    "RowStatistics",
    "Statistics",
    "activation_table_of",
    "build_student",
    "convert",
    "decode",
    "encode",
    "error_tables",
    "fit_rows",
    "gptq_rows",
    "kurtosis",
    "param_groups",
    "quantize_model",
    "quantize_weight",
    "rows_of",
    "search_range",
    "smooth_inputs",
    "weight_of",
    "width_errors",
]
