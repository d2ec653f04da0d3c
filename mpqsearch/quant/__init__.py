"""Fake quantization: range search, codebooks, integer codes, and `quantize_model`."""

from mpqsearch.quant.apply import QuantizedModel, QuantizedRows, quantize_model, quantize_weight
from mpqsearch.quant.rows import RowQuantizer, decode, encode, fit_rows, rows_of, weight_of
from mpqsearch.quant.tables import RowStatistics, error_tables, kurtosis, prescale_factors, width_errors

__all__ = [
    "QuantizedModel",
    "QuantizedRows",
    "RowQuantizer",
    "RowStatistics",
    "decode",
    "encode",
    "error_tables",
    "fit_rows",
    "kurtosis",
    "prescale_factors",
    "quantize_model",
    "quantize_weight",
    "rows_of",
    "weight_of",
    "width_errors",
]
