"""Load exports with the libraries that they are for: ``python -m mpqsearch.export TARGET FOLDER ...``.

It prints what each folder holds, one JSON a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mpqsearch.artifacts import environment
from mpqsearch.export.target import Target, get_exporter


def report(target: str, folder: Path) -> dict[str, Any]:
    """What the target's ``read_back`` says of a folder, and the versions of what read it; whatever a library raises is
    a problem of the report."""
    consumer = get_exporter(target)
    try:
        found = consumer.read_back(folder) | {"versions": _versions(consumer)}
        json.dumps(found, allow_nan=False)  # a prediction that is not finite
    except Exception as error:  # noqa: BLE001 - consumers raise many kinds; each means that it could not load the folder
        return {"widths": None, "problems": [f"{target} could not load {folder}: {type(error).__name__}: {error}"]}
    return found


def _versions(target: Target) -> dict[str, str]:
    names = dict.fromkeys((target.requires, *(m.replace(".", "-") for m in target.imports)))
    versions: dict[str, str] = environment((*filter(None, names), "torch", "diffusers", "safetensors"))["libraries"]
    return versions


def main(arguments: list[str]) -> int:
    """Print the report of each pair of target and folder, one JSON a line."""
    for target, folder in zip(arguments[::2], arguments[1::2], strict=True):
        print(json.dumps(report(target, Path(folder))), flush=True)  # noqa: T201 - this is the answer to the calling process
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
