"""Every notebook runs from top to bottom on the embedded models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e import forked

SIZE = 400_000
"""Bytes of the outputs of a notebook."""

SMALLER = {
    "steps=6": "steps=2",
    "steps=24": "steps=4",
    "range(16)": "range(4)",
    "range(6)": "range(2)",
    "widths=(1, 2, 3, 4, 6, 8)": "widths=(2, 4)",
    "widths=(1, 2, 3, 4)": "widths=(2, 4)",
    '("uniform:2", "uniform:3", "uniform:4")': '("uniform:2", "uniform:4")',
}
"""Steps, samples, widths and budgets of a run of the tests; what a notebook shows was made with its own."""

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_five_at_most() -> None:
    assert 1 <= len(NOTEBOOKS) <= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert code, "a notebook without code shows nothing"
    kept = json.dumps([c.get("outputs") for c in cells])
    assert len(kept) < SIZE, "outputs stay small"
    assert '"image/png"' in kept or '"text/html"' in kept, "a reader sees pictures or tables"
    assert '"output_type": "error"' not in kept
    assert "/tmp" not in kept
    for own, fewer in SMALLER.items():
        code = code.replace(own, fewer)
    script = tmp_path / "notebook.py"
    script.write_text(code)
    done = forked.run([], tmp_path, tmp_path / "out", tmp_path / "err", script=str(script), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
