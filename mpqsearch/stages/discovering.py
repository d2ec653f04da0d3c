"""Which layers the model has."""

from __future__ import annotations

from mpqsearch.core import LayerTable
from mpqsearch.progress import bars_of
from mpqsearch.sources import kept_components
from mpqsearch.stages.base import Run
from mpqsearch.stages.reuse import LAYERS, reuse_or_make


def layers(run: Run) -> LayerTable:
    """``run.table``: discover the layers of the model, or reuse ``layers.json``."""
    path = run.path("layers.json")
    run.table = reuse_or_make(run, LAYERS, path, run.source_inputs, lambda: _discover(run), stage="layers")
    return run.table


def _discover(run: Run) -> LayerTable:
    from mpqsearch.models import discover, discover_streamed

    if run.dry_run:
        run.say(f"layers: would discover the layers of {run.config.model.source}")
    if run.config.calibration.weights_only:
        with bars_of(unit="B") as progress:
            table = discover_streamed(run.streamed, progress=progress)
    else:
        table = discover(run.denoiser)
    run.config.policy.check(table)
    run.say(
        f"layers: {len(table)} weight layers, {table.n_channels} output channels, {table.n_weights} weights; "
        f"{table.n_parameters - table.n_weights} other parameters stay at full precision"
    )
    beside = kept_components(run.config.model.source, run.config.component) if run.given is None else {}
    if beside:
        listed = ", ".join(f"{name} ({size / 1e6:.3g} MB)" for name, size in beside.items())
        run.say(f"layers: not quantized and not counted: {listed}; budget.parts says what is")
    unknown = [k.name for k in table.kept if k.reason.startswith("unknown")]
    if unknown:
        run.say(f"layers: kept at full precision because no quantizer here knows them: {', '.join(unknown)}")
    run.say(f"layers: policy: {run.config.policy.describe()}")
    return table
