"""optimum-quanto: one of int2, int4 or int8 per linear layer or 2-d convolution, weights and map in a folder that it
loads.

Limits, from its code (0.2.7) and from running it:

- Widths 2, 4 and 8. One width per layer. Linear and Conv2d; other layers stay at full precision.
- It re-derives scales from the weights (minimum and maximum, in groups of 128 inputs or fewer for 2 and 4 bits, a row
  for 8), so the searched ranges and schemes of a map are not used, and stored bits are above the nominal ones.
- Names that a model does not have are ignored in silence, and missing tensors too: hence `QuantoExporter.verify`.
- Where 2 or 4 bits are first loaded or used it compiles a C++ kernel, which takes a compiler and up to minutes, once
  per installation. Here the same is computed in torch instead, until that kernel exists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import atomic_path, write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits, scale_count
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, bits_of, float_note, json_at
from mpqsearch.export.target import CHECK, WEIGHTS, ConsumerTarget, int_choices, write_config

if TYPE_CHECKING:
    from torch import nn

MAP = "quanto_qmap.json"
"""The name that ``optimum.quanto.QuantizedDiffusersModel`` looks for."""

WIDTHS = (2, 4, 8)
KINDS = ("Linear", "Conv2d")

_INSTALL = "optimum-quanto is not installed. Run: pip install 'mpqsearch[export]'"


class QuantoExporter(ConsumerTarget):
    """Writes ``diffusion_pytorch_model.safetensors``, ``quanto_qmap.json``, the neutral map and ``export.json``."""

    name = "quanto"
    requires = "optimum-quanto"
    imports = ("optimum.quanto",)
    kinds = KINDS
    tested = "0.2.7"
    get = "pip install 'mpqsearch[export]'"
    notes = (
        "scales are derived anew from the weights; searched ranges and schemes are not used",
        "2 and 4 bits have groups of up to 128 inputs with a float scale and shift each",
        "it compiles a C++ kernel, once, where 2 or 4 bits are first loaded or used",
    )

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """qint2, qint4 and qint8 for linear layers and 2-d convolutions."""
        return int_choices(WIDTHS, "qint{}") if layer.kind in KINDS else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """A float32 scale a row at 8 bits, a float32 scale and shift a group at 2 and 4, and two unused float32 scalars
        a layer."""
        if choice.width == 8:
            return coded_bits(layer, 8, scales=layer.n_channels, scale_bits=32, other=64)
        groups = scale_count(layer, _group_size(layer.weights_per_channel))
        return coded_bits(layer, choice.width, scales=groups, scale_bits=32, zero_bits=32, other=64)

    def install_line(self) -> str:
        """The extra that brings the library."""
        return _INSTALL

    def require(self) -> None:
        """Import it, since an installed quanto may still fail to load."""
        require_quanto()

    def missing(self) -> list[str]:
        """quanto is a namespace package: look for the distribution."""
        try:
            require_quanto()
        except ConfigError:
            return list(self.imports)
        return []

    def read(self, path: Path) -> Reading | None:
        """``quanto_qmap.json``: the type of every layer's weights; layers that are not in it keep full precision."""
        data = json_at(path, MAP)
        if (
            not isinstance(data, Mapping)
            or not data
            or not all(isinstance(v, Mapping) and "weights" in v for v in data.values())
        ):
            return None
        types = {n: v["weights"] or "none" for n, v in data.items()}
        inputs = any((v.get("activations") or "none") != "none" for v in data.values())
        notes = ("quantized activations are not taken over",) if inputs else ()
        return Reading(layers={n: bits_of(t) for n, t in types.items()}, notes=notes + float_note(types))

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Quantize a copy of the model with quanto and write it."""
        from mpqsearch.export.check import write_check
        from mpqsearch.export.quanto_check import torch_kernels

        assert job.denoiser is not None
        module = quantized_copy(job.denoiser.module, plan)
        paths = [_write_weights(folder / WEIGHTS, module, job), *write_config(folder, job.denoiser.module)]
        write_text(folder / MAP, json.dumps(_quantization_map(module), indent=1) + "\n")
        with torch_kernels():
            check = write_check(folder / CHECK, job.denoiser.with_module(module), job.cond)
        return [*paths, folder / MAP, *check]

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Fill a model with ``requantize`` and read the width of each layer from its tensors."""
        from mpqsearch.export.quanto_check import read_back

        return read_back(folder, module)


def _group_size(fan_in: int) -> int:
    """quanto's own rule for 2 and 4 bits: 128, less 32 until it divides; 0 where a row is one group."""
    if fan_in <= 128:
        return 0
    return next((g for g in (128, 96, 64, 32) if fan_in % g == 0), 0)


def quantized_copy(module: nn.Module, plan: Sequence[PlanEntry]) -> nn.Module:
    """A copy of ``module``, quantized and frozen by quanto as planned. Raises `ConfigError` when quanto did not take a
    layer."""
    import copy

    quanto = require_quanto()
    clone = copy.deepcopy(module).eval()
    for width in WIDTHS:
        names = [_glob_escape(e.layer) for e in plan if e.will_get == width]
        if names:  # an empty list would mean every layer
            quanto.quantize(clone, weights=getattr(quanto, f"qint{width}"), include=names)
    quanto.freeze(clone)
    taken = _quantization_map(clone)
    wanted = {e.layer: f"qint{e.will_get}" for e in plan if e.will_get != FULL_PRECISION}
    wrong = [n for n in {*wanted, *taken} if taken.get(n, {}).get("weights") != wanted.get(n)]
    if wrong:
        raise ConfigError(
            f"quanto did not take {', '.join(sorted(wrong)[:5])} as planned; are these modules of the model?"
        )
    return clone


def require_quanto() -> Any:
    """The library, or `ConfigError` with the line that installs it."""
    try:
        import optimum.quanto as quanto
    except ImportError as error:
        raise ConfigError(f"{_INSTALL} ({error})") from error
    return quanto


def _glob_escape(name: str) -> str:
    """quanto reads names as shell patterns; brackets make each special character stand for itself."""
    import glob

    return glob.escape(name)


def _quantization_map(module: nn.Module) -> dict[str, dict[str, str]]:
    result: dict[str, dict[str, str]] = require_quanto().quantization_map(module)
    return result


def _write_weights(path: Path, module: nn.Module, job: ExportJob) -> Path:
    from safetensors.torch import save_file

    from mpqsearch.export.check import own_tensors

    with atomic_path(path) as temporary:
        save_file(
            own_tensors(module.state_dict()), temporary, {"format": "pt", "mpqsearch.bit_map": job.bit_map.digest}
        )
    return path
