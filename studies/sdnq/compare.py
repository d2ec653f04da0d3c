"""What SDNQ's own options are worth at equal bytes: every layer at one width, quantized by SDNQ through diffusers.

For each width and option the bytes of all tensors as SDNQ saves them, and the mean squared error of final samples
against full precision from the same noise. `ratio`: the error by that of scales a row at the same bytes, on the line
through the logarithms of its widths (beyond its widest: by that, which is smaller); below 1 the option pays for its
bytes. Rows are added to the CSV.

    python studies/sdnq/compare.py --csv studies/sdnq/results.csv
    python studies/sdnq/compare.py --model fmnist-unet --samples 16 --line 2 3 4 --options hadamard \\
        --csv studies/sdnq/results.csv
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SDNQConfig

from mpqsearch.artifacts import write_text
from mpqsearch.export.check import plain_weights, put_weights
from mpqsearch.export.sdnq import WITHOUT_COMPILER, _decoded, sdnq_config
from mpqsearch.sampling import latents, load_model
from mpqsearch.specs.sampler import SamplerSpec

ROWS = "scales a row"
OPTIONS: dict[str, dict[str, Any]] = {
    ROWS: {},
    "svd, rank 4": {"use_svd": True, "svd_rank": 4},
    "svd, rank 16": {"use_svd": True, "svd_rank": 16},
    "groups of 64": {"group_size": 64},
    "groups of 32": {"group_size": 32},
    "hadamard": {"use_hadamard": True},
    "codebook": {"use_codebook": True},
}
WIDTHS = (2, 3, 4)
"""Widths at which options are tried."""

COLUMNS = ("model", "option", "width", "bytes", "error", "standard_error", "ratio", "n_samples")


def quantized(module: Any, width: int, options: dict[str, Any]) -> Any:
    """The model with every layer at one width, as diffusers loads it with SDNQ."""
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        config = SDNQConfig(**(sdnq_config([]) | {"weights_dtype": f"uint{width}"} | options))
        return type(module).from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32).eval()


def size_of(module: Any) -> int:
    """Bytes of all tensors, as they are saved."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def main() -> None:
    """Write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fmnist-dit")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--options", nargs="+", choices=[*OPTIONS][1:], default=[*OPTIONS][1:])
    parser.add_argument("--line", nargs="+", type=int, default=[2, 3, 4, 5, 6, 7])
    parser.add_argument("--csv", type=Path, required=True)
    given = parser.parse_args()
    os.environ.setdefault(*WITHOUT_COMPILER)
    model = load_model(given.model, sampler=SamplerSpec(steps=10))
    seeds = range(given.samples)
    reference = latents(model, seeds)
    rows: list[dict[str, Any]] = []
    for option in (ROWS, *given.options):
        for width in given.line if option == ROWS else WIDTHS:
            loaded = quantized(model.module, width, OPTIONS[option])
            ours = put_weights(copy.deepcopy(model.module), plain_weights(loaded, _decoded(loaded)))
            errors = (latents(model.with_module(ours), seeds) - reference).square().flatten(1).mean(1).numpy()
            error, spread = float(errors.mean()), float(errors.std(ddof=1)) / math.sqrt(len(errors))
            size = size_of(loaded)
            line = sorted((r["bytes"], r["error"]) for r in rows if r["option"] == ROWS)
            sizes, logs = [b for b, _ in line], [math.log(e) for _, e in line]
            ratio = "" if option == ROWS else error / math.exp(float(np.interp(size, sizes, logs)))
            row = {"model": given.model, "option": option, "width": width, "bytes": size, "error": error}
            rows.append(row | {"standard_error": spread, "ratio": ratio, "n_samples": given.samples})
            print(rows[-1], flush=True)
    before = given.csv.read_text() if given.csv.is_file() else ""
    write_text(given.csv, before + text_of(rows, header=not before))


def text_of(rows: list[dict[str, Any]], *, header: bool) -> str:
    """The rows as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    shown = ({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    writer.writerows(shown)
    return out.getvalue()


if __name__ == "__main__":
    main()
