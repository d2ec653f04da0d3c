"""What the first call of a process would do, done once in the process that all others are forked from: the compiled
range search is loaded."""

import torch

from mpqsearch.core import QuantFormat
from mpqsearch.quant.rows import fit_rows

fit_rows(torch.linspace(-1, 2, 1 << 13).reshape(2, -1), 4, QuantFormat(scheme="auto", n_candidates=2))
