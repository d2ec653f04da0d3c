"""MixDQ: 2, 4 or 8 bits for linear layers and convolutions, from a flat YAML of names and widths.

Not verified by its consumer, which is a repository for one GPU and no package. By its source (thu-nics/MixDQ, commit
4f6b32a):

- A line ``model.<layer>: bits`` a layer. ``kernels/mixdq.py`` cuts the name up to ``model.`` and refuses layers that
  the U-Net does not have; ``quant_utils/qdiff`` looks the whole name up and accepts 2 to 16 bits in simulation.
- Layers that are not named stay in half precision in the kernels. In the simulation they keep the width of its own
  configuration; they are listed in the file as comments.
- The kernels run 2 bits as 4. Activations have a file of their own, which is not written.
- Scales and zero points are those of its own calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mpqsearch.core import LayerSpec, StoredBits, coded_bits
from mpqsearch.errors import ArtifactError
from mpqsearch.export.contract import Choice, PlanEntry
from mpqsearch.export.reading import Reading
from mpqsearch.export.recipes import WrittenTarget
from mpqsearch.export.target import int_choices

_PREFIX = "model."


class MixdqExporter(WrittenTarget):
    """``mixdq_weight.yaml``: for ``--w_config`` of ``kernels/mixdq.py``, or the folder of ``quant_inference_mp.py``."""

    name = "mixdq"
    requires = "MixDQ"
    kinds = ("Linear", "Conv2d")
    file = "mixdq_weight.yaml"
    full_bits = 16
    kept_bits = 16
    tested = "commit 4f6b32a"
    get = "clone github.com/thu-nics/MixDQ (needs a CUDA device)"
    notes = (
        "not verified by its consumer",
        "a configuration: MixDQ derives scales from the weights",
        "its kernels run 2 bits as 4",
    )

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """The widths of its released configurations."""
        return int_choices((2, 4, 8)) if layer.kind in self.kinds else ()

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Codes as the kernels hold them (2 bits as 4), a float32 scale and zero point a row."""
        return coded_bits(layer, max(choice.width, 4), scales=layer.n_channels, scale_bits=32, zero_bits=32)

    def written(self, plan: Sequence[PlanEntry]) -> str:
        """One line a layer in the order of the model, then the layers at full precision as comments."""
        lines = [f"{_PREFIX}{e.layer}: {e.will_get}" for e in plan if e.choice]
        lines += [f"# full precision: {_PREFIX}{e.layer}" for e in plan if not e.choice]
        return "".join(f"{line}\n" for line in lines)

    def read(self, path: Path) -> Reading | None:
        """Every layer that a flat YAML names; none of them where it is nested or holds anything but widths."""
        files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
        if len(files) != 1 or files[0].suffix not in (".yaml", ".yml"):
            return None
        try:
            data: Any = yaml.safe_load(files[0].read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{files[0]} is no valid YAML: {error}") from error
        if not isinstance(data, Mapping) or not all(type(v) is int for v in data.values()):
            return None
        return Reading(
            layers={str(n)[max(0, str(n).find(_PREFIX)) :].removeprefix(_PREFIX): v for n, v in data.items()}
        )
