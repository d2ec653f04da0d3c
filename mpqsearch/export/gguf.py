"""GGUF: one tensor type per linear layer, in a file that diffusers, ComfyUI-GGUF and stable-diffusion.cpp read.

Limits, from the format (gguf 0.19, libgguf 0.2.2) and from running it through diffusers 0.42.1:

- Formats are types, not widths: they cost 2.625 (Q2_K) to 8.5 (Q8_0) bits a weight, all in. The K types need rows of a
  multiple of 256 weights, the others of 32; convolutions have shorter rows and stay at 16 bits.
- Scales are derived by the format's own quantizer; searched ranges and schemes of a map are not used. `round_trip`
  gives what it makes of a weight, so that an allocation can be priced with it.
- Layers at full precision are stored as F16, everything else as F32. The types offered are those that diffusers can
  read.
- Names are those of the model's own code, which ComfyUI-GGUF wants and diffusers translates, where
  `mpqsearch.export.names` knows them; else those of diffusers, which reads the file then and nothing else does. Layers
  that are one layer there have one type. ggml itself limits a name to 63 characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mpqsearch.artifacts import atomic_path
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits, coded_bits
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.names import PREFIX, in_diffusers, joined, places, places_of, separated, tied
from mpqsearch.export.reading import Reading, bits_of, by_name
from mpqsearch.export.target import Target, write_config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

FILE = "diffusion_model.gguf"

TYPES: dict[str, tuple[int, int, int]] = {
    "Q8_0": (8, 32, 34),
    "Q6_K": (6, 256, 210),
    "Q5_K": (5, 256, 176),
    "Q5_0": (5, 32, 22),
    "Q5_1": (5, 32, 24),
    "Q4_K": (4, 256, 144),
    "IQ4_NL": (4, 32, 18),
    "Q4_0": (4, 32, 18),
    "Q4_1": (4, 32, 20),
    "IQ4_XS": (4, 256, 136),
    "Q3_K": (3, 256, 110),
    "Q2_K": (2, 256, 84),
}
"""Type to width of its codes, weights of a block and bytes of a block (``gguf.GGML_QUANT_SIZES``), preferred ones of a
width first."""


class GgufTarget(Target):
    """``diffusion_model.gguf``: ``Model.from_single_file(file, quantization_config=GGUFQuantizationConfig(...))`` loads
    it."""

    name = "gguf"
    loading = "from mpqsearch.export.gguf import load_with_diffusers\n\nmodel = load_with_diffusers({folder!r})"
    requires = "gguf"
    imports = ("gguf", "libgguf")
    limits = "rows of a multiple of 32 weights (256 for K types)"
    tested = "0.19.0"
    get = "pip install gguf libgguf"
    full_bits = 16
    tolerance = 2e-3  # diffusers decodes the blocks in half precision, gguf itself in single

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """Types whose blocks divide the rows of the layer."""
        if layer.kind not in self.kinds:
            return ()
        return tuple(
            Choice(name=n, width=w) for n, (w, block, _) in TYPES.items() if layer.weights_per_channel % block == 0
        )

    def tied(self, table: LayerTable) -> list[tuple[str, ...]]:
        """Layers that are one layer in the model's own code."""
        return tied(table)

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Whole blocks: codes, and the scales and minima inside each block."""
        width, block, size = TYPES[choice.name]
        blocks = layer.n_weights // block
        return coded_bits(layer, Fraction(width), other=blocks * (8 * size - width * block))

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """The file with one tensor per parameter, ``config.json`` of the model, and the check."""
        import gguf

        from mpqsearch.export.check import correct_bias, write_check

        module = job.model.module
        names, found = {e.layer: e.choice or "F16" for e in plan}, places_of(module)
        owners: dict[str, Any] = {n: module.get_submodule(n) for n in names}
        weights: dict[str, Tensor] = {f"{n}.weight": owner.weight.detach() for n, owner in owners.items()}
        layers = {found[f"{n}.weight"].name: n for n in names}
        stored: dict[str, Any] = {}
        decoded = {}
        for name, whole in joined(weights, found).items():
            choice = names[layers[name]]
            if choice == "F16":
                stored[name], decoded[name] = whole.half().numpy(), whole.half().float()
            else:
                stored[name] = quantize(whole, choice, importance_of(job, layers[name]))
                decoded[name] = dequantize(stored[name], choice)
        values = separated(decoded, found, {key: len(weight) for key, weight in weights.items()})
        for name, owner in owners.items():
            correct_bias(job, name, owner, values[f"{name}.weight"])
            owner.weight.data.copy_(values[f"{name}.weight"])
        rest = {key: tensor.detach().float() for key, tensor in module.state_dict().items() if key not in weights}
        stored |= {name: tensor.contiguous().numpy() for name, tensor in joined(rest, found).items()}
        kind = architecture(module)
        prefix = PREFIX if kind in PREFIXED else ""
        with atomic_path(folder / FILE) as temporary:
            writer = gguf.GGUFWriter(temporary, kind)
            writer.add_string("mpqsearch.bit_map", job.bit_map.digest)
            writer.add_array("mpqsearch.layers", list(names) or [""])
            writer.add_array("mpqsearch.types", list(names.values()) or [""])
            for name, data in stored.items():
                choice = names[layers[name]] if name in layers else "F16"
                raw = None if choice == "F16" else gguf.GGMLQuantizationType[choice]
                writer.add_tensor(prefix + name, data, raw_dtype=raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return [folder / FILE, *write_config(folder, module), *write_check(folder, job, module)]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Load the file with diffusers and read the type of every weight."""
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFParameter

        from mpqsearch.export.check import loaded

        module = load_with_diffusers(folder)
        state = state_of(folder / FILE, module)
        types = {n.removesuffix(".weight"): t.quant_type for n, t in state.items() if isinstance(t, GGUFParameter)}
        formats = {n: gguf.GGMLQuantizationType(t).name for n, t in types.items()}
        return loaded(folder, module, formats, state) | self.sizes(folder)

    def unread(self, module: Any) -> str:
        """A model outside the list of architectures: no reader but diffusers' layers takes its file."""
        kind = type(module).__name__
        if kind in KNOWN and places(module.state_dict()) is not None:
            return ""
        return (
            f"the file of gguf holds a {kind} under its names in diffusers, which ComfyUI-GGUF and "
            f"stable-diffusion.cpp REFUSE: they take {', '.join(sorted(KNOWN))} as they were published. Only "
            "load_with_diffusers of mpqsearch.export.gguf reads it; to deploy the model, export it for another target "
            "(packed, sdnq, quanto)"
        )

    def sizes(self, folder: Path) -> dict[str, int]:
        """As the reader of gguf counts them."""
        import gguf

        size = sum(int(t.n_bytes) for t in gguf.GGUFReader(folder / FILE).tensors)
        return {"stored_bytes": size, "header_bytes": (folder / FILE).stat().st_size - size}

    def weights(self, folder: Path) -> Mapping[str, Tensor]:
        """What diffusers loads, every block as it decodes it."""
        from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

        from mpqsearch.export.check import plain_weights

        module = load_with_diffusers(folder)
        layers = ((n, getattr(m, "weight", None)) for n, m in module.named_modules())
        return plain_weights(module, {n: dequantize_gguf_tensor(w) for n, w in layers if isinstance(w, GGUFParameter)})

    def round_trip(self, weight: Tensor, layer: LayerSpec, choice: Choice) -> Tensor:
        """What the type makes of a weight."""
        return dequantize(quantize(weight, choice.name), choice.name)


def read(path: Path, table: LayerTable) -> Reading | None:
    """Types of the weight tensors of a file, or of the only file of a folder; a type stands for the width of its
    codes. Tensors may have the names of the model's own code."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".gguf":
        return None
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"{files[0]} is read with the package gguf, which is not installed. Run: pip install gguf"
        ) from error
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    stored = {n.removesuffix(".weight"): kind for n, kind in tensor_types(files[0]).items() if n.endswith(".weight")}
    types = {n: names.get(kind, f"number {kind}") for n, kind in stored.items()}
    widths = {n: _width(n, t) for n, t in types.items()}
    return by_name(in_diffusers(widths, table), ("a type's blocks and scales are not taken over, its width is",))


_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the values of the metadata, by the number of their type; 8 is a text, 9 an array."""

_TEXT, _ARRAY = 8, 9
_MOST = 1 << 22
"""Values and tensors that a header may have; vocabularies have 2**18."""


def tensor_types(path: Path) -> dict[str, int]:
    """Number of the type of every tensor of a GGUF file, from its header: what the header claims is held against the
    file's size, so that none takes more time or memory than its own bytes. Raises `ArtifactError` for a damaged one."""
    with path.open("rb") as file:
        header = _Header(file, path)
        if file.read(4) != b"GGUF" or header.number(4) not in (2, 3):
            raise ArtifactError(f"{path} is damaged or no GGUF file of version 2 or 3")
        n_tensors, n_values = header.count(8), header.count(8)
        for _ in range(n_values):
            header.text()
            header.skip_value(header.number(4))
        types = {}
        for _ in range(n_tensors):
            name = header.text()
            header.skip(8 * header.number(4))
            types[name] = header.number(4)
            header.skip(8)
    return types


class _Header:
    """The numbers and texts of a GGUF header, one after another."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.left = file, path, _MOST
        self.size = path.stat().st_size

    def number(self, n_bytes: int) -> int:
        data = self.file.read(n_bytes)
        if len(data) < n_bytes:
            raise ArtifactError(f"{self.path} is cut off or damaged: its header ends at byte {self.size}")
        return int.from_bytes(data, "little")

    def count(self, n_bytes: int) -> int:
        """A number of things that are read one by one, of which there may be so many in all."""
        n = self.number(n_bytes)
        self.left -= n
        if self.left < 0:
            raise ArtifactError(f"{self.path} is damaged: its header claims {n:,} values, more than {_MOST:,}")
        return n

    def skip(self, n_bytes: int) -> None:
        if self.file.tell() + n_bytes > self.size:
            raise ArtifactError(f"{self.path} is cut off or damaged: its header claims {n_bytes:,} more bytes")
        self.file.seek(n_bytes, 1)

    def text(self) -> str:
        n = self.number(8)
        start = self.file.tell()
        self.skip(n)
        self.file.seek(start)
        return self.file.read(n).decode(errors="replace")

    def skip_value(self, kind: int) -> None:
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _TEXT:
            self.skip(self.number(8))
        elif kind == _ARRAY:
            inner = self.number(4)
            if inner in _SCALARS:
                self.skip(_SCALARS[inner] * self.number(8))
            elif inner == _TEXT:
                for _ in range(self.count(8)):
                    self.skip(self.number(8))
            else:
                raise ArtifactError(f"{self.path} is damaged: its header has an array of the unknown type {inner}")
        else:
            raise ArtifactError(f"{self.path} is damaged: its header has a value of the unknown type {kind}")


def _width(name: str, kind: str) -> int:
    """Width of a type: of its codes, of a float, or a number behind its first letters."""
    if kind in TYPES:
        return TYPES[kind][0]
    if kind in ("F64", "F32", "F16", "BF16"):
        return FULL_PRECISION
    try:
        return bits_of(kind)
    except ArtifactError:
        raise ArtifactError(f"the layer {name!r} has the GGUF type {kind}, whose width is not known here") from None


def importance_of(job: ExportJob, name: str) -> NDArray[np.float32] | None:
    """The mean square of every input of a layer ``[columns]``, ggml's importance matrix, where the job knows it."""
    known = job.statistics.get(name)
    if known is None or not known.second_moment.numel():
        return None
    squares: NDArray[np.float32] = known.second_moment[0].diagonal().float().cpu().numpy()
    return squares if bool((squares > 0).any()) else None


def quantize(weight: Tensor, choice: str, importance: NDArray[np.float32] | None = None) -> Any:
    """Blocks ``uint8 [rows, bytes]`` of a weight ``[rows, columns]`` by the reference quantizers of ggml, which weigh
    the error of a column by its ``importance`` where that is given."""
    import gguf
    import libgguf
    import numpy as np

    rows = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    kind = gguf.GGMLQuantizationType[choice]
    blocks = libgguf.quantize_rows(rows, kind, None if importance is None else np.ascontiguousarray(importance))
    return np.asarray(blocks).view(np.uint8).reshape(len(rows), -1)


def dequantize(blocks: Any, choice: str) -> Tensor:
    """Weights ``float32 [rows, columns]`` of blocks."""
    import gguf
    import torch

    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[choice]).copy())


ARCHITECTURES = {
    "FluxTransformer2DModel": "flux", "Flux2Transformer2DModel": "flux", "SD3Transformer2DModel": "sd3",
    "WanTransformer3DModel": "wan", "SkyReelsV2Transformer3DModel": "wan", "ZImageTransformer2DModel": "lumina2",
    "QwenImageTransformer2DModel": "qwen_image", "LTXVideoTransformer3DModel": "ltxv",
}  # fmt: skip
"""Class of diffusers to the word by which ComfyUI-GGUF (commit 795e451) knows the model; it refuses all others."""

KNOWN = ("UNet2DConditionModel", *ARCHITECTURES)
"""Classes of which a published checkpoint is read; other models are written for diffusers' own layers, and that is
said."""

PREFIXED = ("sd1", "sdxl")
"""Architectures whose names have a prefix in every published checkpoint, which diffusers and others look for."""


def architecture(module: Any) -> str:
    """The value of ``general.architecture``: the class in lower case where no reader but diffusers knows the model."""
    kind = type(module).__name__
    if kind == "UNet2DConditionModel":
        return "sdxl" if module.config.addition_embed_type == "text_time" else "sd1"
    return ARCHITECTURES.get(kind, kind.lower())


def state_of(file: Path, module: Any) -> dict[str, Any]:
    """The tensors of a file as diffusers parses it, by the names of the model where it has them."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_gguf_checkpoint(str(file)).items()}
    found = places_of(module)
    rows = {key: len(tensor) if tensor.ndim else 0 for key, tensor in module.state_dict().items()}
    known = {place.name for place in found.values()}
    return separated(tensors, found, rows) | {name: t for name, t in tensors.items() if name not in known}


def load_with_diffusers(folder: str | Path) -> Any:
    """The model with diffusers' GGUF layers, by the steps of ``from_single_file``, which not every class has."""
    import torch
    from diffusers import GGUFQuantizationConfig
    from diffusers.models.model_loading_utils import load_model_dict_into_meta
    from diffusers.quantizers.gguf import GGUFQuantizer

    from mpqsearch.export.check import build_model

    folder = Path(folder)
    model = build_model(folder)
    state = state_of(folder / FILE, model)
    quantizer = GGUFQuantizer(GGUFQuantizationConfig(compute_dtype=torch.float32), pre_quantized=True)
    quantizer.preprocess_model(model=model, device_map=None, state_dict=state)
    load_model_dict_into_meta(
        model, state, dtype=torch.float32, hf_quantizer=quantizer, device_map={"": torch.device("cpu")}
    )
    quantizer.postprocess_model(model)
    return model.eval()
