"""AIMET: simulated integers of 2 to 8 bits for linear layers and 2-d convolutions, as an encodings file with our
scales.

Limits, from running aimet-torch 2.42.0 with an empty stand-in for torchvision, which it imports and does not use here:

- Scales and offsets are ours (asymmetric scheme): AIMET quantizes the weights onto our grid. One entry a row; a width
  for each row is in the format, and ignored: all rows get that of the first. So a layer has one width.
- The file says nothing of layers at full precision, norms and activations, which a `QuantizationSimModel` quantizes by
  default: `simulate` takes those quantizers out.
- The format's text allows 4 bits and more; the simulation accepts 2. Layers of other libraries that it cannot wrap are
  passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading, json_at
from mpqsearch.export.target import CHECK, ConsumerTarget, int_choices, write_config

if TYPE_CHECKING:
    from torch import nn

FILE = "aimet_encodings.json"


class AimetExporter(ConsumerTarget):
    """``aimet_encodings.json`` of version 0.6.1: for ``QuantizationSimModel.load_encodings``."""

    name = "aimet"
    requires = "aimet-torch"
    imports = ("aimet_torch", "torchvision")
    kinds = ("Linear", "Conv2d")
    payload = False
    rerounds = False
    tested = "2.42.0"
    get = "pip install aimet-torch (asks for torchvision; take the build that fits your torch)"
    notes = ("our scales and offsets, no weights", "asymmetric scheme only; simulated")

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """2 to 8 bits for linear layers and 2-d convolutions."""
        return int_choices(range(2, 9)) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """The width itself, a float32 scale and a 32-bit offset a row: what a packed form would take, the file holds
        text."""
        return coded_bits(layer, choice.width, scales=layer.n_channels, scale_bits=32, zero_bits=32)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The encodings, ``config.json``, and inputs for the trace of the check."""
        from mpqsearch.export.check import our_rows, write_check

        assert job.denoiser is not None
        rows = our_rows(job, plan)
        weights = {
            f"{n}.weight": encodings(r.quantizer.scale.tolist(), r.quantizer.zero.tolist(), int(r.quantizer.bits[0]))
            for n, r in rows.items()
        }
        data = {"version": "0.6.1", "activation_encodings": {}, "param_encodings": weights}
        write_text(folder / FILE, json.dumps(data, indent=1) + "\n")
        check = write_check(folder / CHECK, job.denoiser, job.cond)
        return [folder / FILE, *check, *write_config(folder, job.denoiser.module)]

    def read(self, path: Path) -> Reading | None:
        """``param_encodings`` in either form: a mapping of lists, or (from 1.0.0) a list of entries with a name."""
        data = json_at(path, FILE)
        params = data.get("param_encodings") if isinstance(data, Mapping) else None
        if params is None:
            return None
        if isinstance(params, Mapping):
            said = {n: {int(e["bitwidth"]) for e in entries} for n, entries in params.items()}
        else:
            said = {
                str(e["name"]): {int(e.get("bw", str(e.get("output_dtype", "")).lstrip("uint") or 16))} for e in params
            }
        mixed = next((n for n, widths in said.items() if len(widths) > 1), None)
        if mixed is not None:
            raise ArtifactError(
                f"{path}: rows of {mixed!r} have widths of their own, {sorted(said[mixed])}, which AIMET itself ignores"
            )
        weights = {n.removesuffix(".weight"): w.pop() for n, w in said.items() if n.endswith(".weight")}
        notes = ("scales and offsets of the file are not taken over",)
        return Reading(layers={n: min(w, FULL_PRECISION) for n, w in weights.items()}, notes=notes)

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Simulate a new model and read width, scales and levels of every weight quantizer."""
        import torch

        from mpqsearch.export.check import build_model, libraries, most_levels, planned_layers

        data = json.loads((folder / FILE).read_text())
        made = simulate(module or build_model(folder), folder, data)
        widths, problems = dict.fromkeys(planned_layers(folder), FULL_PRECISION), []
        for name, layer in made.named_modules():
            quantizer: Any = dict(getattr(layer, "param_quantizers", {})).get("weight")
            if quantizer is None:
                continue
            widths[name] = int(quantizer.bitwidth)
            asked = data["param_encodings"].get(f"{name}.weight", [])
            scales = torch.tensor([e["scale"] for e in asked])
            if len(scales) and not torch.allclose(quantizer.get_scale().flatten(), scales, rtol=1e-4, atol=0):
                problems.append(f"{name} has other scales than the file")
            if most_levels(quantizer(layer.weight)) > 2 ** widths[name]:
                problems.append(f"{name} holds more than {2 ** widths[name]} levels in a row")
        return {"widths": widths, "problems": problems, "versions": libraries(self.requires)}


def encodings(scale: Sequence[float], zero: Sequence[float], bits: int) -> list[dict[str, Any]]:
    """One entry a row: ``weight = scale * (code + offset)`` with codes from 0."""
    top = 2**bits - 1
    return [
        {
            "bitwidth": bits,
            "dtype": "int",
            "is_symmetric": "False",
            "scale": s,
            "offset": -int(z),
            "min": -s * z,
            "max": s * (top - z),
        }
        for s, z in zip(scale, zero, strict=True)
    ]


def simulate(module: nn.Module, folder: Path, data: Mapping[str, Any]) -> Any:
    """The model with AIMET's quantizers on the weights that ``data`` names, and no others."""
    import torch
    from aimet_torch import QuantizationSimModel
    from aimet_torch.nn import QuantizationMixin

    from mpqsearch.export.check import call_arguments

    class Plain(torch.nn.Module):  # AIMET traces: positional tensors in, a tensor out
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *values: Any) -> Any:
            return self.model(**dict(zip(names, values, strict=True)), return_dict=False)[0]

    if not (folder / CHECK).is_file():
        raise ConfigError(
            f"{folder} has no {CHECK}: AIMET traces the model, and the export had no condition to run it with"
        )
    arguments = {n: v for n, v in call_arguments(folder, module).items() if isinstance(v, torch.Tensor)}
    names = list(arguments)
    for part in module.modules():
        if not list(part.children()) and not type(part).__module__.startswith("torch.nn"):
            QuantizationMixin.ignore(type(part))
    sim = QuantizationSimModel(
        Plain().eval(), dummy_input=tuple(arguments.values()), default_param_bw=8, default_output_bw=16
    )
    kept = {f"model.{n}": v for n, v in data["param_encodings"].items()}
    for name, part in sim.model.named_modules():
        if isinstance(part, QuantizationMixin):
            for held in (part.input_quantizers, part.output_quantizers):
                for i in range(len(held)):
                    held[i] = None
            for key in part.param_quantizers:
                if f"{name}.{key}" not in kept:
                    part.param_quantizers[key] = None
    sim.load_encodings({**data, "param_encodings": kept}, strict=True, partial=True)
    return sim.model.model
