"""The wheel and the source archive hold what a user needs, and nothing that is too large."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mpqsearch.sources import REFERENCE, components_of

ROOT = Path(__file__).parents[2]
LIMIT = 25_000_000
"""Bytes of the wheel."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, built from the tracked files by the build backend itself."""
    tracked = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
        .stdout.decode()
        .split("\0")
    )
    if not any(tracked):
        pytest.skip("no git checkout")
    source = tmp_path_factory.mktemp("source")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    code = "from setuptools import build_meta as b; b.build_wheel('out'); b.build_sdist('out')"
    (source / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return source / "out"


def test_the_description_for_an_index_has_no_link_into_the_repository(built: Path) -> None:
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    name = next(n for n in wheel.namelist() if n.endswith("METADATA"))
    header, _, text = wheel.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in header
    assert not re.findall(r"\]\((?!https?:)", text)
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^#+ .*", text, re.MULTILINE) == re.findall(r"^#+ .*", readme, re.MULTILINE)
    assert "[" not in text.split("## Two commands")[0], "neither the picture nor its caption"
    script = dict[str, Any](__file__=str(ROOT / "setup.py"))
    definitions = (ROOT / "setup.py").read_text().split("project = ")[0]
    exec(compile(definitions, "setup.py", "exec"), script)
    said = script["described"]("![a](b.png) [c](d.md#e) [f](https://g)", "https://h")
    assert said == "![a](https://h/raw/main/b.png) [c](https://h/blob/main/d.md#e) [f](https://g)"


def test_the_wheel_is_whole_and_small(built: Path) -> None:
    wheel = next(built.glob("*.whl"))
    assert wheel.name.endswith("py3-none-any.whl"), "no compiler is needed"
    assert wheel.stat().st_size < LIMIT
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "mpqsearch/py.typed",
        "mpqsearch/export/schema/bitmap-1.schema.json",
        "mpqsearch/report/templates/report.html.j2",
        "mpqsearch/cli/presets.toml",
        "mpqsearch/models/reference/fmnist-unet/diffusion_pytorch_model.safetensors",
        "mpqsearch/models/reference/fmnist-dit/diffusion_pytorch_model.safetensors",
        "mpqsearch/models/reference/fmnist-t2i/unet/diffusion_pytorch_model.safetensors",
        "mpqsearch/models/reference/fmnist-flow/transformer/diffusion_pytorch_model.safetensors",
        "mpqsearch/models/reference/fmnist-cnn/model.safetensors",
        "mpqsearch/models/reference/fmnist-cnn/reference.safetensors",
        "mpqsearch/models/reference/fmnist-judge/model.safetensors",
        "mpqsearch/models/reference/fmnist-clip/model.safetensors",
        "mpqsearch/models/reference/fmnist-clip/tokenizer.json",
        "mpqsearch/models/reference/fmnist-judge/reference.safetensors",
    ):
        assert needed in names, needed
    assert not [n for n in names if n.startswith(("tests/", "studies/", "notebooks/"))]
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "mpqsearch").rglob("*.py")}
    assert package <= set(names), sorted(package - set(names))


def test_the_extras_are_those_of_the_project_file(built: Path) -> None:
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    for extra in ("fid", "export", "postgres", "search", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    plain = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in plain if "torchvision" in line], "nothing in the default path may need torchvision"
    entries = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "mpqsearch = mpqsearch.cli:main" in entries


def test_the_source_archive_has_the_licence(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {n.split("/", 1)[-1] for n in archive.getnames()}
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml"} <= names


def test_no_embedded_file_names_a_place_of_the_machine_that_wrote_it() -> None:
    """A loaded part of a pipeline remembers its folder, and would write it into what is saved."""
    texts = [
        p for p in (ROOT / "mpqsearch" / "models" / "reference").rglob("*") if p.suffix in (".json", ".txt", ".md")
    ]
    assert len(texts) > 20
    assert not [p for p in texts if "_name_or_path" in (text := p.read_text()) or "/tmp/" in text or str(ROOT) in text]


def test_the_quickstart_installs_what_its_pipeline_needs() -> None:
    source = tomllib.loads((ROOT / "studies/quickstart.toml").read_text())["model"]["source"]
    index = json.loads((REFERENCE / source / "model_index.json").read_text())
    assert "transformers" in {library for library, _ in components_of(index).values()}
    rule = (ROOT / "Makefile").read_text().split("$(RUNTIME):")[1]
    extras = re.search(r"--editable '\.\[([^\]]*)\]'", rule)
    assert extras is not None
    assert "pipelines" in extras[1].split(",")
