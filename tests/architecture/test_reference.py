"""Both references can be made from the docstrings, as `make reference` does: that of keys and options is up to date."""

from __future__ import annotations

import html
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpqsearch import api
from mpqsearch.cli.reference import all_verbs, page
from mpqsearch.config import load_config
from mpqsearch.settings import settings, tables
from tests.support.everything import ALL

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_reference_has_a_page_for_every_public_package(tmp_path: Path) -> None:
    said = subprocess.run(
        ["make", "-n", "reference", "INSTALLED="], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    command = next(line for line in said.splitlines() if "pdoc" in line).split()
    modules = command[command.index("pdoc") + 1 : command.index("--output-directory")]
    packages = {p.parent.name for p in (ROOT / "mpqsearch").glob("*/__init__.py")}
    assert {f"mpqsearch.{name}" for name in (*packages, "methods", "config", "errors", "artifacts")} <= set(modules)
    modules = modules if ALL else ["mpqsearch.api"]  # of all of them it takes half a minute
    done = subprocess.run(
        [sys.executable, "-m", "pdoc", *modules, "--output-directory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    front = (tmp_path / "mpqsearch/api.html").read_text()
    for name in api.__all__:
        function = getattr(api, name)
        entry = front[front.index(f'<section id="{name}">') :].split("</section>", 1)[0]
        text = html.unescape(re.sub(r"<[^>]+>", "", entry))
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"\b{parameter}: ", text), (name, parameter)
        first = (inspect.getdoc(function) or "").splitlines()[0].replace("`", "")
        assert first.split(";")[0][:40] in " ".join(text.split()), name


def test_the_page_of_keys_and_options_is_that_of_the_code() -> None:
    written = (ROOT / "studies/guides/reference.md").read_text()
    assert written == page(), "a docstring or an option has changed: run make reference"


def test_every_key_and_every_option_is_documented() -> None:
    keys = [s.key for table in tables() for s in table.settings if not (s.meaning and s.example)]
    assert not keys, "a key needs an entry in the docstring of its dataclass, with an example if its default is empty"
    assert len(settings()) > 100
    options = [f"{name} {p.name}" for name, verb in all_verbs().items() for p in verb.params if not p.help]
    assert not options
    assert all(verb.help for verb in all_verbs().values())


@pytest.mark.parametrize("key", settings())
def test_the_example_of_a_key_can_be_set(key: str) -> None:
    example = f"{key}={settings()[key].example}"
    before = ["prompts.file=prompts.txt"] if key.startswith("prompts.") and key != "prompts.classes" else []
    load_config(None, [*before, example])
