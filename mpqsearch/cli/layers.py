"""``mpqsearch layers``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpqsearch.cli.app import (
    ConfigOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    RunDirOption,
    SetOption,
    VerboseOption,
    app,
    open_run,
)
from mpqsearch.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from mpqsearch.core import LayerSpec


@app.command()
def layers(
    config: ConfigOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """List the weight layers of a model, their roles and MACs, and what stays at full precision.

    Example: `mpqsearch layers --model fmnist-unet`
    """
    from mpqsearch import stages

    run = open_run(
        config,
        set_,
        settings={"model.source": model, "model.device": device},
        run_dir=run_dir,
        dry_run=dry_run,
        overwrite=overwrite,
        verbose=verbose,
    )
    table = stages.layers(run)
    if as_json:
        print_json(table.to_data())
        return

    def width(layer: LayerSpec) -> str:
        fixed = run.config.policy.fixed_width(layer)
        return "searched" if fixed is None else f"{fixed} bits"

    print_table(
        f"{table.model}: {table.n_parameters} parameters",
        ["layer", "kind", "shape", "role", "channels", "MACs", "width"],
        [
            [la.name, la.kind, "x".join(map(str, la.weight_shape)), la.role, la.n_channels, la.macs, width(la)]
            for la in table
        ],
    )
    reasons: dict[str, int] = {}
    for k in table.kept:
        reasons[k.reason] = reasons.get(k.reason, 0) + k.n_values
    print_table("kept at full precision", ["what", "values"], [[r, n] for r, n in sorted(reasons.items())])
