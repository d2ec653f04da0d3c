"""The wheel in an environment of its own, used from another folder: the package's data has to come along."""

from __future__ import annotations

import json
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STUDY = """
[model]
source = "fmnist-unet"
[policy]
widths = [2, 4, 8]
[quantizer]
criterion = "minmax"
[sampler]
steps = 2
batch = 4
[calibration]
granularity = "layer"
samples = 2
schemes = ["asymmetric"]
[[methods]]
name = "uniform"
allocator = "uniform"
[[methods]]
name = "ilp"
allocator = "ilp-layer"
[evaluate]
samples = 4
[export]
targets = ["neutral"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel, and everything else from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.decode()
    if not tracked:
        pytest.skip("no git checkout")
    for name in filter(None, tracked.split("\0")):
        needed = name.startswith(("mpqsearch/", "pyproject", "setup.py", "README", "LICENSE", "NOTICE"))
        if needed and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = "from setuptools import build_meta as b; print(b.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = next((folder / "source").glob("*.whl"))
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    own = Path(
        subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    shutil.unpack_archive(wheel, own, "zip")
    (own / "zz.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={"PATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


def test_the_wheel_is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-c", "import mpqsearch; print(mpqsearch.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(installed.parents[1]), done.stderr


@pytest.mark.slow
def test_a_study_of_an_embedded_model_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    done = run(installed, tmp_path, "-m", "mpqsearch", "run", "study.toml")
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "runs/study"
    assert (folder / "report.html").stat().st_size > 10_000
    assert list((folder / "export").glob("neutral@*/bitmap.json"))
    shown = run(installed, tmp_path, "-m", "mpqsearch", "inspect", "runs/study/profile.json", "--json")
    assert json.loads(shown.stdout)["widths"] == [2, 4, 8]
