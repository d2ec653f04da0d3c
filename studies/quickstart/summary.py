"""Print the results of a run as Markdown, and copy its front and its samples to where they are shown.

python studies/quickstart/summary.py runs/quickstart studies/quickstart
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd


def main() -> None:
    run, shown = (Path(argument) for argument in sys.argv[1:])
    table = pd.read_csv(run / "pareto.csv")
    full = table[table["method"] == "full-precision"].iloc[0]
    rows = table[table["method"] != "full-precision"]
    asked = f"{100 * full['attributes_recognised']:.1f} % of the attributes recognised"
    print(f"{full['n_samples']} samples, seeds {full['seeds']}; full precision: {asked}.\n")
    print(
        "FD to the full-precision samples of the same noise (95 % bootstrap interval), and in brackets the ratio to "
        "`uniform`:\n"
    )
    methods = list(dict.fromkeys(rows["method"]))
    print("| budget | kB | " + " | ".join(methods) + " |")
    print("|---|---|" + "---|" * len(methods))
    for budget, group in rows.groupby("budget", sort=False):
        by = group.set_index("method")
        base = by.loc["uniform", "fd_fp"]
        cells = [
            f"{_with(by.loc[m], 'fd_fp')} ({by.loc[m, 'fd_fp'] / base:.2f})" if m in by.index else "" for m in methods
        ]
        print(f"| {budget} | {by.loc['uniform', 'size_bytes'] / 1000:.0f} | " + " | ".join(cells) + " |")
    print("\nPaired PSNR in dB of the 8-bit pictures, and the share of attributes recognised:\n")
    print("| budget | " + " | ".join(methods) + " |")
    print("|---|" + "---|" * len(methods))
    for budget, group in rows.groupby("budget", sort=False):
        by = group.set_index("method")
        cells = [
            f"{by.loc[m, 'paired_psnr']:.1f} dB, {100 * by.loc[m, 'attributes_recognised']:.1f} %"
            if m in by.index
            else ""
            for m in methods
        ]
        print(f"| {budget} | " + " | ".join(cells) + " |")
    shutil.copy(run / "figures" / "front_fd_fp.png", shown / "front.png")
    samples = next(iter(sorted((run / "figures").glob("samples_*.png"))))  # the smallest budget
    shutil.copy(samples, shown / "samples.png")


def _with(row: pd.Series, key: str) -> str:
    return f"{row[key]:.3f} ± {row[f'{key}_high'] - row[key]:.3f}"


if __name__ == "__main__":
    main()
