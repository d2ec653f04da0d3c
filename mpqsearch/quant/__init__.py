"""Fake quantization of weights and activations: range search, schemes, integer codes, trainable modules."""

from mpqsearch.quant.activations import (
    ActivationQuantizer,
    ActivationTable,
    activation_table_of,
)
from mpqsearch.quant.apply import QuantizedModel, QuantizedRows, quantize_model, quantize_weight
from mpqsearch.quant.gptq import gptq_rows
from mpqsearch.quant.modules import (
    QuantLayer,
    Trainable,
    WeightQuantizer,
    build_student,
    convert,
    param_groups,
    quant_layers,
)
from mpqsearch.quant.ranges import RangeCollector, search_range
from mpqsearch.quant.rows import RowQuantizer, decode, encode, fit_rows, rows_of, weight_of
from mpqsearch.quant.smoothing import smooth_inputs, smoothing_factors
from mpqsearch.quant.statistics import RowStatistics, Statistics
from mpqsearch.quant.tables import (
    error_tables,
    kurtosis,
    weight_error_tables,
    width_errors,
)

__all__ = [
    "ActivationQuantizer",
    "ActivationTable",
    "QuantLayer",
    "QuantizedModel",
    "QuantizedRows",
    "RangeCollector",
    "RowQuantizer",
    "RowStatistics",
    "Statistics",
    "Trainable",
    "WeightQuantizer",
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
    "quant_layers",
    "quantize_model",
    "quantize_weight",
    "rows_of",
    "search_range",
    "smooth_inputs",
    "smoothing_factors",
    "weight_error_tables",
    "weight_of",
    "width_errors",
]
