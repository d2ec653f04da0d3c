"""NNCF: 4-bit linear layers and 8-bit linear layers and convolutions, by one pass of ``compress_weights`` for each
width.

Limits, from running nncf 3.4.0 on torch:

- A pass has one width and a list of operations to leave alone, so the configuration is one pass a width. Operations
  have NNCF's own names, which do not hold the whole path and are numbered in the order of the forward pass: they are
  found by tracing the model when the configuration is written, and fit this model only. ``layers`` says the widths by
  the names of modules.
- 4 bits are symmetric, a half-precision scale a row, two codes a byte; the number of weights must be even. 8 bits have
  a zero point.
- Integers of 2 and 3 bits fail in its torch backend; convolutions have 8 bits or none.
- Scales are derived from the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, coded_bits
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.reading import Reading
from mpqsearch.export.recipes import RecipeTarget
from mpqsearch.export.target import CHECK, planned_widths, write_config

if TYPE_CHECKING:
    from torch import nn

PASSES: dict[int, dict[str, Any]] = {
    4: {"mode": "int4_sym", "ratio": 1.0, "group_size": -1, "all_layers": True, "backup_mode": "none"},
    8: {"mode": "int8_asym"},
}
"""Width to the arguments of its ``compress_weights``."""


class NncfExporter(RecipeTarget):
    """``nncf_config.json``: ``passes`` to run one after another (`compress` shows how), ``layers`` for people and other
    tools."""

    name = "nncf"
    requires = "nncf"
    imports = ("nncf",)
    kinds = ("Linear", "Conv2d")
    limits = "an even number of weights for 4 bits"
    file = "nncf_config.json"
    tested = "3.4.0"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """4 and 8 bits for linear layers, 8 for convolutions."""
        if layer.kind not in self.kinds:
            return ()
        four = layer.kind == "Linear" and layer.n_weights % 2 == 0
        return (Choice(name="int8_asym", width=8), *((Choice(name="int4_sym", width=4),) if four else ()))

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Dense codes and a half-precision scale a row; a byte more for the zero point of 8 bits."""
        zero = 8 if choice.width == 8 else 0
        return coded_bits(layer, choice.width, scales=layer.n_channels, scale_bits=16, zero_bits=zero)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The passes, with operations as NNCF names them, ``config.json``, and inputs for the trace of the check."""
        from mpqsearch.export.check import call_arguments, copy_of, write_check

        assert job.denoiser is not None
        check = write_check(folder / CHECK, job.denoiser, job.cond)
        if not check:
            raise ConfigError(
                "NNCF finds operations by running the model: give ExportJob a condition (cond) that it can be run with"
            )
        module = copy_of(job)
        widths = planned_widths(plan)
        operations = _operations(module, call_arguments(folder, module, job.denoiser.sample_shape))
        passes = []
        for width in sorted(set(widths.values())):
            wanted = {n for n, w in widths.items() if w == width}
            ignored = [op for layer, ops in operations.items() if layer not in wanted for op in ops]
            passes.append({**PASSES[width], "ignored_scope": {"names": ignored, "validate": False}})
        write_text(folder / self.file, json.dumps({"passes": passes, "layers": widths}, indent=1) + "\n")
        return [folder / self.file, *check, *write_config(folder, job.denoiser.module)]

    def reading(self, recipe: Any) -> Reading | None:
        """``layers``; passes alone name operations, which say nothing of layers."""
        if "passes" not in recipe or not isinstance(recipe.get("layers"), Mapping):
            return None
        return Reading(layers={n: int(w) for n, w in recipe["layers"].items()})

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Run the passes on a new model and read the width of every decompressor, and the levels that each layer
        holds."""
        from mpqsearch.export.check import build_model, call_arguments, libraries, most_levels, planned_layers

        model = module or build_model(folder)
        weights = {n: m.weight.shape for n, m in model.named_modules() if n in planned_layers(folder)}
        made = compress(model, json.loads((folder / self.file).read_text())["passes"], call_arguments(folder, model))
        widths = dict.fromkeys(planned_layers(folder), FULL_PRECISION)
        problems = []
        for key, hook in getattr(made, "__nncf_hooks").named_hooks() if hasattr(made, "__nncf_hooks") else ():
            name = key.removeprefix("post_hooks.").partition("__")[0].replace(":", ".").removesuffix(".weight")
            widths[name] = int(re.sub(r"\D", "", type(hook).__name__))  # INT4SymmetricWeightsDecompressor
            held = hook(made.get_submodule(name).weight)
            if name in weights and most_levels(held, weights[name]) > 2 ** widths[name]:
                problems.append(f"{name} holds more than {2 ** widths[name]} levels in a row")
        return {"widths": widths, "problems": problems, "versions": libraries(self.requires)}


def compress(module: nn.Module, passes: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any]) -> Any:
    """Run the passes of a configuration; ``inputs`` are keyword arguments of one call of the model, for the trace."""
    import nncf

    made: Any = module
    for settings in passes:
        arguments = dict(settings)
        arguments["mode"] = nncf.CompressWeightsMode(arguments["mode"])
        if "backup_mode" in arguments:
            arguments["backup_mode"] = nncf.BackupMode(arguments["backup_mode"])
        arguments["ignored_scope"] = nncf.IgnoredScope(**arguments["ignored_scope"])
        made = nncf.compress_weights(made, dataset=nncf.Dataset([dict(inputs)]), **arguments)
    return made


def _operations(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, list[str]]:
    """Operations that use the weight of each module, by NNCF's names."""
    from nncf.torch.function_hook import wrap_model
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    graph = build_nncf_graph(wrap_model(module), dict(inputs))
    found: dict[str, list[str]] = {}
    for node in graph.get_all_nodes():
        for edge in graph.get_input_edges(node):
            name = getattr(edge.from_node.layer_attributes, "name", None) or ""
            if name.endswith(".weight"):
                found.setdefault(name.removesuffix(".weight"), []).append(node.node_name)
    return found
