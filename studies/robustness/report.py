"""Tables of the robustness study, from ``results.csv`` into ``README.md``.

python -m studies.robustness.report
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from studies.robustness.study import ARMS, BITS, HERE, MODELS, PREDICTIONS, RESULTS, RULES, read

README, PRACTICE = HERE / "README.md", HERE / "practice.csv"
START, END = "<!-- table: made by report.py -->", "<!-- end of table -->"

SIMPLE = ("uniform", "uniform-gptq", "ilp-layer", "ilp-layer-gptq", "ilp-channel", "ilp-channel-gptq")
"""Arms that the default must not be worse than."""

SHRUNK = tuple(a for a in ARMS if a.startswith("shrinkage-"))
"""The program by channel at fixed shrinkage, from as measured to all channels of a layer alike."""

Errors = Mapping[tuple[str, int, str, int], float]
"""Paired errors by model, bits, arm and seed."""


def errors_of(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, int, str, int], float]:
    """Paired errors of the rows that measured a map."""
    measured = (r for r in rows if r["paired_error"])
    return {(r["model"], int(r["target_bits"]), r["arm"], int(r["seed"])): float(r["paired_error"]) for r in measured}


def geometric_mean(values: Sequence[float]) -> float:
    """NaN without values; infinite when one is."""
    if not values:
        return math.nan
    return math.exp(sum(math.log(max(v, 1e-12)) if math.isfinite(v) else math.inf for v in values) / len(values))


def cell(errors: Errors, model: str, bits: int, arm: str) -> list[float]:
    """The errors of one cell, by seed."""
    return [v for (m, b, a, _), v in sorted(errors.items()) if (m, b, a) == (model, bits, arm)]


def cells_of(errors: Errors, model: str = "") -> list[tuple[str, int, int]]:
    """Model, bits and seed of everything that was measured."""
    found = {(m, b, s) for m, b, _, s in errors if model in ("", m)}
    return sorted(found, key=lambda c: (list(MODELS).index(c[0]), *c[1:]))


def ratios(errors: Errors, arm: str, others: Sequence[str], model: str = "") -> dict[tuple[str, int, int], float]:
    """The error of an arm over the least of others, in the cells where it and all of them were measured and
    one of them is finite."""
    found = {}
    for m, b, s in cells_of(errors, model):
        if all((m, b, a, s) in errors for a in (arm, *others)):
            best = min(errors[m, b, a, s] for a in others)
            if math.isfinite(best):
                found[m, b, s] = errors[m, b, arm, s] / best
    return found


def main_table(errors: Errors) -> list[str]:
    """Geometric mean over seeds for every model, size and arm, with the least and the largest where there are several;
    the least of a row is bold."""
    arms = [a for a in ARMS if a not in SHRUNK and any(key[2] == a for key in errors)]
    lines = ["| model | bits | " + " | ".join(arms) + " |", "|---|---|" + "---|" * len(arms)]
    for model in MODELS:
        for bits in BITS:
            row = {arm: values for arm in arms if (values := cell(errors, model, bits, arm))}
            if row:
                best = min(row, key=lambda a: geometric_mean(row[a]))
                shown = [_shown(row[a], bold=a == best) if a in row else "" for a in arms]
                lines.append(f"| {model} | {bits} | " + " | ".join(shown) + " |")
    return lines


def verdicts(errors: Errors) -> list[str]:
    """What the study asks: ours against the best simple arm, and the program by channel against uniform."""
    lines = [
        "",
        "| ratio of errors | " + " | ".join(MODELS) + " | all | worst cell |",
        "|---|" + "---|" * (len(MODELS) + 2),
    ]
    for name, arm, others in (
        ("ours / best simple arm", "ours", SIMPLE),
        ("outer search / best simple arm", "outer-search", SIMPLE),
        ("KFAC / GPTQ, ilp-channel", "ilp-channel-kfac", ("ilp-channel-gptq",)),
        ("ilp-channel / uniform, nearest", "ilp-channel", ("uniform",)),
        ("ilp-channel / uniform, GPTQ", "ilp-channel-gptq", ("uniform-gptq",)),
        ("ilp-layer / uniform, nearest", "ilp-layer", ("uniform",)),
        ("ilp-layer / uniform, GPTQ", "ilp-layer-gptq", ("uniform-gptq",)),
    ):
        found = ratios(errors, arm, others)
        if found:
            by_model = [geometric_mean(list(ratios(errors, arm, others, m).values())) for m in MODELS]
            worst = max(found, key=lambda c: found[c])
            where = f"{found[worst]:.2f} ({worst[0]}, {worst[1]} bits, seed {worst[2]})"
            above = sum(r > 1 for r in found.values())
            shown = [f"{g:.2f}" if not math.isnan(g) else "" for g in (*by_model, geometric_mean(list(found.values())))]
            lines.append(f"| {name} | " + " | ".join(shown) + f" | {where}; above 1 in {above} of {len(found)} |")
    return lines


def left_out(errors: Errors) -> list[str]:
    """The default shrinkage, estimated on the model itself, against the constant that is best on all other models."""
    found = {m: {a: geometric_mean(_all(errors, m, a)) for a in (*SHRUNK, "ilp-channel-gptq")} for m in MODELS}
    found = {m: v for m, v in found.items() if not any(math.isnan(x) for x in v.values())}
    if len(found) < 2:
        return []
    lines = [
        "",
        "| model left out | best constant of the others | its error | as estimated | as measured |",
    ]
    lines.append("|---|---|---|---|---|")
    for model, own in found.items():
        others = {a: geometric_mean([v[a] for m, v in found.items() if m != model]) for a in SHRUNK}
        best = min(others, key=lambda a: others[a])
        shown = (f"{own[a]:.3g}" for a in (best, "ilp-channel-gptq", SHRUNK[0]))
        lines.append(f"| {model} | {best.removeprefix('shrinkage-')} | " + " | ".join(shown) + " |")
    return lines


def _all(errors: Errors, model: str, arm: str) -> list[float]:
    return [v for (m, _, a, _), v in errors.items() if (m, a) == (model, arm)]


def ranked(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rank correlation of predicted and measured errors over the maps of a selection, by model and size."""
    if not rows:
        return []
    lines = ["", "| rank correlation | " + " | ".join(f"{b} bits" for b in BITS) + " |", "|---|" + "---|" * len(BITS)]
    for model in MODELS:
        row = {int(r["target_bits"]): float(r["spearman"]) for r in rows if r["model"] == model and r["seed"] == "0"}
        if row:
            lines.append(f"| {model} | " + " | ".join(f"{row[b]:.2f}" if b in row else "" for b in BITS) + " |")
    return lines


def practice(errors: Errors) -> list[str]:
    """Rules of practice beside uniform widths and our maps in every cell, rounded to the nearest value and by GPTQ,
    and our map against the best rule that has the same rounding. What is not below it is bold."""
    cells = cells_of(errors)
    columns = [(c, s) for c in cells for s in ("", "-gptq") if (*c[:2], f"{RULES[0]}{s}", c[2]) in errors]
    if not columns:
        return []
    head = " | ".join(f"{m}, {b} bits, {'GPTQ' if s else 'nearest'}" for (m, b, _), s in columns)
    lines = ["", f"| practice | {head} |", "|---|" + "---|" * len(columns)]
    for rule in ("uniform", *RULES, "ilp-layer", "ilp-channel", "ours"):
        names = [f"{rule}{s}" if rule != "ours" else rule if s else "" for _, s in columns]
        found = [errors.get((m, b, name, seed)) for ((m, b, seed), _), name in zip(columns, names, strict=True)]
        lines.append(f"| {rule} | " + " | ".join("" if v is None else f"{v:.3g}" for v in found) + " |")
    for name, (nearest, gptq) in (("ilp-channel", ("ilp-channel", "ilp-channel-gptq")), ("ours", ("", "ours"))):
        arms = [(gptq if s else nearest, [f"{r}{s}" for r in RULES]) for _, s in columns]
        found = [ratios(errors, arm, rules).get(cell) for (cell, _), (arm, rules) in zip(columns, arms, strict=True)]
        shown = ["" if r is None else f"{r:.2f}" if r < 1 else f"**{r:.2f}**" for r in found]
        lines.append(f"| {name} / best rule | " + " | ".join(shown) + " |")
    return lines


def _shown(values: Sequence[float], *, bold: bool) -> str:
    mean = f"{geometric_mean(values):.3g}"
    text = f"**{mean}**" if bold else mean
    return text if len(values) == 1 else f"{text} ({min(values):.2g}–{max(values):.2g})"


def tables(rows: Iterable[Mapping[str, str]]) -> str:
    """All tables in Markdown."""
    errors = errors_of(rows)
    return "\n".join(
        [
            *main_table(errors),
            *verdicts(errors),
            *left_out(errors),
            *ranked(read(PREDICTIONS)),
            *practice(errors_of(read(PRACTICE))),
        ]
    )


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    made = tables(read(RESULTS))
    README.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
