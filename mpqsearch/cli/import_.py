"""``mpqsearch import``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpqsearch.cli.app import study_verb
from mpqsearch.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from mpqsearch.stages import Run


@study_verb("import")
def import_(
    run: Run,
    *,
    as_json: bool,
    file: Annotated[
        Path, typer.Argument(help="A map, configuration, checkpoint or folder of another quantizer, or a bitmap.json.")
    ],
    source: Annotated[
        str | None,
        typer.Option("--from", help="quanto, autoround, gguf, mlx, mixdq ... (default: found out from the file)."),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Name of the map in the run folder (default: that of the file).")
    ] = "",
    scheme: Annotated[
        str, typer.Option("--scheme", help="What the widths mean here: asymmetric, symmetric or auto.")
    ] = "asymmetric",
) -> None:
    """Read the widths that another quantizer's file gives to a model, as a map that can be measured, exported and
    searched from.

    Example: `mpqsearch import runs/quickstart/allocations/uniform@uniform-3/bitmap.json --model fmnist-unet --name
    theirs`
    """
    from mpqsearch import stages
    from mpqsearch.core import average_bits, size_bytes
    from mpqsearch.core.formats import FULL_PRECISION

    table = stages.layers(run)
    written, imported = stages.import_map(
        run,
        table,
        file,
        source=source,
        name=name or (file.parent.name if file.name == "bitmap.json" else file.stem),
        scheme=scheme,
    )
    bit_map = imported.bit_map
    found = {
        "source": imported.source,
        "file": str(written),
        "digest": bit_map.digest,
        "quantized_layers": sum(int(w.min()) != FULL_PRECISION for w in bit_map.weights.values()),
        "layers": len(table),
        "average_bits": average_bits(table, bit_map),
        "size_bytes": size_bytes(table, bit_map),
        "notes": list(imported.notes),
    }
    if as_json:
        print_json(found)
        return
    print_table(
        f"{file} as {imported.source} has it",
        ["what", "value"],
        [
            [k, "; ".join(v) if isinstance(v, list) else f"{v:.4f}" if isinstance(v, float) else v]
            for k, v in found.items()
        ],
    )
