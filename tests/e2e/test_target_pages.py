"""The code of every page in `studies/guides/targets` loads an export and is told the widths that were planned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpqsearch.artifacts import read_json
from mpqsearch.core import FULL_PRECISION
from mpqsearch.export import TARGETS, ExportJob, get_exporter
from mpqsearch.export.contract import MANIFEST
from mpqsearch.models.discover import discover
from tests.conformance.test_exporters import own_map, tiny_transformer
from tests.e2e import forked

PAGES = Path(__file__).parents[2] / "studies" / "guides" / "targets"
SCRIPT = """
import json
from pathlib import Path
from mpqsearch.export.check import build_model
folder = Path({folder!r})
module = build_model(folder) if (folder / "config.json").is_file() else None
{code}
print("WIDTHS", json.dumps(globals().get("widths")))
"""


def code_of(target: str) -> str:
    return "\n".join(
        re.findall(r"^```python\n(.*?)^```", (PAGES / f"{target}.md").read_text(), re.DOTALL | re.MULTILINE)
    )


def test_every_target_has_a_page_and_the_index_names_it() -> None:
    assert {p.stem for p in PAGES.glob("*.md")} == {"README", *TARGETS}
    index = (PAGES / "README.md").read_text()
    for name in TARGETS:
        assert f"[{name}]({name}.md)" in index
        can = get_exporter(name)
        page = (PAGES / f"{name}.md").read_text()
        assert all(part in page for part in ("**Holds:**", "**Lost:**", "**Not run:**")), name
        assert bool(code_of(name)) == can.by_consumer, "code that nobody ran is no code of a page"


@pytest.mark.slow
@pytest.mark.parametrize("target", [n for n in TARGETS if get_exporter(n).by_consumer])
def test_the_code_of_a_page_loads_the_export(target: str, tmp_path: Path) -> None:
    exporter = get_exporter(target)
    if exporter.missing():
        pytest.skip(f"the consumer of {target} is not installed: {', '.join(exporter.missing())}")
    denoiser = tiny_transformer()
    table = discover(denoiser)
    bit_map, names = own_map(exporter, table, seed=5)
    exporter.write(tmp_path, ExportJob(table=table, bit_map=bit_map, denoiser=denoiser, choices=names))
    script = tmp_path / "page.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path), code=code_of(target)))
    done = forked.run([], tmp_path, tmp_path / "stdout", tmp_path / "stderr", script=str(script))
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("WIDTHS ")).removeprefix("WIDTHS ")
    )
    if (tmp_path / MANIFEST).is_file() and said is not None:
        plan = {p["layer"]: p["will_get"] for p in read_json(tmp_path / MANIFEST, "mpqsearch/export").data["plan"]}
        assert said == {n: w for n, w in plan.items() if w != FULL_PRECISION}
    else:
        assert target in ("neutral", "onnx", "packed"), "every other page asks the consumer for widths"
