"""Load an export with the library that it is for: ``python -m mpqsearch.export.check TARGET FOLDER ...``.

It prints what each folder holds, one JSON a line.

A module of its own so that it can run in a fresh process. It imports torch; only targets import it, when they write or
verify.
"""

from __future__ import annotations

import copy
import inspect
import json
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpqsearch.artifacts import atomic_path, environment, read_json
from mpqsearch.core import FULL_PRECISION
from mpqsearch.errors import ConfigError, MpqsearchError
from mpqsearch.export.contract import ExportJob, PlanEntry, get_exporter
from mpqsearch.export.target import CHECK, CONFIG, MANIFEST
from mpqsearch.models.denoiser import Condition, Denoiser
from mpqsearch.quant import QuantizedRows, quantize_weight, weight_of
from mpqsearch.quant.apply import check_moments, moment_of

_TIMESTEPS = (10, 500)


def write_check(path: Path, denoiser: Denoiser, cond: Condition = None) -> list[Path]:
    """Write inputs of two samples and the prediction of ``denoiser`` for them; nothing when the model cannot be called
    so."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *denoiser.sample_shape, generator=generator)
    t = torch.tensor(_TIMESTEPS)
    if cond is None and denoiser.n_classes:
        cond = torch.arange(2) % denoiser.n_classes
    path.unlink(missing_ok=True)
    try:
        with torch.no_grad():
            y = denoiser.denoise(x, t, cond)
    except (MpqsearchError, TypeError, ValueError):
        return []  # it needs a condition that nobody gave; the widths are still read back
    tensors = {"x": x, "t": t, "y": y.contiguous(), **_flat(cond)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    return [path]


def forward_error(folder: Path, module: nn.Module) -> float | None:
    """Largest difference from the prediction of the check file, over its largest value; None without a check file."""
    if not (folder / CHECK).is_file():
        return None
    sample_shape = read_json(folder / MANIFEST, "mpqsearch/export").data["sample_shape"]
    return relative_error(*_checked_call(folder, module, sample_shape))


def call_arguments(folder: Path, module: nn.Module, sample_shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Arguments by name of the call that ``module`` gets for the inputs of the check file, for libraries that trace a
    model.

    ``sample_shape``: that of the denoiser, while the manifest is not written yet.
    """
    held: dict[str, Any] = {}

    def keep(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held.update(inspect.signature(called.forward).bind(*args, **kwargs).arguments)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        _checked_call(
            folder, module, sample_shape or read_json(folder / MANIFEST, "mpqsearch/export").data["sample_shape"]
        )
    finally:
        handle.remove()
    return held


def _checked_call(folder: Path, module: nn.Module, sample_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What ``module`` predicts for the inputs of the check file, and what the file holds."""
    check = load_file(folder / CHECK)
    named = {k.removeprefix("cond."): v for k, v in check.items() if k.startswith("cond.")}
    denoiser = Denoiser(name="export", module=module, sample_shape=tuple(sample_shape))
    with torch.no_grad():
        return denoiser.denoise(check["x"], check["t"], check.get("cond", named or None)), check["y"]


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((y - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def model_class(folder: Path) -> Any:
    """The diffusers class that ``config.json`` names."""
    import diffusers

    config = json.loads((folder / CONFIG).read_text())
    maker = getattr(diffusers, config["_class_name"], None)
    if not (isinstance(maker, type) and issubclass(maker, diffusers.ConfigMixin) and issubclass(maker, nn.Module)):
        raise TypeError(f"diffusers has no model {config['_class_name']!r}")
    return maker


def build_model(folder: Path) -> nn.Module:
    """An empty model from ``config.json``: float32, evaluation mode, weights from a fixed seed."""
    torch.manual_seed(0)
    config = json.loads((folder / CONFIG).read_text())
    model = model_class(folder).from_config({k: v for k, v in config.items() if k != "quantization_config"})
    assert isinstance(model, nn.Module)
    return model.float().eval().requires_grad_(False)


def planned_layers(folder: Path) -> list[str]:
    """The layers of the plan."""
    return [p["layer"] for p in read_json(folder / MANIFEST, "mpqsearch/export").data["plan"]]


def libraries(*names: str) -> dict[str, str]:
    """Versions, for the record."""
    found: dict[str, str] = environment((*names, "torch", "diffusers", "safetensors"))["libraries"]
    return found


def stored_size(path: Path) -> dict[str, int]:
    """Bytes of the tensors of a safetensors file, and of its header."""
    with path.open("rb") as handle:
        header = 8 + struct.unpack("<Q", handle.read(8))[0]
    return {"stored_bytes": path.stat().st_size - header, "header_bytes": header}


def own_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory, as tied layers do: every later one is copied."""
    seen: set[int] = set()
    own = {}
    for key, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        own[key] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return own


def copy_of(job: ExportJob) -> nn.Module:
    """A copy of the job's model, so that the given one stays as it is."""
    assert job.denoiser is not None
    return copy.deepcopy(job.denoiser.module).eval().requires_grad_(False)


def our_rows(job: ExportJob, plan: Sequence[PlanEntry], *, affine: bool = True) -> dict[str, QuantizedRows]:
    """Codes and scales of every planned layer, from our own quantizer at the planned width.

    Targets that hold integer zero points only (``asymmetric``) get the asymmetric scheme without smoothing, whatever
    the map says; for a map in the asymmetric format these are the very codes of the fake-quantized model. Raises
    `ConfigError` when the model lacks a planned layer.
    """
    from dataclasses import replace

    assert job.denoiser is not None
    modules = dict(job.denoiser.module.named_modules())
    check_moments(job.bit_map, job.moments)
    rows = {}
    for entry in plan:
        if entry.will_get == FULL_PRECISION:
            continue
        layer = job.table[entry.layer]
        if layer.name not in modules:
            raise ConfigError(f"the model has no layer {layer.name!r}, which the plan names")
        fmt = job.bit_map.format_of(layer.name)
        if affine:
            fmt = replace(fmt, scheme="asymmetric", smooth=False)
        if entry.will_get is None:
            widths = torch.from_numpy(job.bit_map.channel_widths(layer.name, layer.n_channels).copy())
        else:
            widths = torch.full((layer.n_channels,), entry.will_get, dtype=torch.uint8)
        maxima = job.input_max.get(layer.name)
        input_max = None if maxima is None else torch.as_tensor(maxima)
        weight: Tensor = modules[layer.name].weight
        rows[layer.name] = quantize_weight(
            weight, layer, widths, fmt, input_max, moment_of(layer.name, job.moments, None)
        )
    return rows


def fake_quantized(job: ExportJob, rows: Mapping[str, QuantizedRows]) -> Denoiser:
    """The job's model with the weights that ``rows`` decode to: what the consumer should compute."""
    assert job.denoiser is not None
    module = copy_of(job)
    modules: dict[str, Any] = dict(module.named_modules())
    for name, quantized in rows.items():
        weight = modules[name].weight
        weight.data.copy_(weight_of(quantized.rows(), job.table[name]).to(weight.dtype))
    return job.denoiser.with_module(module)


def most_levels(weight: Tensor, layer_shape: Sequence[int] | None = None) -> int:
    """The largest number of distinct values that any output channel holds (axis 0)."""
    rows = weight.detach().float().reshape(layer_shape or weight.shape).flatten(1).sort(1).values
    return int((rows[:, 1:] != rows[:, :-1]).sum(1).max()) + 1


def _flat(cond: Condition) -> dict[str, Tensor]:
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"cond": cond.contiguous()}
    return {f"cond.{k}": v.contiguous() for k, v in cond.items()}


def report(target: str, folder: Path) -> dict[str, Any]:
    """What the target's ``read_back`` says of a folder; whatever a library raises is a problem of the report."""
    exporter: Any = get_exporter(target)
    try:
        seen: dict[str, Any] = exporter.read_back(folder)
    except Exception as error:  # noqa: BLE001 - consumers raise many kinds; each means that it could not load the folder
        return {"widths": {}, "problems": [f"{target} could not load {folder}: {type(error).__name__}: {error}"]}
    return seen


def main(arguments: list[str]) -> int:
    """Print the report of each pair of target and folder, one JSON a line."""
    for target, folder in zip(arguments[::2], arguments[1::2], strict=True):
        print(json.dumps(report(target, Path(folder))), flush=True)  # noqa: T201 - this is the answer to the calling process
    return 0


if __name__ == "__main__":
    import mpqsearch.export  # noqa: F401 - registers the targets

    sys.exit(main(sys.argv[1:]))
