"""Every command and every Python block in the documentation runs.

`mpqsearch` commands run for real on the embedded models, those of each page in a folder with a quickstart, in the
order in which a reader meets them, at small sizes (the settings below are added to those verbs that take `--set`).
Methods round to nearest there: GPTQ and KFAC take five seconds a map of these models, and tests of their own walk
them. Of the longer studies the checks before the work run, with ``MPQSEARCH_TEST_ALL=1`` (``make test-all``) all of
them. Scripts that take hours are loaded, which fails when they need what the package no longer has.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mpqsearch.config import Config
from tests.e2e import forked
from tests.support.everything import ALL
from tests.support.shared import made_once

ROOT = Path(__file__).parents[2]
ELSEWHERE = {".venv", ".git", ".hypothesis", ".pytest_cache", "build", "runs", "CHANGELOG.md"}
PAGES = sorted(p for p in ROOT.rglob("*.md") if not ELSEWHERE & set(p.relative_to(ROOT).parts))
SMALL = {
    "policy.widths": "[2, 3, 4, 8]",
    "sampler.steps": "2",
    "sampler.batch": "4",
    "calibration.samples": "2",
    "calibration.probe_inputs": "2",
    "calibration.probes": "1",
    "calibration.sampler_seeds": "1",
    "calibration.sampler_probes": "1",
    "calibration.context_seeds": "0",  # slopes are measured in test_selection
    "calibration.final_widths": "[]",
    "quantizer.n_candidates": "6",
    "quantizer.moment_samples": "2",
    "allocate.select": "none",  # what is selected among is measured in test_selection
    "evaluate.samples": "4",
    "search.samples": "2",
    "search.chunk": "2",
    "search.final_samples": "0",
    "distill.steps": "2",
    "distill.batch": "2",
}
WITHOUT_STUDY = ("init", "inspect", "doctor", "reference", "--help", "--version")


def lines_of(page: Path) -> list[str]:
    """Code lines of a page: indented by four or fenced, continuation lines joined, comments cut."""
    text = page.read_text()
    fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(
        r"^(?: {4}.*\n?)+", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    joined = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    return [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]


COMMANDS = list(dict.fromkeys((p, line) for p in PAGES for line in lines_of(p) if line.startswith("mpqsearch ")))
"""Page and command, in the order in which a reader meets them."""
RECIPES = ROOT / "studies/guides/recipes.md"
"""Repeats commands of other pages, which run there."""
QUICKSTART = "mpqsearch run studies/quickstart.toml"
"""What `make quickstart` runs."""
LONGER = ("studies/flow.toml", "studies/pixel.toml")
MODELS = ("fmnist-unet", "fmnist-dit")
SCRIPTS = list(
    dict.fromkeys(line for page in PAGES for line in lines_of(page) if line.startswith(("python ", "make ")))
)


def script_of(line: str) -> str:
    """The file of ``python FILE ...`` or ``python -m studies.MODULE ...``; empty for other lines."""
    words = shlex.split(line)
    if words[0] != "python":
        return ""
    module = words[2] if words[1] == "-m" else ""
    return f"{module.replace('.', '/')}.py" if module.startswith("studies.") else "" if module else words[1]


BLOCKS = [(p, b) for p in PAGES for b in re.findall(r"^```python\n(.*?)^```", p.read_text(), re.DOTALL | re.MULTILINE)]


def small(command: str) -> list[str]:
    """The arguments of a command, at small sizes where it takes settings."""
    arguments = shlex.split(command)[1:]
    if any(a in WITHOUT_STUDY for a in arguments):
        return arguments
    arguments += [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    budgets = '["uniform:3", "uniform:4"]' if "quickstart" in command else '["uniform:3"]'
    arguments += ["--set", f"allocate.budgets={budgets}"] if arguments[0] == "run" else []
    arguments += ["--dry-run"] if not ALL and {*LONGER} & {*arguments} else []
    # A study of the same name, so that its folder is that of the command.
    named = [m for m in MODELS if m in arguments and "--model" in arguments]
    arguments += [part for m in named for part in ("--config", f"small/{m}.toml")]
    arguments += ["--trials", "2"] if arguments[0] == "search" else []  # the last one counts
    arguments += ["--accept"] if arguments[0] == "export" else []  # tiny samples; what it says is tested elsewhere
    return [*arguments, *([] if "--overwrite" in arguments else ["--overwrite"])]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `make quickstart` and the first allocation of another model leave, which pages then refer
    to."""
    assert QUICKSTART in (ROOT / "Makefile").read_text()
    return made_once(tmp_path_factory, "quickstart", _run_quickstart)


def to_nearest(study: str) -> str:
    return re.sub('rounding = "(gptq|kfac)"', 'rounding = "nearest"', study)


def _run_quickstart(folder: Path) -> None:
    (folder / "studies").mkdir()
    for path in (ROOT / "studies").iterdir():
        if path.suffix == ".toml":
            (folder / "studies" / path.name).write_text(to_nearest(path.read_text()))
        else:
            (folder / "studies" / path.name).symlink_to(path)
    (folder / "small").mkdir()
    study = to_nearest(Config().to_toml())
    methods = study[study.index("[[methods]]") : study.index("[search]")]
    for name in MODELS:
        (folder / "small" / f"{name}.toml").write_text(methods)
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/pipeline").symlink_to(ROOT / "mpqsearch/models/reference/fmnist-t2i")
    (folder / "prompts.txt").write_text("a red sneaker\na blue bag\na white coat\na green dress\n")
    (folder / "photos").mkdir()
    for name, grey in {"a.png": 40, "b.png": 200}.items():
        Image.new("RGB", (24, 32), (grey, grey, 80)).save(folder / "photos" / name)
    # A model of half the layers: pages' commands name what a run folder holds, not the model's layers.
    few = ["--set", 'model.source="fmnist-unet"', "--set", "search.trials=2", "--set", "search.final_samples=4"]
    for arguments in ([*small(QUICKSTART), *few], small("mpqsearch allocate --model fmnist-unet --budget 3bit")):
        done = forked.run(arguments, folder, folder / "stdout", folder / "stderr", timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({p for p, _ in COMMANDS}), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_runs(page: Path, quickstart: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quickstart, folder, symlinks=True)
    elsewhere = [shlex.split(c) for p, c in COMMANDS if p != page] if page == RECIPES else []
    for command in (c for p, c in COMMANDS if p == page and c != QUICKSTART and shlex.split(c) not in elsewhere):
        done = forked.run(small(command), folder, tmp_path / "stdout", tmp_path / "stderr", timeout=500)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("line", [line for line in SCRIPTS if line.startswith("make ")])
def test_every_target_of_make_that_a_page_names_exists(line: str) -> None:
    assert re.search(rf"^{re.escape(shlex.split(line)[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@pytest.mark.parametrize("script", sorted({s for line in SCRIPTS if (s := script_of(line))}))
def test_every_script_that_a_page_names_loads_with_todays_package(script: str, tmp_path: Path) -> None:
    assert (ROOT / script).is_file()
    done = forked.run([], ROOT, tmp_path / "stdout", tmp_path / "stderr", script=script)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("page", "block"), BLOCKS, ids=[f"{p.relative_to(ROOT)}-{i}" for i, (p, _) in enumerate(BLOCKS)]
)
def test_python_blocks_compile_and_import_what_exists(page: Path, block: str) -> None:
    tree = compile(block, str(page), "exec", flags=ast.PyCF_ONLY_AST)
    imports = [line for line in block.splitlines() if re.match(r"(from mpqsearch|import mpqsearch)", line)]
    assert tree is not None
    exec("\n".join(imports), {})


def exists(dotted: str) -> bool:
    """Whether a module, or what hangs on one, has this name."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_and_files_that_a_page_mentions_exist(page: Path) -> None:
    text = page.read_text()
    names = set(re.findall(r"\bmpqsearch(?:\.[A-Za-z_]+)+", text))
    assert not [n for n in names if not exists(n)]
    links = {link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if not link.startswith("http")}
    assert not [link for link in links if not (page.parent / link).exists()]
