"""Start-up stays light: what must not be imported is not. And no modules import each other."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter

import grimp
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


def test_no_modules_import_each_other() -> None:
    """Imports inside functions count, those for types alone do not."""
    graph = grimp.build_graph("mpqsearch", exclude_type_checking_imports=True, cache_dir=None)
    graph.remove_import(importer="mpqsearch._verbs", imported="mpqsearch.api")  # when a package is called
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imported).prepare()  # names the modules of a circle
