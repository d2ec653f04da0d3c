"""Fill a model from an export with optimum-quanto and say what it holds. Imports torch; only `mpqsearch.export.quanto`
imports it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpqsearch.core import FULL_PRECISION
from mpqsearch.export.check import build_model, forward_error, libraries, planned_layers, stored_size
from mpqsearch.export.quanto import MAP, require_quanto
from mpqsearch.export.target import WEIGHTS


def read_back(folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
    """Fill ``module`` (default: one built from ``config.json``) from ``folder`` with ``requantize`` and report."""
    quanto = require_quanto()
    module = module or build_model(folder)
    state = load_file(folder / WEIGHTS)
    stored = set(state)  # requantize takes tensors out of the dict
    with torch_kernels():  # loading unpacks the codes too
        quanto.requantize(module, state, json.loads((folder / MAP).read_text()))
    module.eval()
    problems = _differences(stored, set(module.state_dict()))
    planned = set(planned_layers(folder))
    modules = dict(module.named_modules())
    problems += [f"the loaded model has no layer {name!r}" for name in sorted(planned - set(modules))]
    widths = {n: _width(m) for n, m in modules.items() if n in planned or _width(m) != FULL_PRECISION}
    with torch_kernels():
        error = forward_error(folder, module)
    return {
        "widths": widths,
        "problems": problems,
        "forward_error": error,
        "versions": libraries("optimum-quanto"),
        **stored_size(folder / WEIGHTS),
    }


@contextlib.contextmanager
def torch_kernels() -> Iterator[None]:
    """Let quanto unpack 2- and 4-bit codes in torch where its C++ kernel was not built yet.

    The kernel is compiled when codes are first loaded or used, which takes minutes and a compiler; the codes are the
    same either way.
    """
    require_quanto()
    from optimum.quanto.library.extensions.extension import get_extension

    extension = get_extension("quanto_cpp")
    built = extension._lib is not None or (Path(extension.build_directory) / "pytorch_version.txt").exists()
    if built:
        yield
        return
    extension._lib = SimpleNamespace(unpack=_unpack)
    try:
        yield
    finally:
        extension._lib = None


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits, lowest first, out of bytes: ``[n, ...]`` to ``[n * 8 // bits, ...]``, as quanto's kernel
    does."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def _differences(stored: set[str], loaded: set[str]) -> list[str]:
    """quanto loads without a word when tensors are missing or left over."""
    problems = [f"the file has no tensor {key!r}, which the model holds" for key in sorted(loaded - stored)]
    return problems + [f"the model has no place for the tensor {key!r} of the file" for key in sorted(stored - loaded)]


def _width(module: nn.Module) -> int:
    """Bits of the tensor that a module really holds, whatever its settings say."""
    quanto = require_quanto()
    if not isinstance(module, quanto.QModuleMixin) or not isinstance(module.weight, quanto.QTensor):
        return FULL_PRECISION
    return int(module.weight.qtype.bits)
