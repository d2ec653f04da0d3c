"""``mpqsearch import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli import completion, options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_fields, print_json


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="A map, configuration, checkpoint or folder of another quantizer, or a bitmap.json.")
    ],
    config: options.Config = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="quanto, autoround, gguf, mlx, sdnq ... (default: detected).",
            autocompletion=completion.among(completion.sources),
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Name of the map in the run folder (default: that of the file).")
    ] = "",
    scheme: Annotated[
        str, typer.Option("--scheme", help="What the widths mean here: asymmetric, symmetric, auto or ternary.")
    ] = "asymmetric",
    model: options.Model = None,
    prompts: options.Prompts = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    batch: options.Batch = None,
    call: options.Call = None,
    device: options.Device = None,
    set_: options.Set = None,
    run_dir: options.RunDir = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Read the widths that another quantizer's file gives to a model, as a map that you can measure, export, or start a
    search from.

    Example: `mpqsearch import theirs.gguf --model ./my-pipeline --name theirs`

    Then: `mpqsearch evaluate --model ./my-pipeline --map runs/my-pipeline/imports/theirs/bitmap.json`
    """
    from mpqsearch import stages
    from mpqsearch.core import average_bits, size_bytes
    from mpqsearch.core.formats import FULL_PRECISION

    settings = {"model.source": model, "model.device": device} | options.drawing(prompts, steps, guidance, batch, call)
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    table = stages.layers(run)
    written, imported = stages.import_map(
        run,
        file,
        source=source,
        name=name or (file.parent.name if file.name == "bitmap.json" else file.stem),
        scheme=scheme,
    )
    bit_map = imported.bit_map
    summary = {
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
        print_json(summary)
        return
    shown = summary | {"average_bits": f"{summary['average_bits']:.4f}", "notes": "; ".join(imported.notes)}
    print_fields(f"{file} as {imported.source} has it", shown)
