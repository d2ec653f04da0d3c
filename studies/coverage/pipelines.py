"""Takes every pipeline of the installed diffusers that generates from text, a class or noise alone all the way, and
writes how far each came.

Run from the repository root, whose tests it uses: ``python -m studies.coverage.pipelines [NAME ...]``. A row is written
when its pipeline is done, and what `pipelines.csv` has is kept, so that an interrupted run goes on; delete the file to
measure all of it again, or name the pipelines to measure again.
"""

from __future__ import annotations

import csv
import logging
import sys
import tempfile
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path

from tests.support.pipelines import TINY
from tests.support.pipelines.classes import generators, kind_of
from tests.support.pipelines.cover import STAGES, Covered, cover

HERE = Path(__file__).parent
TABLE = HERE / "pipelines.csv"
COLUMNS = ("pipeline", "kind", "goes_all_the_way", "stage", "reason")
START, END = "<!-- pipelines: made by pipelines.py -->", "<!-- end of pipelines -->"


def go(name: str) -> Covered:
    """The first stop of a class among its variants, or that there is none."""
    variants = [n for n in TINY if n.partition(":")[0] == name] or [name]
    for variant in variants:
        with tempfile.TemporaryDirectory() as folder:
            covered = cover(variant, Path(folder))
        print(variant, f"{covered.stage}: {covered.reason}" if covered.stage else "all the way", file=sys.stderr)
        if covered.stage:
            break
    return covered


def read() -> dict[str, dict[str, str]]:
    """The rows of the table, by pipeline."""
    if not TABLE.is_file():
        return {}
    with TABLE.open(newline="") as handle:
        return {row["pipeline"]: row for row in csv.DictReader(handle)}


def write(rows: dict[str, dict[str, str]]) -> None:
    """The table by name, as a file."""
    with TABLE.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


def measure(asked: list[str]) -> dict[str, dict[str, str]]:
    """The table with the rows ``asked`` for, or else those that it lacks; pipelines that are no more leave it."""
    kinds = {name: kind_of(cls) for name, cls in generators().items()}
    rows = {name: row for name, row in read().items() if name in kinds}
    for name in asked or sorted(kinds.keys() - rows):
        covered = go(name)
        values = (name, kinds[name], "no" if covered.stage else "yes", covered.stage, covered.reason)
        rows[name] = dict(zip(COLUMNS, values, strict=True))
        write(rows)
    return rows


def table(rows: dict[str, dict[str, str]]) -> str:
    """The summary for the page."""
    missing = len(generators()) - len(rows)
    far = [r for r in rows.values() if r["goes_all_the_way"] == "yes"]
    kinds = Counter(r["kind"] for r in rows.values())
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    version = metadata.version("diffusers")
    lines = [
        f"diffusers {version}: **{len(far)} of {len(rows)} pipelines go all the way** ({counted})."
        + (f" {missing} more are not measured yet." if missing else ""),
        "",
        "| stage | what holds |",
        "|---|---|",
        *(f"| {s.__name__} | {str(s.__doc__).splitlines()[0]} |" for s in STAGES),
        "",
        "| pipeline that does not | stage | why |",
        "|---|---|---|",
        *(f"| `{r['pipeline']}` | {r['stage']} | {r['reason']} |" for _, r in sorted(rows.items()) if r not in far),
    ]
    return "\n".join(lines)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = measure(sys.argv[1:])
    page = (HERE / "README.md").read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    (HERE / "README.md").write_text(f"{before}{START}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
