"""stable-diffusion.cpp: one ggml type per linear layer, as the rules of ``--tensor-type-rules``.

Not verified by its consumer, a C++ program that was not built here. By its source (leejet/stable-diffusion.cpp, commit
97d2990, ``src/model_loader.cpp`` and ``src/convert.cpp``):

- Rules are ``expression=type`` joined by commas; the first whose expression is found in a tensor's name counts. Types
  are those of GGUF with ggml's own spelling (``q4_0``, ``q4_K``). An unknown type or a rule without ``=`` is ignored
  with a warning.
- The names are those in the file that is converted: ``sd-cli -M convert`` keeps diffusers' names unless
  ``--convert-name`` is given. When a model is loaded without conversion, names are translated first, and these rules
  fit only where both agree.
- Rows that are no multiple of a type's block are left alone, and so are, whatever the rules say, tensors with one of
  `SKIPPED` in their name: they stay at 16 bits.
- Scales are those of ggml's quantizers: `GgufExporter.round_trip` says what a type makes of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits
from mpqsearch.errors import ConfigError
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.gguf import TYPES, GgufExporter
from mpqsearch.export.reading import Reading, Rule
from mpqsearch.export.recipes import WrittenTarget

SKIPPED = (
    "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.", "x_embedder.", "t_embedder.", "y_embedder.", "pos_embed",
    "context_embedder.", "time_embed.", "label_emb.", "embedding",
)  # fmt: skip
"""Parts of names that ``tensor_should_be_converted`` refuses."""


class SdcppExporter(WrittenTarget):
    """``sdcpp_rules.txt``: one line for ``--tensor-type-rules``, which also needs ``--type f16`` for the rest."""

    name = "sdcpp"
    requires = "stable-diffusion.cpp"
    kinds = ("Linear",)
    limits = "rows of a multiple of 32 weights (256 for K types), and a name that it does not skip"
    file = "sdcpp_rules.txt"
    full_bits = 16
    tested = "commit 97d2990"
    get = "build github.com/leejet/stable-diffusion.cpp"
    notes = ("not verified by its consumer", "types, not widths; scales are derived by ggml")

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """The types of GGUF, except for layers that the program never quantizes."""
        return () if any(part in f"{layer.name}.weight" for part in SKIPPED) else GgufExporter().choices(layer)

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """As in a GGUF file."""
        return GgufExporter().coded(layer, choice)

    def written(self, plan: Sequence[PlanEntry]) -> str:
        """One rule a layer. Raises `ConfigError` for a name that the syntax cannot hold."""
        bad = next((e.layer for e in plan if e.choice and set(e.layer) & set(",=")), None)
        if bad is not None:
            raise ConfigError(
                f"the rules of stable-diffusion.cpp cannot name {bad!r}: it contains a comma or an equals sign"
            )
        return ",".join(f"^{re.escape(e.layer)}\\.weight$={spelled(e.choice)}" for e in plan if e.choice) + "\n"

    def read(self, path: Path) -> Reading | None:
        """Rules in their order; those that are one exact name must be layers of the model."""
        file = path / self.file if path.is_dir() else path
        if not file.is_file() or file.suffix != ".txt":
            return None
        rules = [r.partition("=") for r in file.read_text().strip().split(",") if r]
        types = {spelled(t): w for t, (w, _, _) in TYPES.items()} | dict.fromkeys(
            ("f16", "f32", "bf16"), FULL_PRECISION
        )
        if not all(sign for _, sign, _ in rules):
            return None
        unknown = next((f"{p}={t}" for p, _, t in rules if t not in types), None)
        if unknown is not None:
            raise ConfigError(
                f"{file}: the rule {unknown!r} has a type that is not known here. Known: {', '.join(types)}."
            )
        exact = {
            p: re.sub(r"\\(.)", r"\1", p[1:-1]).removesuffix(".weight")
            for p, _, _ in rules
            if re.fullmatch(r"\^(?:[\w-]|\\.)+\$", p)
        }
        said = [(exact.get(p, p), types[t], p in exact) for p, _, t in rules]
        first = {n: w for n, w, is_name in reversed(said) if is_name}
        return Reading(
            layers=first,
            rules=tuple(
                Rule(width=w, pattern=n.replace(r"\.weight", ""), kinds=self.kinds) for n, w, e in said if not e
            ),
        )


def spelled(choice: str) -> str:
    """A type as ggml spells it: ``Q4_K`` is ``q4_K``, all others are in lower case."""
    return f"{choice[:-1].lower()}K" if choice.endswith("_K") else choice.lower()
