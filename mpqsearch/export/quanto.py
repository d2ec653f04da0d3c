"""optimum-quanto: one of int2, int4 or int8 per linear layer or 2-d convolution, weights and map in a folder that it
loads.

Limits, from its code (0.2.7) and from running it:

- Widths 2, 4 and 8. One width per layer. Linear and Conv2d; other layers stay at full precision.
- It re-derives scales from the weights (by its HQQ optimiser in groups of 128 inputs or fewer for 2 and 4 bits, by the
  largest magnitude of a row for 8), so the searched ranges and schemes of a map are not used, and stored bits are above
  the nominal ones. `QuantoTarget.round_trip` gives what it makes of a weight.
- Names that a model does not have are ignored in silence, and missing tensors too: hence `QuantoTarget.verify`.
- Where 2 or 4 bits are first loaded or used it compiles a C++ kernel, which takes a compiler and up to minutes, once
  per installation. Here the same is computed in torch instead.
"""

from __future__ import annotations

import copy
import glob
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import read_tensors, write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, coded_bits, scale_count
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import WEIGHTS, Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, bits_of, by_name, float_note, json_at
from mpqsearch.export.target import Target, int_choices, write_config
from mpqsearch.untrusted import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

MAP = "quanto_qmap.json"
"""The name that ``optimum.quanto.QuantizedDiffusersModel`` looks for."""

WIDTHS = (2, 4, 8)


class QuantoTarget(Target):
    """Writes ``diffusion_pytorch_model.safetensors``, ``quanto_qmap.json``, the neutral map and ``export.json``."""

    name = "quanto"
    loading = (
        "import json\nfrom pathlib import Path\n\nfrom diffusers import {cls}\nfrom optimum.quanto import requantize\n"
        "from safetensors.torch import load_file\n\nfolder = Path({folder!r})\n"
        "model = {cls}.from_config({cls}.load_config(folder))\n"
        'weights = load_file(folder / "diffusion_pytorch_model.safetensors")\n'
        'requantize(model, weights, json.loads((folder / "quanto_qmap.json").read_text()))'
    )
    requires = "optimum-quanto"
    imports = ("optimum.quanto",)
    kinds = ("Linear", "Conv2d")
    tested = "0.2.7"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """qint2, qint4 and qint8 for linear layers and 2-d convolutions."""
        return int_choices(WIDTHS, "qint{}") if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """A float32 scale a row at 8 bits, a float32 scale and shift a group at 2 and 4, and two unused float32 scalars
        a layer."""
        if choice.width == 8:
            return coded_bits(layer, 8, scales=layer.n_channels, scale_bits=32, other=64)
        groups = scale_count(layer, _group_size(layer.weights_per_channel))
        return coded_bits(layer, choice.width, scales=groups, scale_bits=32, zero_bits=32, other=64)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Quantize a copy of the model with quanto and write it."""
        from optimum.quanto import quantization_map

        from mpqsearch.export.check import correct_bias, save_tensors, write_check

        module = quantized_copy(job.model.module, plan)
        for name, weight in _quantized_weights(module).items():
            correct_bias(job, name, module.get_submodule(name), weight)
        save_tensors(folder / WEIGHTS, module.state_dict(), {"mpqsearch.bit_map": job.bit_map.digest})
        write_text(folder / MAP, json.dumps(quantization_map(module), indent=1) + "\n")
        with torch_kernels():
            check = write_check(folder, job, module)
        return [folder / WEIGHTS, *write_config(folder, job.model.module), folder / MAP, *check]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Fill a model with ``requantize`` and read the type of each layer from its tensors."""
        from mpqsearch.export.check import loaded

        module, stored = _load(folder)
        with torch_kernels():
            seen = loaded(folder, module, _types(module), stored)
        return seen | self.sizes(folder)

    def weights(self, folder: Path) -> Mapping[str, Tensor]:
        """What ``requantize`` fills, every weight as quanto decodes it."""
        from mpqsearch.export.check import plain_weights

        module, _ = _load(folder)
        return plain_weights(module, _quantized_weights(module))

    def round_trip(self, weight: Tensor, layer: LayerSpec, choice: Choice) -> Tensor:
        """What quanto makes of a weight, as a layer of its own."""
        import torch

        shape = layer.weight_shape
        if layer.kind == "Linear":
            owner: nn.Module = torch.nn.Linear(shape[1], shape[0], bias=False)
        else:
            owner = torch.nn.Conv2d(shape[1] * layer.groups, shape[0], shape[2:], groups=layer.groups, bias=False)  # type: ignore[arg-type]
        owner.weight = torch.nn.Parameter(weight.detach().float().cpu(), requires_grad=False)
        asked = (choice.width, choice.width)
        entry = PlanEntry(layer="layer", asked=asked, will_get=choice.width, reason="exact", choice=choice.name)
        module = quantized_copy(torch.nn.ModuleDict({"layer": owner}), [entry])
        return _quantized_weights(module)["layer"]


def read(path: Path, _table: LayerTable) -> Reading | None:
    """``quanto_qmap.json``: the type of every layer's weights; layers that are not in it keep full precision."""
    data = json_at(path, MAP)
    entries = list(data.values()) if isinstance(data, Mapping) else []
    if not entries or not all(isinstance(v, Mapping) and "weights" in v for v in entries):
        return None
    types = {n: v["weights"] or "none" for n, v in data.items()}
    inputs = any((v.get("activations") or "none") != "none" for v in entries)
    notes = ("quantized activations are not taken over",) if inputs else ()
    return by_name({n: bits_of(t) for n, t in types.items()}, notes + float_note(types))


def quantized_copy(module: nn.Module, plan: Sequence[PlanEntry]) -> nn.Module:
    """A copy of ``module``, quantized and frozen by quanto as planned. Raises `ConfigError` when quanto did not take a
    layer."""
    from optimum import quanto

    clone = copy.deepcopy(module).eval()
    plain = {n.removesuffix(".weight") for n, weight in clone.named_parameters() if not _takes_hqq(weight)}
    for width, left_out in itertools.product(WIDTHS, (False, True)):
        names = [e.layer for e in plan if e.will_get == width and (e.layer in plain) == left_out]
        if names:  # an empty list would mean every layer
            better = None if width == 8 or left_out else quanto.HqqOptimizer()
            patterns = [glob.escape(n) for n in names]  # quanto reads them as shell patterns
            quanto.quantize(clone, weights=getattr(quanto, f"qint{width}"), include=patterns, optimizer=better)
    with torch_kernels():  # the optimiser decodes what it tries
        quanto.freeze(clone)
    taken = quanto.quantization_map(clone)
    wanted = {e.layer: f"qint{e.will_get}" for e in plan if e.will_get != FULL_PRECISION}
    wrong = [n for n in {*wanted, *taken} if taken.get(n, {}).get("weights") != wanted.get(n)]
    if wrong:
        raise ConfigError(
            f"quanto did not take {', '.join(sorted(wrong)[:5])} as planned; are these modules of the model?"
        )
    return clone


def _takes_hqq(weight: Tensor) -> bool:
    """Whether quanto's HQQ optimiser can be used: not for a layer of one channel, which has one scale, nor for a
    convolution without groups of inputs, which it would give a shift for each row of its kernels."""
    grouped = _group_size(weight[0].numel()) > 0
    return len(weight) > 1 and (weight.dim() == 2 or grouped)


def torch_kernels() -> AbstractContextManager[Any]:
    """Let quanto unpack 2- and 4-bit codes in torch.

    Its own C++ kernel is compiled when codes are first loaded or used, which takes minutes and a compiler; the codes
    are the same either way.
    """
    from unittest.mock import patch

    from optimum.quanto.library.extensions.extension import Extension

    return patch.object(Extension, "lib", SimpleNamespace(unpack=_unpack))


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits, lowest first, out of bytes: ``[n, ...]`` to ``[n * 8 // bits, ...]``, as quanto's kernel
    does."""
    import torch

    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def _load(folder: Path) -> tuple[nn.Module, set[str]]:
    """The model filled by quanto, and the names of the tensors in the file."""
    from optimum.quanto import requantize

    from mpqsearch.export.check import build_model

    module, state = build_model(folder), read_tensors(folder / WEIGHTS)
    stored = set(state)  # requantize takes tensors out of the dict
    with torch_kernels():  # loading unpacks the codes too
        requantize(module, state, read_json(folder / MAP))
    return module.eval(), stored


def _quantized_weights(module: nn.Module) -> dict[str, Tensor]:
    """What quanto's layers compute with, by the name of the layer."""
    from optimum import quanto

    layers = ((n, m.weight) for n, m in module.named_modules() if isinstance(m, quanto.QModuleMixin))
    with torch_kernels():
        return {n: weight.dequantize().detach() for n, weight in layers if isinstance(weight, quanto.QTensor)}


def _types(module: nn.Module) -> dict[str, str]:
    """Types of the tensors that the layers really hold, whatever their settings say."""
    from optimum import quanto

    layers = ((n, m) for n, m in module.named_modules() if isinstance(m, quanto.QModuleMixin))
    return {n: str(m.weight.qtype.name) for n, m in layers if isinstance(m.weight, quanto.QTensor)}


def _group_size(fan_in: int) -> int:
    """quanto's own rule for 2 and 4 bits: 128, less 32 until it divides; 0 where a row is one group."""
    return 0 if fan_in <= 128 else next((g for g in (128, 96, 64, 32) if fan_in % g == 0), 0)
