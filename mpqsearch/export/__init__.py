"""Bit maps for other tools. A seam: one file per target, all behind `get_exporter`; rendering needs no torch.

    job = ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, rounding="resolve", inputs=..., provenance=...)
    exporter = get_exporter("quanto")            # "neutral", "quanto"; `EXPORTERS` holds them all
    exporter.capabilities() -> Capabilities      # widths, layer kinds, granularity
    exporter.plan(job) -> list[PlanEntry]        # layer, asked, will_get, reason; `plan_table` makes rows of it
    exporter.write(folder, job) -> list[Path]    # all or nothing
    exporter.verify(folder) -> Verification      # the consumer itself says what it got; .ok, .verified, .summary()
    import_map(path, table) -> Imported          # the other way: the widths that a file of another tool gives a model

The bit map of every run is in the neutral format already, when it is written with

    artifacts.save_bit_map(path, bit_map, inputs, neutral_extra(table, bit_map, provenance=...))
    load_neutral(path, table) -> NeutralMap      # schema, digests and accounting checked
"""

from mpqsearch.export.accounting import accounting
from mpqsearch.export.aimet import AimetExporter
from mpqsearch.export.autoround import AutoRoundExporter
from mpqsearch.export.comfyui import ComfyuiExporter
from mpqsearch.export.compressed_tensors import CompressedTensorsExporter
from mpqsearch.export.contract import (
    EXPORTERS,
    Capabilities,
    Choice,
    Exporter,
    ExportJob,
    PlanEntry,
    Verification,
    VerifyEntry,
    get_exporter,
    lost_inputs,
    plan_table,
    register,
)
from mpqsearch.export.coreml import CoreMLExporter
from mpqsearch.export.gguf import GgufExporter
from mpqsearch.export.hqq import HqqExporter
from mpqsearch.export.inc import IncExporter
from mpqsearch.export.mixdq import MixdqExporter
from mpqsearch.export.mlx import MlxExporter
from mpqsearch.export.modelopt import ModelOptExporter
from mpqsearch.export.neutral import (
    NeutralExporter,
    NeutralMap,
    bit_map_schema,
    load_neutral,
    neutral_extra,
    structure_digest,
    write_neutral,
)
from mpqsearch.export.nncf import NncfExporter
from mpqsearch.export.onnx import OnnxExporter
from mpqsearch.export.quanto import QuantoExporter
from mpqsearch.export.quark import QuarkExporter
from mpqsearch.export.reading import Imported, Reading, import_map, importable
from mpqsearch.export.rounding import plan_layers
from mpqsearch.export.sdcpp import SdcppExporter
from mpqsearch.export.sdnq import SdnqExporter
from mpqsearch.export.torchao import TorchaoConfigExporter, TorchaoExporter
from mpqsearch.specs.targets import ROUNDINGS

register("neutral", NeutralExporter)
register("quanto", QuantoExporter)
register("torchao", TorchaoExporter)
register("torchao-config", TorchaoConfigExporter)
register("gguf", GgufExporter)
register("sdnq", SdnqExporter)
register("onnx", OnnxExporter)
register("autoround", AutoRoundExporter)
register("compressed-tensors", CompressedTensorsExporter)
register("modelopt", ModelOptExporter)
register("inc", IncExporter)
register("hqq", HqqExporter)
register("coreml", CoreMLExporter)
register("mlx", MlxExporter)
register("quark", QuarkExporter)
register("nncf", NncfExporter)
register("aimet", AimetExporter)
register("mixdq", MixdqExporter)
register("sdcpp", SdcppExporter)
register("comfyui", ComfyuiExporter)

__all__ = [
    "EXPORTERS",
    "ROUNDINGS",
    "Capabilities",
    "Choice",
    "ExportJob",
    "Exporter",
    "Imported",
    "NeutralExporter",
    "NeutralMap",
    "PlanEntry",
    "QuantoExporter",
    "Reading",
    "Verification",
    "VerifyEntry",
    "accounting",
    "bit_map_schema",
    "get_exporter",
    "import_map",
    "importable",
    "load_neutral",
    "lost_inputs",
    "neutral_extra",
    "plan_layers",
    "plan_table",
    "register",
    "structure_digest",
    "write_neutral",
]
