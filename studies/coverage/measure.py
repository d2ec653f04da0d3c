"""Takes every denoiser class of the installed diffusers all the way and writes what came out.

Run from the repository root, whose tests it uses: ``python -m studies.coverage.measure``.
"""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from importlib import metadata
from pathlib import Path

from tests.support.coverage import Covered, cover
from tests.support.denoisers import KNOWN_REFUSALS, denoiser_classes, model_classes, reason_against

HERE = Path(__file__).parent
ROLES = (
    "first",
    "last",
    "time",
    "class",
    "norm",
    "attention",
    "feed-forward",
    "conv",
    "shortcut",
    "skip",
    "resample",
    "linear",
    "unused",
)
START, END = "<!-- table: made by measure.py -->", "<!-- end of table -->"


def run() -> tuple[list[Covered], dict[str, str]]:
    """Every class: what was found, or the reason why it does not go all the way."""
    covered, failed = [], {}
    for name in sorted(denoiser_classes()):
        if name in KNOWN_REFUSALS:
            failed[name] = KNOWN_REFUSALS[name]
            continue
        try:
            covered.append(cover(name))
        except Exception as error:  # noqa: BLE001  (the table names whatever a class raises)
            failed[name] = f"{type(error).__name__}: {error}"
        print(name, failed.get(name, "all the way"), file=sys.stderr)
    return covered, failed


def write_csv(covered: list[Covered], failed: dict[str, str]) -> None:
    """One row a class."""
    columns = ["layers", "channels", *(f"role_{r}" for r in ROLES), "fusible_layers", "kept_share", "power_error"]
    columns += ["change_ilp_layer", "change_ilp_channel", "cpu_seconds"]
    with (HERE / "results.csv").open("w", newline="") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(["class", "all_the_way", *columns, "reason"])
        for c in covered:
            counts = [c.layers, c.channels, *(c.roles.get(r, 0) for r in ROLES), c.fused]
            measured = [f"{c.apart:.4f}", f"{c.power_error:.1e}", *(f"{v:.3g}" for v in c.change.values())]
            rows.writerow([c.name, "yes", *counts, *measured, f"{c.seconds:.2f}", ""])
        for name, reason in failed.items():
            rows.writerow([name, "no", *[""] * len(columns), reason])


def table(covered: list[Covered], failed: dict[str, str]) -> str:
    """The summary for the page."""
    total = len(covered) + len(failed)
    left = {n: reason_against(c) for n, c in model_classes().items() if n not in denoiser_classes()}
    autoencoders = sum(r.startswith("autoencoder") for r in left.values())
    summary = (
        f"diffusers {metadata.version('diffusers')}: **{len(covered)} of {total} denoiser classes "
        f"({100 * len(covered) / total:.1f} %) go all the way**, "
        f"{sum(c.layers for c in covered)} layers in all, {sum(c.seconds for c in covered):.0f} s of one core. Largest "
        "relative difference between the "
        "measured output power of a layer and that of its weights on the recorded second moments: "
        f"{max(c.power_error for c in covered):.1e}."
    )
    lines = [
        summary,
        "",
        "| class that does not | why |",
        "|---|---|",
        *(f"| `{n}` | {r} |" for n, r in failed.items()),
        "",
        f"Of {len(model_classes())} models {len(left)} are no denoisers: {autoencoders} autoencoders, and "
        + ", ".join(f"`{n}`" for n, r in left.items() if not r.startswith("autoencoder"))
        + ", which take no time.",
        "",
        "| role | layers | classes | example |",
        "|---|---|---|---|",
    ]
    for role in ROLES:
        have = [c for c in covered if c.roles.get(role)]
        if have:
            lines.append(f"| {role} | {sum(c.roles[role] for c in have)} | {len(have)} | `{have[0].name}` |")
    return "\n".join(lines)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    covered, failed = run()
    write_csv(covered, failed)
    page = (HERE / "README.md").read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    (HERE / "README.md").write_text(f"{before}{START}\n{table(covered, failed)}\n{END}{after}")


if __name__ == "__main__":
    main()
