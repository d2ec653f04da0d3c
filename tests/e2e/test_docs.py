"""Every command and every Python block in the documentation runs.

`mpqsearch` commands run for real on the embedded models, in one folder and at small sizes (the settings below are added
to those verbs that take `--set`), in the order in which a reader meets them. Of scripts that take hours the arguments
are checked by their own `--help`; their short form is run by tests of their own.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from tests.e2e import forked

ROOT = Path(__file__).parents[2]
ELSEWHERE = {".venv", ".git", ".hypothesis", ".pytest_cache", "build", "runs", "CHANGELOG.md"}
PAGES = sorted(p for p in ROOT.rglob("*.md") if not ELSEWHERE & set(p.relative_to(ROOT).parts))
SMALL = {
    "sampler.steps": "2",
    "sampler.batch": "4",
    "calibration.samples": "2",
    "calibration.probe_inputs": "2",
    "calibration.probes": "1",
    "calibration.final_widths": "[]",
    "quantizer.n_candidates": "6",
    "evaluate.samples": "4",
    "report.grid_columns": "2",
    "distill.steps": "2",
    "distill.batch": "2",
}
WITHOUT_STUDY = ("inspect", "doctor", "--help", "--version")


def lines_of(page: Path) -> list[str]:
    """Code lines of a page: indented by four or fenced, continuation lines joined, comments cut."""
    text = page.read_text()
    fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(
        r"^(?: {4}.*\n?)+", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    joined = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    return [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in lines_of(page) if line.startswith("mpqsearch ")))
QUICKSTART = "mpqsearch run studies/quickstart.toml"
"""What `make quickstart` runs."""
SCRIPTS = list(
    dict.fromkeys(line for page in PAGES for line in lines_of(page) if line.startswith(("python ", "make ")))
)
BLOCKS = [(p, b) for p in PAGES for b in re.findall(r"^```python\n(.*?)^```", p.read_text(), re.DOTALL | re.MULTILINE)]


def ordered(commands: list[str]) -> list[str]:
    """What makes a run folder first, what only looks at one last."""
    return sorted(commands, key=lambda c: (" inspect " in c, not c.startswith("mpqsearch run")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_pages_runs(tmp_path: Path) -> None:
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    failed = []
    assert QUICKSTART in (ROOT / "Makefile").read_text()
    for command in ordered([QUICKSTART, *(c for c in COMMANDS if c != QUICKSTART)]):
        arguments = shlex.split(command)[1:]
        if not any(a in WITHOUT_STUDY for a in arguments):
            arguments += [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
            arguments += ["--set", 'allocate.budgets=["uniform:3", "uniform:4"]'] if arguments[0] == "run" else []
            arguments += [] if "--overwrite" in arguments else ["--overwrite"]
        done = forked.run(arguments, tmp_path, tmp_path / "stdout", tmp_path / "stderr", timeout=900)
        if done.returncode:
            failed.append(f"{command}\n  exit {done.returncode}: {done.stderr[-400:]}")
    assert len(COMMANDS) > 5, "the pages are read"
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_script_and_target_that_a_page_names_exists(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        return
    if words[1] == "-m":
        return
    script = ROOT / words[1]
    assert script.is_file(), line
    compile(script.read_text(), str(script), "exec")


@pytest.mark.parametrize(
    ("page", "block"), BLOCKS, ids=[f"{p.relative_to(ROOT)}-{i}" for i, (p, _) in enumerate(BLOCKS)]
)
def test_python_blocks_compile_and_import_what_exists(page: Path, block: str) -> None:
    tree = compile(block, str(page), "exec", flags=ast.PyCF_ONLY_AST)
    imports = [line for line in block.splitlines() if re.match(r"(from mpqsearch|import mpqsearch)", line)]
    assert tree is not None
    exec("\n".join(imports), {})
