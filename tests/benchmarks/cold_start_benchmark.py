"""``mpqsearch allocate`` on a saved profile in a fresh process: ``python tests/benchmarks/cold_start_benchmark.py``.

Builds run folders with a synthetic profile of 700 layers (or of SD 1.5's channels), then times the command as a user
calls it: interpreter, imports, reading, solving, writing. Each line is the best of three; torch must not be imported.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from mpqsearch.core import LayerSpec, LayerTable
from tests.support.runs import saved_profile
from tests.support.tiny import tiny_profile, tiny_table

STUDY = """
[calibration]
schemes = ["asymmetric", "auto"]
[allocate]
budgets = [{budgets}]
{methods}
"""
METHOD = '[[methods]]\nname = "{0}"\nallocator = "{0}"\nscheme = "auto"\nbias_correction = true\n'
WATCH = (
    "import sys; from mpqsearch.cli import app; app(sys.argv[1:], standalone_mode=False); "
    "assert 'torch' not in sys.modules"
)


def sd15_table() -> LayerTable:
    """The shapes of the 282 layers of SD 1.5, 318,404 channels."""
    from allocate_benchmark import sd15_layers

    shapes = sd15_layers()
    layers = tuple(
        LayerSpec(
            name=f"layer.{i}",
            kind="Linear",
            weight_shape=(out, weights),
            macs=out * weights,
            role="first" if i == 0 else "last" if i == len(shapes) - 1 else "linear",
            has_bias=True,
        )
        for i, (out, weights) in enumerate(shapes)
    )
    return LayerTable(digest="1" * 64, layers=layers, kept=(), model="sd15 shapes")


def measure(
    name: str, table: LayerTable, methods: list[str], budgets: list[str], flags: list[str], folder: Path
) -> str:
    """One line: wall and processor time of the whole command."""
    study = folder / f"{name}.toml"
    text = ", ".join(f'"{b}"' for b in budgets)
    study.write_text(STUDY.format(budgets=text, methods="".join(METHOD.format(m) for m in methods)))
    run = folder / name
    saved_profile(run, study, table, tiny_profile(table))
    walls, processors = [], []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        command = [sys.executable, "-c", WATCH, "allocate", "-c", str(study), "--run-dir", str(run), "--json", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        walls.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode:
            raise SystemExit(done.stderr)
        for made in ("allocations", "paths"):  # only the maps are made anew
            shutil.rmtree(run / made, ignore_errors=True)
    maps = len(methods) * len(budgets)
    return (
        f"{name:34} {table.n_channels:8,} channels {maps:3} maps {' '.join(flags):16} "
        f"wall {min(walls):6.2f} s  processor {min(processors):6.2f} s"
    )


def main() -> None:
    """Print the table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    np.seterr(all="raise", under="ignore")
    layers = tiny_table(n_layers=700, channels=64, fan_in=576)
    cases: list[tuple[str, LayerTable, list[str], list[str], list[str]]] = [
        ("700-layers", layers, ["ilp-layer"], ["3bit"], []),
        ("700-layers-50-budgets", layers, ["ilp-layer"], [f"{b:.2f}bit" for b in np.linspace(2.2, 7, 50)], []),
        ("700-layers-by-channel", layers, ["ilp-layer", "ilp-channel"], ["3bit"], []),
        ("700-layers-path", layers, ["ilp-layer"], ["3bit"], ["--path", "--explain"]),
        ("sd15-by-channel", sd15_table(), ["ilp-channel"], ["3bit"], []),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, table, methods, budgets, flags in cases:
            sys.stdout.write(measure(name, table, methods, budgets, flags, Path(folder)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
