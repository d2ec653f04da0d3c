"""stable-diffusion.cpp: one ggml type per linear layer, as the rules of ``--tensor-type-rules``.

Not verified by its consumer when it is exported: that is a C++ program. A test runs its conversion through the wheel
cyllama 0.2.18, which gives every layer the type of its rule. By its source (leejet/stable-diffusion.cpp, commit
97d2990, ``src/model_loader.cpp`` and ``src/convert.cpp``):

- Rules are ``expression=type`` joined by commas; the first whose expression is found in a tensor's name counts. Types
  are those of GGUF with ggml's own spelling (``q4_0``, ``q4_K``). An unknown type or a rule without ``=`` is ignored
  with a warning.
- The names are those in the file that is converted: ``sd-cli -M convert`` keeps diffusers' names unless
  ``--convert-name`` is given, and puts ``unet.`` before those of a folder: rules fit with and without. When a model is
  loaded without conversion, names are translated first, and these rules fit only where both agree.
- Rows that are no multiple of a type's block are left alone, and so are, whatever the rules say, tensors with one of
  `SKIPPED` in their name: they stay as they are, at 16 bits in published models.
- Scales are those of ggml's quantizers with an even importance of all columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpqsearch.artifacts import write_text
from mpqsearch.core import FULL_PRECISION, LayerSpec, LayerTable, StoredBits
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.export.contract import Choice, ExportJob, PlanEntry
from mpqsearch.export.gguf import TYPES, GgufTarget
from mpqsearch.export.mapfile import FILE as MAP
from mpqsearch.export.mapfile import load_neutral
from mpqsearch.export.reading import Reading, pattern_of
from mpqsearch.export.target import Target
from mpqsearch.untrusted import read_bytes

FILE = "sdcpp_rules.txt"
SKIPPED = (
    "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.", "x_embedder.", "t_embedder.",
    "y_embedder.", "pos_embed",
    "context_embedder.", "time_embed.", "label_emb.", "embedding",
)  # fmt: skip
"""Parts of names that ``tensor_should_be_converted`` refuses."""


HEAD = r"^(?:unet\.|transformer\.|model\.diffusion_model\.)?"
"""Begins a rule: a denoiser by itself, in a folder of diffusers, or in a checkpoint of a whole pipeline."""


class SdcppTarget(Target):
    """``sdcpp_rules.txt``: one line for ``--tensor-type-rules``, which also needs ``--type f16`` for the rest."""

    name = "sdcpp"
    requires = "stable-diffusion.cpp"
    by_consumer = False
    needs_config = False
    limits = "rows of a multiple of 32 weights (256 for K types), and a name that it does not skip"
    payload = False
    full_bits = 16
    tested = "commit 97d2990"
    get = "build github.com/leejet/stable-diffusion.cpp"

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """The types of GGUF, except for layers that the program never quantizes."""
        return () if any(part in f"{layer.name}.weight" for part in SKIPPED) else GgufTarget().choices(layer)

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """As in a GGUF file."""
        return GgufTarget().coded(layer, choice)

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """One rule a layer. Raises `ConfigError` for a name that the syntax cannot hold."""
        bad = next((e.layer for e in plan if e.choice and set(e.layer) & set(",=")), None)
        if bad is not None:
            raise ConfigError(
                f"the rules of stable-diffusion.cpp cannot name {bad!r}: it contains a comma or an equals sign"
            )
        rules = (f"{HEAD}{re.escape(e.layer)}\\.weight$={spelled(e.choice)}" for e in plan if e.choice)
        write_text(folder / FILE, ",".join(rules) + "\n")
        return [folder / FILE]

    def read_back(self, folder: Path) -> dict[str, Any]:
        """What our own reader finds in the file."""
        table = LayerTable(digest="", layers=load_neutral(folder / MAP).layers)
        reading = read(folder / FILE, table)
        return {"widths": reading.widths if reading else None}


def read(path: Path, table: LayerTable) -> Reading | None:
    """Rules in their order, each found anywhere in the name of a layer's weight; those that are one exact name must
    be layers of the model. What the program refuses to quantize stays at full precision."""
    file = path / FILE if path.is_dir() else path
    if not file.exists() or file.suffix != ".txt":
        return None
    text = read_bytes(file).decode(errors="replace").replace(HEAD, "^")  # names here have no prefix
    rules = [r.partition("=") for r in text.strip().split(",") if r]
    if not all(sign for _, sign, _ in rules):
        return None
    types = {spelled(t): t for t in TYPES} | dict.fromkeys(("f16", "f32", "bf16"), "")
    unknown = next((f"{p}={t}" for p, _, t in rules if t not in types), None)
    if unknown is not None:
        raise ArtifactError(
            f"{file}: the rule {unknown!r} has a type that is not known here. Known: {', '.join(types)}."
        )
    patterns = [(pattern_of(text, str(file)), types[t]) for text, _, t in rules]
    widths, refused = {}, []
    for layer in table:
        kind = next((t for p, t in patterns if p.search(f"{layer.name}.weight")), "")
        fits = kind in {c.name for c in SdcppTarget().choices(layer)}
        widths[layer.name] = TYPES[kind][0] if fits else FULL_PRECISION
        refused += [layer.name] if kind and not fits else []
    said = f"{len(refused)} layers that the program leaves alone whatever a rule says, such as {refused[:1]}"
    return Reading(widths=widths, names=_exact_names(rules), notes=(said,) if refused else ())


def _exact_names(rules: Sequence[tuple[str, str, str]]) -> tuple[str, ...]:
    """Layers that a rule spells out from end to end."""
    whole = (p for p, _, t in rules if re.fullmatch(r"\^(?:[\w-]|\\.)+\\\.weight\$", p) and t not in ("f16", "f32"))
    return tuple(re.sub(r"\\(.)", r"\1", p[1:-1]).removesuffix(".weight") for p in whole)


def spelled(choice: str) -> str:
    """A type as ggml spells it: ``Q4_K`` is ``q4_K``, all others are in lower case."""
    return f"{choice[:-1].lower()}K" if choice.endswith("_K") else choice.lower()
