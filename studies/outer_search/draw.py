"""The front of the outer search from results.csv: ``python studies/outer_search/draw.py``.

A panel for each model and mode; a point is the mean over seeds, its bar reaches from the least to the largest.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from mpqsearch.report.style import STYLE, plain_log_ticks, series_styles

HERE = Path(__file__).resolve().parent
SHOWN = ["ilp-layer", "ilp-channel", "ilp-channel-quantizer", "random-search", "outer-search"]
"""Arms of today's version; the table has all."""


def draw(table: pd.DataFrame) -> Figure:
    table = table[table["arm"].isin(SHOWN)]
    panels = list(table.groupby(["model", "mode"], sort=False))
    styles = series_styles(SHOWN)
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        axes = list(figure.subplots(2, 2).flat)
        for ax, ((model, mode), rows) in zip(axes, panels, strict=True):
            for arm, mine in rows.groupby("arm", sort=False):
                points = mine.groupby("target_bits")
                mean, found = points["average_bits"].mean(), points["fd_fp"]
                bars = [found.mean() - found.min(), found.max() - found.mean()]
                style = styles[arm]
                ax.errorbar(
                    mean, found.mean(), bars, marker=style.marker, ms=style.size, color=style.colour, lw=1.4, label=arm
                )
            ax.set_yscale("log")
            plain_log_ticks(ax)
            ax.set_title(f"{model}, {mode}")
        for ax in axes[2:]:
            ax.set_xlabel("stored bits per parameter")
        for ax in axes[::2]:
            ax.set_ylabel("FD to full precision")
        handles = {n: h for ax in axes for h, n in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    return figure


if __name__ == "__main__":
    draw(pd.read_csv(HERE / "results.csv")).savefig(HERE / "front.png", dpi=120)
