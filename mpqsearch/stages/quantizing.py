"""The fake-quantized model as a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch import artifacts
from mpqsearch.core import BitMap, Budget
from mpqsearch.errors import ConfigError
from mpqsearch.stages.allocating import allocation
from mpqsearch.stages.base import Run, same_model, slug
from mpqsearch.stages.references import quantized_module

if TYPE_CHECKING:
    from torch import nn


def quantize(run: Run, method_name: str, budget: Budget) -> Path:
    """Write the fake-quantized model as a diffusers folder with its bit map."""
    method = run.config.method(method_name)
    bit_map, _ = allocation(run, method, budget)
    folder = run.path("quantized", slug(method_name, budget))
    if run.dry_run:
        run.say(f"quantize: would write {folder}")
        return folder
    same_model(run)
    module = quantized_module(run, bit_map, bias_correction=method.bias_correction)
    write_model_folder(run, folder, module, bit_map)
    run.say(f"quantize: {folder}")
    return folder


def write_model_folder(run: Run, folder: Path, module: nn.Module, bit_map: BitMap) -> None:
    """A diffusers folder with decoded weights, and the bit map beside it; of several denoisers one folder each, under
    its name in the pipeline. Raises `ConfigError` for modules that are not of diffusers."""
    from mpqsearch.models.runner import parts_of

    originals = parts_of(run.denoiser.module)
    for name, part in parts_of(module).items():
        if not hasattr(part, "save_pretrained"):
            raise ConfigError(f"{type(part).__name__} has no save_pretrained; use mpqsearch.quant from Python instead")
        _write_part(folder / name, part, originals[name])
    for name, data in run.denoiser.runner.files().items():
        _write_plain(folder / name, data)
    artifacts.save_bit_map(folder / "bitmap.json", bit_map, {"model": bit_map.model_digest})


def _write_part(folder: Path, module: nn.Module, original: nn.Module) -> None:
    from safetensors.torch import save

    names = original.state_dict().keys()  # quantizers of activations are no part of a diffusers folder
    weights = {k: v.contiguous().clone() for k, v in module.state_dict().items() if k in names}
    ours = hasattr(module, "to_json_string")  # of diffusers; a text encoder's configuration writes itself
    file = "diffusion_pytorch_model.safetensors" if ours else "model.safetensors"
    with artifacts.atomic_write(folder / file) as handle:
        handle.write(save(weights, metadata={"format": "pt"}))
    writer: Any = module if ours else module.config
    artifacts.write_text(folder / "config.json", writer.to_json_string())


def _write_plain(path: Path, data: dict[str, Any]) -> None:
    """JSON without an envelope, which other programs read."""
    artifacts.write_text(path, json.dumps(data, indent=2, default=str) + "\n")
