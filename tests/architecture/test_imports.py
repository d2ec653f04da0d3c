"""Start-up stays light: what must not be imported is not."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mpqsearch", ("torch", "pulp", "optuna", "pandas", "matplotlib", "diffusers")),
        (
            "import mpqsearch.core, mpqsearch.allocate, mpqsearch.pareto, mpqsearch.artifacts, mpqsearch.prompts",
            ("torch", "pulp", "optuna", "matplotlib"),
        ),
        (
            "import mpqsearch.config, mpqsearch.methods, mpqsearch.stages, mpqsearch.cli",
            ("torch", "pulp", "optuna", "matplotlib"),
        ),
        ("import mpqsearch.export", ("torch", "optimum", "optuna")),
        ("import mpqsearch.report", ("torch", "optuna", "matplotlib.pyplot")),
        ("import mpqsearch.models, mpqsearch.quant, mpqsearch.profile", ("torchvision", "optuna", "matplotlib")),
    ],
)
def test_imports_stay_light(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}; import sys; print([m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"
