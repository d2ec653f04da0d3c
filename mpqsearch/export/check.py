"""What targets share when they write and verify weights: it imports torch, so they import it when they do either."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpqsearch.artifacts import atomic_path, read_tensors
from mpqsearch.core import FULL_PRECISION, LayerSpec
from mpqsearch.errors import ArtifactError, ConfigError, MpqsearchError
from mpqsearch.export.contract import CHECK, CONFIG, EXPECTED, ExportJob, PlanEntry
from mpqsearch.export.reading import bits_of
from mpqsearch.models.calls import Calls, load_calls, save_calls
from mpqsearch.models.denoiser import Denoiser
from mpqsearch.quant import QuantizedRows, quantize_weight, rows_of, weight_of
from mpqsearch.quant.apply import bias_shift, check_moments
from mpqsearch.sources import read_config


def source_of(job: ExportJob) -> Denoiser:
    """The denoiser with a copy of the model that is exported, in float32 on the CPU, whatever runs: the trained one
    where there is one, else that of full precision."""
    module = copy.deepcopy(job.model.module).cpu().float().eval().requires_grad_(False)
    if job.trained is not None:
        put_weights(module, job.trained.module.state_dict())
    return job.model.with_module(module)


@torch.no_grad()
def put_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a module other values of all its parameters and stored buffers, and return it. Raises `ArtifactError` when
    one is missing or has another shape."""
    for name, tensor in module.state_dict().items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = "none" if name not in weights else f"the shape {tuple(weights[name].shape)}"
            raise ArtifactError(f"{name!r} should have the shape {tuple(tensor.shape)}; what was read has {found}")
        tensor.copy_(weights[name])
    return module


def plain_weights(module: nn.Module, decoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a module that a consumer loaded, by name: ``decoded`` are the weights of quantized layers."""
    whole = {n: t.detach() for n, t in module.state_dict().items() if isinstance(t, Tensor)}
    return whole | {f"{name}.weight": weight.detach().float() for name, weight in decoded.items()}


def write_check(folder: Path, job: ExportJob, module: nn.Module) -> list[Path]:
    """Write a call of the job's denoiser, the prediction of ``module`` for it that the consumer must give too, and that
    of the evaluated model; nothing when the denoiser cannot be called."""
    try:
        call = job.model.runner.examples(job.model.module)[0]
    except (MpqsearchError, TypeError, ValueError):
        return []  # it needs inputs that nobody recorded; the widths are still read back
    with torch.no_grad():
        expected = {"prediction": call.replay(module)}
        if job.evaluated is not None:
            expected["evaluated"] = job.evaluated(call).float()
    save_calls(folder / CHECK, Calls([call], model=type(module).__name__))
    return [folder / CHECK, save_tensors(folder / EXPECTED, expected)]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, whole or not at all. Tensors that share memory, as tied layers do, are copied."""
    seen: set[int] = set()
    unshared = {}
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        unshared[key] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    with atomic_path(path) as temporary:
        save_file(unshared, temporary, {"format": "pt", **(metadata or {})})
    return path


def forward_errors(folder: Path, module: nn.Module) -> dict[str, float]:
    """``forward_error`` and ``evaluated_error`` of a `mpqsearch.export.contract.Verification`: how ``module`` differs
    from the predictions that `write_check` wrote; those that it did not write are left out."""
    if not (folder / EXPECTED).is_file():
        return {}
    expected = read_tensors(folder / EXPECTED)
    with torch.no_grad():
        seen = load_calls(folder / CHECK)[0].replay(module)
    written = expected["prediction"]
    errors = {"forward_error": float((seen - written).abs().max() / written.abs().max().clamp_min(1e-12))}
    if "evaluated" in expected:
        evaluated = expected["evaluated"].double()
        errors["evaluated_error"] = float((seen.double() - evaluated).norm() / evaluated.norm().clamp_min(1e-12))
    return errors


def loaded(
    folder: Path, module: nn.Module, formats: Mapping[str, str], stored: Iterable[str] | None = None
) -> dict[str, Any]:
    """What ``read_back`` says of a model that was loaded with its quantized layers in ``formats``.

    ``stored``: names of the tensors in the file, for consumers that pass over missing and unknown ones in silence.
    """
    held = set(module.state_dict())
    names = held if stored is None else set(stored)
    problems = [f"the file has no tensor {key!r}, which the model holds" for key in sorted(held - names)]
    problems += [f"the model has no place for the tensor {key!r} of the file" for key in sorted(names - held)]
    return {
        "widths": {name: bits_of(choice) for name, choice in formats.items()},
        "choices": dict(formats),
        "problems": problems,
        **forward_errors(folder, module),
    }


def model_class(config: Mapping[str, Any]) -> Any:
    """The class of diffusers, or of transformers, that a ``config.json`` names. Raises `ArtifactError` when there is
    none."""
    import diffusers

    if "_class_name" not in config and config.get("architectures"):
        import transformers

        encoder = getattr(transformers, str(config["architectures"][0]), None)
        if isinstance(encoder, type) and issubclass(encoder, transformers.PreTrainedModel):
            return encoder
        raise ArtifactError(f"transformers has no model {config['architectures'][0]!r}")
    maker = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(maker, type) and issubclass(maker, diffusers.ConfigMixin) and issubclass(maker, nn.Module)):
        raise ArtifactError(f"diffusers has no model {config.get('_class_name')!r}")
    return maker


def config_of(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of an export."""
    return read_config(folder / CONFIG)


def load_pretrained(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as diffusers loads it."""
    return model_class(config_of(folder)).from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True).eval()


def build_model(folder: Path) -> nn.Module:
    """An empty model from ``config.json``: float32, evaluation mode, weights from a fixed seed."""
    torch.manual_seed(0)
    config = config_of(folder)
    model = model_class(config).from_config({k: v for k, v in config.items() if k != "quantization_config"})
    assert isinstance(model, nn.Module)
    return model.float().eval().requires_grad_(False)


def stored_size(path: Path) -> dict[str, int]:
    """Bytes of the tensors of a safetensors file, and of its header."""
    with path.open("rb") as handle:
        header = 8 + struct.unpack("<Q", handle.read(8))[0]
    return {"stored_bytes": path.stat().st_size - header, "header_bytes": header}


def each_quantized(
    job: ExportJob, plan: Sequence[PlanEntry], *, asymmetric: bool = True
) -> Iterator[tuple[LayerSpec, QuantizedRows]]:
    """Every planned layer with its codes and scales from our own quantizer at the planned width, one after another.

    Targets that hold integer zero points only (``asymmetric``) get the asymmetric scheme, one scale a channel and no
    smoothing, whatever the map says. Else, and for a map in the asymmetric format, these are the very codes of the
    model that was evaluated, trained ones if there are any. Raises `ConfigError` when the model lacks a planned layer.
    """
    modules = dict(job.model.module.named_modules())
    check_moments(job.bit_map, job.statistics)
    for entry in plan:
        if entry.will_get == FULL_PRECISION:
            continue
        layer = job.table[entry.layer]
        if layer.name not in modules:
            raise ConfigError(f"the model has no layer {layer.name!r}, which the plan names")
        fmt = job.bit_map.format_of(layer.name)
        if asymmetric:
            fmt = replace(fmt, scheme="asymmetric", smooth=False, group=0)
        if entry.will_get is None:
            widths = torch.from_numpy(job.bit_map.channel_widths(layer.name, layer.n_channels).copy())
        else:
            widths = torch.full((layer.n_channels,), entry.will_get, dtype=torch.uint8)
        owner: Any = modules[layer.name]
        trained = None if job.trained is None else job.trained.rows.get(layer.name)
        if trained is not None and _holds(trained, widths, asymmetric=asymmetric):
            yield layer, on_cpu(trained)
            continue
        known, corrected = job.statistics.get(layer.name), job.bias_correction and owner.bias is not None
        with torch.no_grad():
            yield layer, quantize_weight(owner.weight, layer, widths, fmt, known, bias_correction=corrected)


def _holds(rows: QuantizedRows, widths: Tensor, *, asymmetric: bool) -> bool:
    """Whether trained rows have these widths and, where only such are held, integer zero points, no factors and no
    groups."""
    plain = rows.factor is None and rows.quantizer.groups == 1
    whole = plain and bool((rows.quantizer.zero == rows.quantizer.zero.round()).all())
    return torch.equal(rows.quantizer.bits.cpu(), widths) and (whole or not asymmetric)


def on_cpu(rows: QuantizedRows) -> QuantizedRows:
    """The same rows on the CPU."""

    def moved(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.detach().cpu()

    q = rows.quantizer
    quantizer = replace(q, scale=q.scale.detach().cpu(), zero=q.zero.detach().cpu(), bits=q.bits.cpu())
    return QuantizedRows(
        codes=rows.codes.cpu(), quantizer=quantizer, factor=moved(rows.factor), full_rows=moved(rows.full_rows)
    )


def our_rows(job: ExportJob, plan: Sequence[PlanEntry], *, asymmetric: bool = True) -> dict[str, QuantizedRows]:
    """`each_quantized` by name."""
    return {layer.name: rows for layer, rows in each_quantized(job, plan, asymmetric=asymmetric)}


def decode_in_place(job: ExportJob, rows: Mapping[str, QuantizedRows]) -> nn.Module:
    """The job's module with the weights that ``rows`` decode to, and the biases that go with them: what the consumer
    should compute."""
    modules: dict[str, Any] = dict(job.model.module.named_modules())
    for name, quantized in rows.items():
        decoded = weight_of(quantized.rows(), job.table[name])
        correct_bias(job, name, modules[name], decoded)
        modules[name].weight.data.copy_(decoded)
    return job.model.module


@torch.no_grad()
def correct_bias(job: ExportJob, name: str, owner: Any, decoded: Tensor) -> None:
    """Take the mean output error of a layer whose file holds the weight ``decoded`` off the bias of ``owner``, in
    place; nothing where the job corrects none, or nothing is known of the layer's inputs."""
    known, layer = job.statistics.get(name), job.table[name]
    if not job.bias_correction or owner.bias is None or known is None:
        return
    exact: Tensor = job.model.module.get_submodule(name).weight  # type: ignore[assignment]
    error = rows_of(decoded.float(), layer) - rows_of(exact.float(), layer)
    owner.bias.sub_(bias_shift(error, known.mean))
