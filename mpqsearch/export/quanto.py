"""optimum-quanto: one of int2, int4 or int8 per linear layer or 2-d convolution, weights and map in a folder that it loads.

Limits, from its code (0.2.7) and from running it:

- Widths 2, 4 and 8. One width per layer. Linear and Conv2d; other layers stay at full precision.
- It re-derives scales from the weights (minimum and maximum, in groups of 128 inputs or fewer for 2 and 4 bits, a row for 8), so the
  searched ranges and codebooks of a map are not used, and stored bits are above the nominal ones.
- Names that a model does not have are ignored in silence, and missing tensors too: hence `QuantoExporter.verify`.
- Where 2 or 4 bits are first loaded or used it compiles a C++ kernel, which takes a compiler and up to minutes, once per installation.
  Here the same is computed in torch instead, until that kernel exists.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import atomic_path, digest_file, environment, read_json, write_json, write_text
from mpqsearch.core import FULL_PRECISION
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.export.contract import Capabilities, ExportJob, PlanEntry, Verification, VerifyEntry
from mpqsearch.export.neutral import NeutralExporter
from mpqsearch.export.rounding import plan_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS, MAP, CONFIG = "diffusion_pytorch_model.safetensors", "quanto_qmap.json", "config.json"
"""The names that ``optimum.quanto.QuantizedDiffusersModel`` looks for."""

MANIFEST, CHECK = "export.json", "check.safetensors"

WIDTHS = (2, 4, 8)
KINDS = ("Linear", "Conv2d")
TOLERANCE = 1e-4
"""Largest difference of the forward pass, as a share of the largest output; the same codes in another process give rounding only."""

_INSTALL = "optimum-quanto is not installed. Run: pip install 'mpqsearch[export]'"


class QuantoExporter:
    """Writes ``diffusion_pytorch_model.safetensors``, ``quanto_qmap.json``, the neutral map and ``export.json``."""

    name = "quanto"

    def capabilities(self) -> Capabilities:
        """Widths 2, 4 and 8 per layer; linear layers and 2-d convolutions."""
        notes = (
            "scales are derived anew from the weights; searched ranges and codebooks are not used",
            "2 and 4 bits have groups of up to 128 inputs with a float scale and shift each",
            "it compiles a C++ kernel, once, where 2 or 4 bits are first loaded or used",
        )
        return Capabilities(widths=WIDTHS, kinds=KINDS, granularity="layer", payload=True, requires="optimum-quanto", notes=notes)

    def plan(self, job: ExportJob) -> list[PlanEntry]:
        """One entry per layer; see `plan_layers` for the roundings."""
        return plan_layers(job, self.name, WIDTHS, KINDS)

    def write(self, folder: Path, job: ExportJob) -> list[Path]:
        """Quantize a copy of the model with quanto and write the folder; ``export.json`` last, it says that all is whole.

        Raises `ConfigError` without a model or without optimum-quanto, and for a width refused by ``rounding="error"``.
        """
        if job.denoiser is None:
            raise ConfigError("the target 'quanto' writes weights, so it needs the model: give ExportJob a denoiser")
        plan = self.plan(job)
        module = quantized_copy(job.denoiser.module, plan)
        (folder / MANIFEST).unlink(missing_ok=True)
        paths = [_write_weights(folder / WEIGHTS, module, job), *_write_config(folder, job.denoiser.module)]
        write_text(folder / MAP, json.dumps(_quantization_map(module), indent=1) + "\n")
        paths += [folder / MAP, *_write_check(folder, job, module), *NeutralExporter().write(folder, job)]
        _write_manifest(folder, job, plan, paths)
        return [*paths, folder / MANIFEST]

    def verify(self, folder: Path, module: nn.Module | None = None) -> Verification:
        """Load the folder with quanto, read the width of each layer from its tensors and compare a forward pass.

        A diffusers model is built from ``config.json`` in a fresh process. For any other, give ``module``, a new instance of the same
        class; it is filled in this process.
        """
        problems = _damage(folder)
        if problems:
            return Verification(target=self.name, entries=(), problems=tuple(problems))
        plan = read_json(folder / MANIFEST, "mpqsearch/export").data["plan"]
        if module is not None:
            from mpqsearch.export.quanto_check import read_back

            seen = read_back(folder, module)
        elif (folder / CONFIG).is_file():
            seen = _fresh_process(folder)
        else:
            why = f"{folder} has no {CONFIG}: not a diffusers model. Give verify() a new instance of its class as module."
            return Verification(target=self.name, entries=(), problems=(why,))
        return _compare(self.name, plan, seen)


def quantized_copy(module: nn.Module, plan: Sequence[PlanEntry]) -> nn.Module:
    """A copy of ``module``, quantized and frozen by quanto as planned. Raises `ConfigError` when quanto did not take a layer."""
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
        raise ConfigError(f"quanto did not take {', '.join(sorted(wrong)[:5])} as planned; are these modules of the model?")
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

    with atomic_path(path) as temporary:
        save_file(_own_tensors(module.state_dict()), temporary, {"format": "pt", "mpqsearch.bit_map": job.bit_map.digest})
    return path


def _own_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory, as tied layers do: every later one is copied."""
    seen: set[int] = set()
    own = {}
    for key, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        own[key] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return own


def _write_config(folder: Path, module: nn.Module) -> list[Path]:
    """The configuration of a diffusers model, from which the check and quanto's own loader build it; nothing for others."""
    to_text = getattr(module, "to_json_string", None)
    if to_text is None:
        (folder / CONFIG).unlink(missing_ok=True)
        return []
    write_text(folder / CONFIG, to_text())
    return [folder / CONFIG]


def _write_check(folder: Path, job: ExportJob, module: nn.Module) -> list[Path]:
    from mpqsearch.export.quanto_check import write_check

    assert job.denoiser is not None
    return write_check(folder / CHECK, job.denoiser.with_module(module), job.cond)


def _write_manifest(folder: Path, job: ExportJob, plan: Sequence[PlanEntry], paths: Sequence[Path]) -> None:
    data = {
        "target": QuantoExporter.name,
        "rounding": job.rounding,
        "map_digest": job.bit_map.digest,
        "stored_bytes": (folder / WEIGHTS).stat().st_size,
        "plan": [
            {"layer": e.layer, "asked": e.asked_text, "will_get": e.will_get, "reason": e.reason, "detail": e.detail} for e in plan
        ],
        "sample_shape": list(job.denoiser.sample_shape) if job.denoiser is not None else [],
        "files": {p.name: digest_file(p) for p in paths},
        "environment": environment(("optimum-quanto", "torch", "diffusers", "safetensors")),
    }
    write_json(folder / MANIFEST, "mpqsearch/export", data, job.inputs)


def _damage(folder: Path) -> list[str]:
    """What is wrong with the files, before anything is loaded."""
    try:
        data = read_json(folder / MANIFEST, "mpqsearch/export").data
    except ArtifactError as error:
        return [str(error)]
    if data.get("target") != QuantoExporter.name:
        return [f"{folder} is an export for {data.get('target')!r}, not for 'quanto'"]
    found = {name: digest_file(folder / name) if (folder / name).is_file() else None for name in data["files"]}
    changed = [name for name, digest in data["files"].items() if found[name] != digest]
    return [f"{folder / name} is missing or was changed after the export. Export again." for name in changed]


def _fresh_process(folder: Path) -> dict[str, Any]:
    """What ``quanto_check`` reads back in a process of its own, where nothing of this one can help."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "mpqsearch.export.quanto_check", str(folder)]
    done = subprocess.run(  # noqa: S603 - our own module, and the folder is an argument, not a command
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"widths": {}, "problems": [f"quanto could not load {folder}: {last}"], "forward_error": None, "versions": {}}
    seen: dict[str, Any] = json.loads(lines[-1])
    return seen


def _compare(target: str, plan: Sequence[Mapping[str, Any]], seen: Mapping[str, Any]) -> Verification:
    widths = dict(seen["widths"])
    entries = tuple(
        VerifyEntry(layer=p["layer"], asked=p["asked"], planned=p["will_get"], got=widths.pop(p["layer"], None), reason=p["reason"])
        for p in plan
    )
    problems = [*seen["problems"], *(f"{name} is quantized to {bits} bits and is not in the plan" for name, bits in widths.items())]
    error = seen["forward_error"]
    if error is not None and not math.isfinite(error):
        problems.append("the forward pass is not finite")
        error = None
    if error is not None and error > TOLERANCE:
        problems.append(f"the forward pass differs by {error:.2g} of the largest output, more than {TOLERANCE:g}")
    return Verification(
        target=target, entries=entries, problems=tuple(problems), forward_error=error, versions=dict(seen["versions"])
    )
