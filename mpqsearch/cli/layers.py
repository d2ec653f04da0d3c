"""``mpqsearch layers``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mpqsearch.cli import options
from mpqsearch.cli.app import app, open_run
from mpqsearch.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from mpqsearch.core import LayerSpec


@app.command()
def layers(
    config: options.Config = None,
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
    """List the weight layers of a model, their roles and MACs, and what stays at full precision.

    Example: `mpqsearch layers --model fmnist-unet`
    """
    from mpqsearch import stages

    settings = {"model.source": model, "model.device": device} | options.drawing(prompts, steps, guidance, batch, call)
    run = open_run(config, set_, settings, run_dir=run_dir, dry_run=dry_run, overwrite=overwrite, verbose=verbose)
    table = stages.layers(run)
    if as_json:
        print_json(table.to_data())
        return

    def width(layer: LayerSpec) -> str:
        fixed = run.config.policy.fixed_width(layer)
        return "searched" if fixed is None else f"{fixed} bits"

    rows = [
        {
            "layer": la.name,
            "kind": la.kind,
            "shape": "x".join(map(str, la.weight_shape)),
            "role": la.role,
            "channels": la.n_channels,
            "MACs": la.macs,
            "width": width(la),
        }
        for la in table
    ]
    print_table(f"{table.model}: {table.n_parameters} parameters", rows)
    kept: Counter[str] = Counter()
    for parameter in table.kept:
        kept[parameter.reason] += parameter.n_values
    print_table("kept at full precision", [{"what": reason, "values": n} for reason, n in sorted(kept.items())])
