from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e import forked

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_study_that_is_killed_at_random_points_ends_with_the_results_of_one_that_ran_through(tmp_path: Path) -> None:
    """In a process of its own, whose only thread is copied; it prints every finding."""
    (tmp_path / "script.py").write_text("from tests.e2e.kill import main\n\nmain(['4'])\n")  # one cycle of signals
    done = forked.run([], ROOT, tmp_path / "out", tmp_path / "err", timeout=500, script=str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " kills, 0 findings" in done.stdout
