"""``mpqsearch record``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_fields, print_json
from mpqsearch.errors import ConfigError


@app.command()
def record(
    pipeline: Annotated[
        str, typer.Argument(help="Diffusers folder, owner/name of a hub, embedded name, or package.module:function.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file that is written.")] = Path(
        "calls.safetensors"
    ),
    calls: Annotated[int, typer.Option("--calls", min=1, help="Calls to keep, evenly over the timesteps.")] = 64,
    config: options.Config = None,
    prompts: options.Prompts = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    call: options.Call = None,
    device: options.Device = None,
    set_: options.Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Run a pipeline and record the calls of its denoiser, for a study on a machine that cannot run it.

    At least four prompts are drawn, those of the calibration split; each sample is made by itself. The study then
    measures these calls: layers, profile, allocate, quantize, import and export work; verbs that draw samples do not.

    Example: `mpqsearch record ./my-pipeline --prompts prompts.txt --calls 64 -o calls.safetensors`

    Then: `mpqsearch profile --model ./my-pipeline --set calibration.captured=calls.safetensors`
    """
    from mpqsearch.models import save_calls
    from mpqsearch.progress import bar_of
    from mpqsearch.sampling import record as record_calls

    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists already: name another file with --output, or give --overwrite")
    drawing = options.drawing(prompts, steps, guidance, None, call)
    settings = {"model.source": pipeline, "model.device": device, "calibration.captured": ""} | drawing
    # A dry run has no folder: encoded prompts stay in memory.
    run = open_run(config, set_, settings, run_dir=None, dry_run=True, overwrite=False, verbose=verbose)
    denoiser = run.denoiser
    with bar_of("record", 0, unit="sample") as bar:
        kept = record_calls(denoiser, limit=calls, progress=bar.update)
    save_calls(output, kept)
    found = {
        "file": str(output),
        "bytes": output.stat().st_size,
        "calls": len(kept),
        "of": kept.seen,
        "model": kept.model,
        "timesteps": len({c.timestep for c in kept}),
    }
    if as_json:
        print_json(found)
    else:
        print_fields(f"recorded from {denoiser.name}", found)
