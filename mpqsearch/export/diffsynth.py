"""DiffSynth-Studio: which layers get which of its quantization methods, for ``MixedQuantizeConfig``.

By its source and from running it (diffsynth 2.1.12): a layer is taken by a method whose ``target_modules`` has its
whole name, or the end of its name after a dot; two methods that take one layer are an error. All others stay as they
are. It quantizes when the model is loaded, by the rounding of the backend. Names are those of the module that it is
given: those here where DiffSynth's class has the names of diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqsearch.artifacts import write_text
from mpqsearch.core import LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.mapfile import FILE as MAP
from mpqsearch.export.mapfile import load_neutral
from mpqsearch.export.reading import Reading, bits_of, float_note, json_at
from mpqsearch.export.target import Target
from mpqsearch.untrusted import read_json

FILE = "diffsynth_quant.json"
GROUP = 64
"""Weights that share a scale in the 4-bit format of bitsandbytes."""

METHODS = {"torchao_int8_w8a16": 8, "bitsandbytes_nf4": 4}
"""Methods that quantize weights alone and run on any GPU, to bits of a weight."""


class DiffSynthTarget(Target):
    """``diffsynth_quant.json``: ``MixedQuantizeConfig(configs=[QuantizeConfig(**c) for c in configs])``."""

    name = "diffsynth"
    requires = "diffsynth"
    imports = ("diffsynth", "torchvision", "torchao", "bitsandbytes")
    tested = "2.1.12"
    get = "pip install 'diffsynth[quant]'"
    payload = False
    needs_config = False
    full_bits = 16
    kept_bits = 16

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """8-bit integers and 4-bit normal floats, for linear layers."""
        return tuple(Choice(name=n, width=b) for n, b in METHODS.items()) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Codes with a half-precision scale a row, or a float32 scale for each group of 64 weights."""
        if choice.width == 8:
            return coded_bits(layer, 8, scales=layer.n_channels, scale_bits=16)
        return coded_bits(layer, 4, scales=-(-layer.n_weights // GROUP), scale_bits=32)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The layers of every method by their whole names; what ends like one of them is excluded."""
        configs = []
        for method in METHODS:
            names = [e.layer for e in plan if e.choice == method]
            alike = [e.layer for e in plan if e.choice != method and _named(e.layer, names)]
            config = {"method": method, "target_modules": names}
            configs += [config | ({"exclude_modules": alike} if alike else {})] if names else []
        write_text(folder / FILE, json.dumps({"configs": configs}, indent=1) + "\n")
        return [folder / FILE]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Let it quantize small linear layers that have the names of the model's, and see which it took."""
        from diffsynth.core.quant import MixedQuantizeConfig, QuantizeConfig

        configs = [QuantizeConfig(**c) for c in read_json(folder / FILE)["configs"]]
        module = small_layers(load_neutral(folder / MAP).layers)
        MixedQuantizeConfig(configs=configs).quantize_model(module)
        taken = {n: c.method for c in configs for n, m in module.named_modules() if c.is_quantized_linear(m)}
        return {"widths": {n: METHODS[m] for n, m in taken.items()}, "choices": taken}


def small_layers(layers: Sequence[LayerSpec]) -> Any:
    """A module with a linear layer of 64 inputs and 64 outputs in the place of every linear layer."""
    from torch import nn

    root = nn.Module()
    for layer in (la for la in layers if la.kind == "Linear"):
        *parents, leaf = layer.name.split(".")
        owner = root
        for part in parents:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, nn.Linear(GROUP, GROUP))
    return root


def read(path: Path, table: LayerTable) -> Reading | None:
    """``configs`` as the program applies them to linear layers: ``target_modules`` (all, when there are none) without
    ``exclude_modules``, each a whole name or the end of one after a dot."""
    data = json_at(path, FILE)
    configs = data.get("configs") if isinstance(data, Mapping) else None
    if not isinstance(configs, list) or not all(isinstance(c, Mapping) and "method" in c for c in configs):
        return None
    taken: dict[str, str] = {}
    for config in configs:
        wanted, left = config.get("target_modules"), config.get("exclude_modules") or ()
        for layer in (la.name for la in table if la.kind == "Linear"):
            if (wanted is None or _named(layer, wanted)) and not _named(layer, left):
                taken[layer] = str(config["method"])
    widths = {n: METHODS.get(m) or bits_of(m.partition("_")[2]) for n, m in taken.items()}
    return Reading(widths=widths, notes=float_note(taken))


def _named(layer: str, patterns: Sequence[str]) -> bool:
    return any(layer == p or layer.endswith(f".{p}") for p in patterns)
