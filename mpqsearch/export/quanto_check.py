"""Load an export with optimum-quanto and say what it holds: ``python -m mpqsearch.export.quanto_check FOLDER`` prints JSON.

A module of its own so that it can run in a fresh process. It imports torch; nothing imports it but `mpqsearch.export.quanto`,
when it writes or verifies.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpqsearch.artifacts import atomic_path, environment, read_json
from mpqsearch.core import FULL_PRECISION
from mpqsearch.errors import MpqsearchError
from mpqsearch.export.quanto import CHECK, CONFIG, MANIFEST, MAP, WEIGHTS, require_quanto
from mpqsearch.models.denoiser import Condition, Denoiser

_TIMESTEPS = (10, 500)


def write_check(path: Path, denoiser: Denoiser, cond: Condition = None) -> list[Path]:
    """Write inputs of two samples and the prediction of ``denoiser`` for them; nothing when the model cannot be called so."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *denoiser.sample_shape, generator=generator)
    t = torch.tensor(_TIMESTEPS)
    if cond is None and denoiser.n_classes:
        cond = torch.arange(2) % denoiser.n_classes
    path.unlink(missing_ok=True)
    try:
        with torch.no_grad(), torch_kernels():
            y = denoiser.denoise(x, t, cond)
    except (MpqsearchError, TypeError, ValueError):
        return []  # it needs a condition that nobody gave; the widths are still read back
    tensors = {"x": x, "t": t, "y": y.contiguous(), **_flat(cond)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    return [path]


def read_back(folder: Path, module: nn.Module) -> dict[str, Any]:
    """Fill ``module`` from ``folder`` with ``requantize`` and report.

    Returns ``widths`` (layer to bits of the tensor it holds; 16 for planned layers that are not quantized), ``problems``,
    ``forward_error`` (largest difference over the largest output; None without a check file) and ``versions``.
    """
    quanto = require_quanto()
    manifest = read_json(folder / MANIFEST, "mpqsearch/export").data
    state = load_file(folder / WEIGHTS)
    stored = set(state)  # requantize takes tensors out of the dict
    with torch_kernels():  # loading unpacks the codes too
        quanto.requantize(module, state, json.loads((folder / MAP).read_text()))
    module.eval()
    problems = _differences(stored, set(module.state_dict()))
    planned = {p["layer"] for p in manifest["plan"]}
    modules = dict(module.named_modules())
    problems += [f"the loaded model has no layer {name!r}" for name in sorted(planned - set(modules))]
    widths = {n: _width(m) for n, m in modules.items() if n in planned or _width(m) != FULL_PRECISION}
    libraries = environment(("optimum-quanto", "torch", "diffusers", "safetensors"))["libraries"]
    error = _forward_error(folder, module, tuple(manifest["sample_shape"]))
    return {"widths": widths, "problems": problems, "forward_error": error, "versions": libraries}


@contextlib.contextmanager
def torch_kernels() -> Iterator[None]:
    """Let quanto unpack 2- and 4-bit codes in torch where its C++ kernel was not built yet.

    The kernel is compiled when codes are first loaded or used, which takes minutes and a compiler; the codes are the same either way.
    """
    require_quanto()
    from optimum.quanto.library.extensions.extension import get_extension

    extension = get_extension("quanto_cpp")
    built = extension._lib is not None or (Path(extension.build_directory) / "pytorch_version.txt").exists()
    if built:
        yield
        return
    extension._lib = SimpleNamespace(unpack=_unpack)
    try:
        yield
    finally:
        extension._lib = None


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits, lowest first, out of bytes: ``[n, ...]`` to ``[n * 8 // bits, ...]``, as quanto's kernel does."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def _flat(cond: Condition) -> dict[str, Tensor]:
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"cond": cond.contiguous()}
    return {f"cond.{k}": v.contiguous() for k, v in cond.items()}


def _differences(stored: set[str], loaded: set[str]) -> list[str]:
    """quanto loads without a word when tensors are missing or left over."""
    problems = [f"the file has no tensor {key!r}, which the model holds" for key in sorted(loaded - stored)]
    return problems + [f"the model has no place for the tensor {key!r} of the file" for key in sorted(stored - loaded)]


def _width(module: nn.Module) -> int:
    """Bits of the tensor that a module really holds, whatever its settings say."""
    quanto = require_quanto()
    if not isinstance(module, quanto.QModuleMixin) or not isinstance(module.weight, quanto.QTensor):
        return FULL_PRECISION
    return int(module.weight.qtype.bits)


def _forward_error(folder: Path, module: nn.Module, sample_shape: tuple[int, ...]) -> float | None:
    if not (folder / CHECK).is_file():
        return None
    check = load_file(folder / CHECK)
    named = {k.removeprefix("cond."): v for k, v in check.items() if k.startswith("cond.")}
    denoiser = Denoiser(name="export", module=module, sample_shape=sample_shape)
    with torch.no_grad(), torch_kernels():
        y = denoiser.denoise(check["x"], check["t"], check.get("cond", named or None))
    return float((y - check["y"]).abs().max() / check["y"].abs().max().clamp_min(1e-12))


def _build(folder: Path) -> nn.Module:
    """An empty model of the class that ``config.json`` names."""
    import diffusers

    config = json.loads((folder / CONFIG).read_text())
    maker = getattr(diffusers, config["_class_name"], None)
    if not (isinstance(maker, type) and issubclass(maker, diffusers.ConfigMixin) and issubclass(maker, nn.Module)):
        raise TypeError(f"diffusers has no model {config['_class_name']!r}")
    build: Any = maker  # diffusers has no types to say that it has from_config
    model = build.from_config(config)
    assert isinstance(model, nn.Module)
    return model


def main(arguments: list[str]) -> int:
    """Print the report of `read_back` for the folder in ``arguments``."""
    folder = Path(arguments[0])
    print(json.dumps(read_back(folder, _build(folder))))  # noqa: T201 - this is the answer to the calling process
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
