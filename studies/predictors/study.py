"""Which sensitivity metric orders bit maps as their final samples do?

    python studies/predictors/study.py [--work runs/predictors]     # measures what is missing, then writes results.csv
    and predictors.png

What is measured stands in ``bench.py``; here the parts become predictions. A prediction is a sum over layers of a table
``[L, W]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from bench import CALIBRATION, MODELS, RANGES, WIDTHS, Bench
from matplotlib import rc_context
from matplotlib.figure import Figure

from mpqsearch.methods import LEAST
from mpqsearch.report import save_figure, spearman, spearman_interval
from mpqsearch.report.style import COLOURS, THEMES
from mpqsearch.sampling import SamplerSpec

HERE = Path(__file__).resolve().parent
SHORT = SamplerSpec(steps=5, guidance=2.0, batch=32)
SLOPE_MAPS = 10
"""Random maps at which the slope is taken, two trajectories each: under a tenth of one layer at a time on both
models."""

Table = np.ndarray[Any, Any]


@dataclass
class Cell:
    """One model at one range of widths: maps, truth, and the predictions made so far."""

    bench: Bench
    bits_range: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.widths = RANGES[self.bits_range]
        self.truth = self.bench.truth(self.bits_range)
        self.error = self.truth["mse"].mean(1)
        self.columns = [WIDTHS.index(w) for w in self.widths]
        half = self.truth["mse"].shape[1] // 2
        agreement = spearman(self.truth["mse"][:, :half].mean(1), self.truth["mse"][:, half:].mean(1))
        self.reliability = 2 * agreement / (1 + agreement)

    def add(self, metric: str, predicted: Table, seconds: float, forwards: float) -> None:
        low, high = spearman_interval(predicted, self.error)
        fd_low, fd_high = spearman_interval(predicted, self.truth["fd"])
        self.rows.append(
            {
                "model": self.bench.model,
                "bits_range": self.bits_range,
                "metric": metric,
                "spearman": spearman(predicted, self.error),
                "spearman_low": low,
                "spearman_high": high,
                "seconds": seconds,
                "forwards": forwards,
                "n_maps": len(self.error),
                "fd_spearman": spearman(predicted, self.truth["fd"]),
                "fd_low": fd_low,
                "fd_high": fd_high,
            }
        )

    def additive(self, metric: str, table: Table, *parts: dict[str, Any], share: float = 1.0) -> None:
        """A prediction by sums over searched layers of ``table`` ``[L, len(widths)]``; its cost is a share of what
        ``parts`` took."""
        choice = np.searchsorted(self.widths, self.truth["widths"][:, self.bench.searched])
        predicted = table[np.array(self.bench.searched), choice].sum(1)
        self.add(metric, predicted, *(share * sum(float(p[k]) for p in parts) for k in ("seconds", "forwards")))


def slope_and_curvature(part: dict[str, Any], probes: int, pixels: int) -> tuple[Table, Table, float]:
    """``2 r'J dW`` and ``|J dW|^2`` ``[L, W]`` of a part whose every first probe of ``probes`` is along the residual;
    the error there."""
    effect, residual = part["effect"].sum(1).astype(np.float64), part["residual"].astype(np.float64)
    along = np.arange(len(effect)) % probes == 0
    slope = 2 * (residual[along, None, None] * effect[along]).mean(0) / pixels
    curvature = np.square(effect[~along]).mean(0) if probes > 1 else np.zeros_like(slope)
    return slope, curvature, float(np.square(residual[along]).mean() / pixels)


def among_others(own: Table, slope: Table) -> Table:
    """As the loss ``context`` adds slopes (`mpqsearch.methods`): smaller where the whole model's loss is below that at
    3 bits."""
    whole = own.sum(0)
    share = np.sqrt(whole / whole[WIDTHS.index(3)]).clip(max=1.0)
    return np.maximum(own + share * slope, LEAST * own)


def of_one_prediction(cell: Cell, static: dict[str, Any]) -> None:
    """Metrics with gradients of the denoiser's own output."""
    b, columns, eps, absolute = cell.bench, cell.columns, cell.bench.eps_probes(), cell.bench.absolute()
    cell.additive("sum |g dW|", absolute["absolute"][:, columns], static, absolute)
    starts = np.cumsum([0, *(la.n_channels for la in b.table)])[:-1]
    gain = np.add.reduceat(eps["sensitivity"][:, None] * static["rows"], starts, axis=0)
    cell.additive("gain x exact row error", gain[:, columns], static, eps)
    cell.additive("layer probe of the prediction", eps["layer"][:, columns], static, eps)


def predictions(cell: Cell) -> None:
    """All metrics of one cell; on maps of 2-8 bits those that need no reference of their own."""
    b, columns = cell.bench, cell.columns
    pixels = int(np.prod(b.denoiser.sample_shape))
    first = CALIBRATION
    static = b.static()
    cell.additive("weight error", static["weight"][:, columns], {"seconds": static["seconds"], "forwards": 0})
    cell.additive("output error", static["output"][:, columns], static)
    cell.additive("relative output error", static["relative"][:, columns], static)
    if cell.bits_range != "2-8":
        of_one_prediction(cell, static)

    full = b.final_probes_at("fp", None, WIDTHS, range(first, first + 8), 4, residual=False)
    effect = full["effect"].astype(np.float64)
    through = np.square(effect.sum(1)).mean(0)[:, columns]
    cell.additive("sampler probe", through, static, full)
    cell.additive("sampler probe, steps independent", np.square(effect).sum(1).mean(0)[:, columns], static, full)
    few, contexts, setup = (
        b.final_probes_at("fp-few", None, WIDTHS, range(first, first + 4), 2, residual=False),
        b.contexts(),
        b.setup(),
    )
    alone = np.square(few["effect"].astype(np.float64).sum(1)).mean(0)
    cell.additive("sampler probe, 4 seeds x 2", alone[:, columns], setup, few)
    cell.additive("slope at 3 balanced maps", contexts["slope"][:, columns], setup, contexts)
    cell.additive("context, 4 seeds x 2", among_others(alone, contexts["slope"])[:, columns], setup, few, contexts)
    every = among_others(np.square(effect.sum(1)).mean(0), contexts["slope"])
    cell.additive("context", every[:, columns], setup, full, contexts)
    if cell.bits_range == "2-8":
        return
    chosen = np.searchsorted(WIDTHS, cell.truth["widths"][:, b.searched])
    whole = effect.sum(1)[:, b.searched][:, np.arange(len(b.searched)), chosen].sum(2)  # [K, maps]
    cell.add(
        "sampler probe with cross terms",
        np.square(whole).mean(0),
        float(static["seconds"] + full["seconds"]),
        float(static["forwards"] + full["forwards"]),
    )

    one = {w: b.one_at_a_time(w) for w in cell.widths}
    one_eps = {w: b.one_at_a_time_eps(w) for w in cell.widths}
    cell.additive(
        "one layer at a time, prediction", np.stack([one_eps[w]["mse"] for w in cell.widths], 1), *one_eps.values()
    )
    most = min(p["mse"].shape[1] for p in one.values())
    for n in (1, 2, 4, 8):
        if n <= most:
            table = np.stack([one[w]["mse"][:, :n].mean(1) for w in cell.widths], 1).astype(np.float64)
            cost = [{k: float(p[k]) * n / p["mse"].shape[1] for k in ("seconds", "forwards")} for p in one.values()]
            cell.additive(f"one layer at a time, {n} final samples", table, *cost)
    if cell.bits_range == "2-4":
        short = {w: b.one_at_a_time(w, seeds=2, sampler=SHORT, label="short") for w in cell.widths}
        cell.additive(
            "one layer at a time, 2 samples of 5 steps",
            np.stack([p["mse"].mean(1) for p in short.values()], 1),
            *short.values(),
        )
    top = np.argsort(-through.max(1))[: len(b.searched) // 5]
    mixed, best = through.copy(), np.stack([one[w]["mse"].mean(1) for w in cell.widths], 1).astype(np.float64)
    mixed[top] = best[top]
    part = {k: 0.2 * sum(float(p[k]) for p in one.values()) for k in ("seconds", "forwards")}
    cell.additive("sampler probe, top 20 % one at a time", mixed, static, full, part)

    middle = cell.widths[1]
    at = b.final_probes_at(
        f"uniform-{middle}", b.uniform(middle), cell.widths, range(first, first + 8), 5, residual=True
    )
    slope, curvature, _ = slope_and_curvature(at, 5, pixels)
    cell.additive("slope at uniform", slope, static, at)
    cell.additive("slope + curvature at uniform", slope + curvature, static, at)
    cell.additive("slope at uniform + sampler probe", slope + through, static, at, full)
    maps = b.maps(cell.bits_range, seed=1)
    parts = [
        b.final_probes_at(
            f"lin-{cell.bits_range}-{k}",
            maps[k],
            cell.widths,
            range(first + 2 * k, first + 2 * k + 2),
            1,
            residual=True,
        )
        for k in range(SLOPE_MAPS)
    ]
    slopes = [slope_and_curvature(p, 1, pixels) for p in parts]
    mean = np.mean([s for s, _, _ in slopes], axis=0)
    cell.additive(f"slope at {SLOPE_MAPS} random maps", mean, static, *parts)
    cell.additive(
        f"relative slope at {SLOPE_MAPS} random maps", np.mean([s / e for s, _, e in slopes], axis=0), static, *parts
    )
    cell.additive(
        f"slope at {SLOPE_MAPS} maps + slope, curvature at uniform", mean + slope + curvature, static, *parts, at
    )


def draw(frame: pd.DataFrame, reliability: dict[tuple[str, str], float]) -> Figure:
    """Rank correlation of every metric in every cell, best on top; a line at what the truth itself repeats."""
    cells = list(dict.fromkeys(zip(frame["model"], frame["bits_range"], strict=True)))
    order = frame[frame["bits_range"] == "2-4"].groupby("metric")["spearman"].mean().sort_values()
    figure = Figure(figsize=(13.5, 6.4), layout="constrained")
    axes: Any = figure.subplots(1, len(cells), sharey=True)
    for ax, cell in zip(axes, cells, strict=True):
        mine = frame[(frame["model"] == cell[0]) & (frame["bits_range"] == cell[1])].set_index("metric")
        for i, name in enumerate(order.index):
            if name in mine.index:
                row = mine.loc[name]
                ax.plot([row["spearman_low"], row["spearman_high"]], [i, i], color=COLOURS[0], linewidth=1.5)
                ax.plot(row["spearman"], i, "o", color=COLOURS[0])
                ax.plot(row["fd_spearman"], i, "x", color=COLOURS[1])
        ax.axvline(reliability[cell], color=COLOURS[2], linestyle="--", linewidth=1)
        ax.set_title(f"{cell[0]}, {cell[1]} bits", loc="left")
        ax.set_xlim(-0.6, 1.02)
        ax.set_xlabel("rank correlation")
    axes[0].set_yticks(range(len(order)), order.index)
    axes[0].plot([], [], "o-", color=COLOURS[0], label="error of final samples, 95 %")
    axes[0].plot([], [], "x", color=COLOURS[1], label="FD to full precision")
    axes[0].plot([], [], "--", color=COLOURS[2], label="what the measured error itself repeats")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main(say: Callable[..., None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, default=Path("runs/predictors"), help="where finished parts are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for bits_range in RANGES:
        for model in MODELS:
            cell = Cell(bench=Bench(model=model, folder=args.work), bits_range=bits_range)
            predictions(cell)
            cells.append(cell)
    frame = pd.DataFrame([row for cell in cells for row in cell.rows])
    frame.round({"seconds": 1, "forwards": 0}).round(3).to_csv(HERE / "results.csv", index=False)
    with rc_context(THEMES["light"]):
        png, svg = save_figure(
            draw(frame, {(c.bench.model, c.bits_range): c.reliability for c in cells}), HERE / "predictors"
        )
    svg.unlink()
    for cell in cells:
        mine = pd.DataFrame(cell.rows).set_index("metric")
        table = mine[["spearman", "spearman_low", "spearman_high", "fd_spearman", "seconds", "forwards"]].round(2)
        say(
            f"\n{cell.bench.model}, {cell.bits_range} bits; the measured error repeats itself with "
            f"{cell.reliability:.2f}\n{table}"
        )
    say(f"\nwritten: {HERE / 'results.csv'}, {png}")


if __name__ == "__main__":
    main()
