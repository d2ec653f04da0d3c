"""A binary residual branch for salient rows (MPQ-DMv2's idea): does a second scale a row pay for its 16 bits?

python studies/mpq_dm/residual.py --part rows       # fits row by row: what residual_rows.csv lacks
python studies/mpq_dm/residual.py --part expected   # what the integer program expects: what residual_expected.csv lacks
python studies/mpq_dm/residual.py --part samples    # distances of untrained models: what residual.csv lacks

A residual row of b bits is ``scale * (code - zero) + alpha * sign`` with a code of b - 1 bits and a sign: levels that
are not evenly spaced, for one more 16-bit scale. The bit that says that a row has a branch is taken for free: the zero
point is one bit shorter. No width below 2 has one. Samples are those of trials.py: 128 of noise from seed 1,500,000, on
which no row of the study is measured.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study import HERE, METHODS, MODELS, SETTINGS, Model, Recipe, Schedule, measure
from torch import Tensor
from trials import EVALUATION_SEED

from mpqsearch import artifacts
from mpqsearch.allocate import AllocationProblem, solve
from mpqsearch.core import BitMap, Budget, LayerSpec, QuantFormat, size_bits, size_bytes
from mpqsearch.core.formats import WIDTHS
from mpqsearch.methods import channel_losses, program_of
from mpqsearch.quant import convert, decode, encode, fit_rows, gptq_rows, rows_of, weight_of
from mpqsearch.quant.apply import bias_shift, moment_of, scaled_moment
from mpqsearch.quant.rows import stored_scale
from mpqsearch.quant.tables import stored_factors

BITS = (2, 3, 4, 5)
BRANCH_BITS = 16
TIED_BITS = 2
"""Of a row whose second scale is one of four times the first: 1/4, 3/4, 5/4 or 7/4. 1/4 is an even grid; at the others
two grids interleave in the middle alone, so that levels are dense there and sparse outside."""
OPTION_BITS = {"branch": (BRANCH_BITS, 8), "tied": (TIED_BITS, 0), "choice": (0, 0)}
"""Bits of a row that has the option, and of a layer with such rows: the exponent that second scales share."""

FACTORS = 8
ROUNDS = 4
NEAREST = replace(METHODS["ours-nearest"], trainable=None, relation=False)
COMPENSATED = METHODS["ours-untrained"]
OMQ = METHODS["omq-paper"]
EVERY: Any = slice(None)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Scale, zero and largest code of the base of every row, and the magnitude of its branch, ``tied`` to the scale or
    not; float32 ``[C]``."""

    scale: Tensor
    zero: Tensor
    top: Tensor
    alpha: Tensor
    tied: bool = False

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Centred codes and signs ``[C, D]`` of the levels nearest to ``rows``."""
        s, z, t, a = (x[:, None] for x in (self.scale, self.zero, self.top, self.alpha))
        up, down = ((((rows - sign * a) / s + z).round().clamp_min(0).minimum(t) - z) for sign in (1, -1))
        plus = (up * s + a - rows).abs() <= (down * s - a - rows).abs()
        return torch.where(plus, up, down), plus * 2.0 - 1

    def join(self, codes: Tensor, signs: Tensor) -> Tensor:
        return codes * self.scale[:, None] + signs * self.alpha[:, None]

    def nearest(self, rows: Tensor) -> Tensor:
        """The levels nearest to ``rows``."""
        return self.join(*self.split(rows))

    def errors(self, rows: Tensor) -> Tensor:
        """Squared error ``[C]`` of the nearest levels."""
        s, z, t, a = (x[:, None] for x in (self.scale, self.zero, self.top, self.alpha))
        each = []
        for sign in (1, -1):
            moved = rows - sign * a
            each.append((moved / s).add_(z).round_().clamp_min_(0).minimum(t).sub_(z).mul_(s).sub_(moved).square_())
        return torch.minimum(*each).sum(1)

    def where(self, use: Tensor, other: Residual) -> Residual:
        """These quantizers in the rows of ``use``, ``other`` in the rest."""
        return replace(
            self,
            **{k: torch.where(use, getattr(self, k), getattr(other, k)) for k in ("scale", "zero", "top", "alpha")},
        )

    def fitted(self, rows: Tensor, codes: Tensor, signs: Tensor, moment: Tensor | None = None) -> Residual:
        """Both scales by least squares for given codes and signs, of the weights or, with ``moment``, of the output."""
        if self.tied:
            ratio = self.alpha / self.scale
            levels = codes + ratio[:, None] * signs
            through = levels if moment is None else levels @ moment
            best, norm = (through * rows).sum(1), (through * levels).sum(1)
            scale = torch.where((best > 0) & (norm > 0), best / norm, self.scale)
            return replace(self, scale=scale, alpha=ratio * scale)
        through_c, through_g = (codes, signs) if moment is None else (codes @ moment, signs @ moment)
        cc, cg, gg = (through_c * codes).sum(1), (through_c * signs).sum(1), (through_g * signs).sum(1)
        wc, wg = (through_c * rows).sum(1), (through_g * rows).sum(1)
        det = cc * gg - cg.square()
        good = det > 1e-4 * cc * gg
        det = torch.where(good, det, 1.0)
        scale, alpha = (wc * gg - wg * cg) / det, (wg * cc - wc * cg) / det
        good &= (scale > 0) & (alpha >= 0)
        return replace(self, scale=torch.where(good, scale, self.scale), alpha=torch.where(good, alpha, self.alpha))

    def stored(self) -> Residual:
        scale = stored_scale(self.scale)
        alpha = torch.where(self.alpha > 0, stored_scale(self.alpha.clamp_min(1e-30)), 0.0)
        return replace(self, scale=scale, alpha=self.alpha / self.scale * scale if self.tied else alpha)


def fit_residual(rows: Tensor, bits: int, fmt: QuantFormat, scheme: str, *, tied: bool = False) -> Residual:
    """Residual quantizers of ``bits`` for rows ``[C, D]`` on bases of one scheme, by squared error.

    Starts are the base as `fit_rows` finds it with the branch that suits its residual, and for each of some ratios of
    the two scales the best of shrunk full ranges; from each, codes and scales in turn. No row has more squared error
    than its base alone. ``tied``: the ratios stay, and that is not promised.
    """
    base = fit_rows(rows, bits - 1, replace(fmt, scheme=scheme))
    widest = fit_rows(rows, bits - 1, replace(fmt, scheme=scheme, criterion="minmax")).scale
    top = torch.exp2(base.bits.float()) - 1
    first = Residual(scale=base.scale, zero=base.zero, top=top, alpha=torch.zeros_like(widest), tied=tied)
    codes, _ = first.split(rows)
    first = replace(first, alpha=base.scale / 4 if tied else (rows - codes * base.scale[:, None]).abs().mean(1))
    best, least = first, first.errors(rows)
    starts = [first]
    half = (2 ** (bits - 1) - 1) / 2
    for ratio in (m / 2 + 0.25 for m in range(min(2 ** (bits - 2) + 1, 2**TIED_BITS if tied else 9))):
        found, found_error = first, torch.full_like(least, torch.inf)
        for i in range(FACTORS):
            scale = widest * (1 - 0.8 * i / FACTORS) * half / (half + ratio)
            now = replace(first, scale=scale, alpha=ratio * scale)
            error = now.errors(rows)
            found, found_error = now.where(error < found_error, found), torch.minimum(error, found_error)
        starts.append(found)
    for start in starts:
        now = start
        for _ in range(ROUNDS):
            now = now.fitted(rows, *now.split(rows))
            error = now.errors(rows)
            best, least = now.where(error < least, best), torch.minimum(error, least)
    return best.stored()


def fit_bases(rows: Tensor, bits: int, fmt: QuantFormat, *, tied: bool = False) -> list[Residual]:
    return [fit_residual(rows, bits, fmt, scheme, tied=tied) for scheme in ("symmetric", "asymmetric")]


def better_of(rows: Tensor, made: Sequence[Residual], moment: Tensor | None = None) -> Residual:
    """The better quantizer of every row: by squared error, or by output error with ``moment``."""
    errors = [error_of(q.nearest(rows) - rows, moment) for q in made]
    return made[1].where(errors[1] < errors[0], made[0])


def error_of(error: Tensor, moment: Tensor | None) -> Tensor:
    """Squared error of every row ``[C]``, or output error with ``moment`` ``[D, D]``."""
    wide = error.double()
    return wide.square().sum(1) if moment is None else ((wide @ moment) * wide).sum(1).clamp_min(0)


def compensate_residual(rows: Tensor, q: Residual, moment: Tensor, damping: float = 0.01, sweeps: int = 2) -> Tensor:
    """Quantized rows with codes, signs and scales for the output: the passes of `mpqsearch.quant.gptq` on these
    levels."""
    level = moment.diagonal().mean()
    nearest = q.nearest(rows)
    if not level > 0:
        return nearest
    damped = moment + damping * level * torch.eye(len(moment), dtype=moment.dtype)
    order = damped.diagonal().argsort(descending=True)
    damped = damped[order][:, order]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    h, exact = damped.float(), rows[:, order]
    left, codes, signs = exact.clone(), torch.empty_like(exact), torch.empty_like(exact)
    for j in range(exact.shape[1]):
        column = left[:, j : j + 1]
        codes[:, j : j + 1], signs[:, j : j + 1] = q.split(column)
        lost = (column - q.join(codes[:, j : j + 1], signs[:, j : j + 1])) / factor[j, j]
        left[:, j + 1 :] -= lost * factor[j, j + 1 :]
    for _ in range(sweeps):
        q = q.fitted(exact, codes, signs, h).stored()
        now = q.join(codes, signs)
        slope = (now - exact) @ h
        for j in range(exact.shape[1]):
            wanted = now[:, j : j + 1] - slope[:, j : j + 1] / h[j, j]
            codes[:, j : j + 1], signs[:, j : j + 1] = q.split(wanted)
            value = q.join(codes[:, j : j + 1], signs[:, j : j + 1])
            slope += (value - now[:, j : j + 1]) * h[j]
            now[:, j : j + 1] = value
    found = q.join(codes, signs)[:, order.argsort()]
    better = error_of(found - rows, moment) < error_of(nearest - rows, moment)
    return torch.where(better[:, None], found, nearest)


class Layer:
    """Rows of one layer as they are quantized, and what their output error is measured with."""

    def __init__(self, model: Model, layer: LayerSpec, fmt: QuantFormat, recipe: Recipe) -> None:
        if layer.groups != 1:
            raise SystemExit(f"{layer.name}: the residual branch was not written for grouped layers")
        weight: Any = dict(model.denoiser.module.named_modules())[layer.name].weight
        stats = model.statistics[layer.name]
        self.rows = rows_of(weight.detach().float(), layer)
        self.factor = None
        correct = recipe.spec.bias_correction and layer.has_bias
        moment = moment_of(layer.name, {layer.name: stats.second_moment}, {layer.name: stats.mean} if correct else None)
        assert moment is not None
        self.groups_moment = moment.double()
        if fmt.smooth:
            factor = stored_factors(
                self.rows, torch.from_numpy(np.array(model.profile.input_max[layer.name])), layer, fmt.alpha
            )
            self.factor, self.rows = factor, self.rows * factor
            self.groups_moment = scaled_moment(self.groups_moment, factor)
        self.moment, self.fmt = self.groups_moment[0], fmt
        self._bases: dict[tuple[int, bool], list[Residual]] = {}

    def plain(self, bits: int, *, compensated: bool = False, **changes: Any) -> Tensor:
        """Weight errors ``[C, D]`` of the package's own quantizer."""
        rows, q = self.rows, fit_rows(self.rows, bits, replace(self.fmt, **changes))
        if compensated:
            rows, q = gptq_rows(self.rows, q, self.groups_moment)
        return decode(encode(rows, q), q) - self.rows

    def residual(
        self,
        bits: int,
        which: Tensor = EVERY,
        *,
        compensated: bool = False,
        by_output: bool = False,
        tied: bool = False,
    ) -> Tensor:
        """Weight errors of residual rows, of all or of those in ``which``."""
        rows, key = self.rows[which], (bits, tied)
        if which is EVERY and key not in self._bases:
            self._bases[key] = fit_bases(rows, bits, self.fmt, tied=tied)
        made = self._bases[key] if which is EVERY else fit_bases(rows, bits, self.fmt, tied=tied)
        q = better_of(rows, made, self.moment if by_output else None)
        return (compensate_residual(rows, q, self.moment) if compensated else q.nearest(rows)) - rows

    def choice(self, bits: int, which: Tensor = EVERY, *, compensated: bool = False) -> Tensor:
        """Weight errors of rows in the scheme, affine or symmetric, that has less output error: this takes no bit more
        than `auto`."""
        affine, symmetric = (
            self.plain(bits, compensated=compensated, scheme=k)[which] for k in ("asymmetric", "symmetric")
        )
        use = error_of(symmetric, self.moment) < error_of(affine, self.moment)
        return torch.where(use[:, None], symmetric, affine)


# --- row by row

KINDS = ("nearest", "nearest+tied", "gptq", "compensated+tied")

ROW_COLUMNS = (
    "model", "bits", "kind", "chosen_by", "against", "rows", "weight_ratio", "weight_wins", "output_ratio", "output_wins",
    "output_total", "equal_bytes_ratio", "equal_bytes_wins",
)  # fmt: skip
"""Ratios: geometric means over rows of residual over plain error, ``wins`` the share of rows below 1. ``output_total``:
of the sums over all rows. ``equal_bytes``: output error against a plain row that had those 16 bits too, its error
between that of b and of b + 1 bits in the ratio of the bits (`auto` only)."""


def row_table(model: Model, kind: str) -> list[dict[str, Any]]:
    """All comparisons of one model and one of `KINDS`."""
    found: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = {}
    fmt = replace(model.format, scheme="auto", smooth=True)
    rounding, _, tied = kind.partition("+")
    tight = rounding == "gptq"
    for layer in searched(model):
        part = Layer(model, layer, fmt, NEAREST)
        share = (TIED_BITS if tied else BRANCH_BITS) / (layer.weights_per_channel + 1)

        def both(error: Tensor, part: Layer = part) -> tuple[Tensor, Tensor]:
            return error_of(error, None), error_of(error, part.moment)

        plain = {b: both(part.plain(b, compensated=tight)) for b in (*BITS, max(BITS) + 1)}
        for b in BITS:
            made = both(part.residual(b, compensated=tight, tied=bool(tied)))
            asked = [("weights", made, "auto", plain[b])]
            if kind == "nearest":
                books = {k: both(part.plain(b, scheme=k)) for k in ("asymmetric", "symmetric")}
                use = books["symmetric"][1] < books["asymmetric"][1]
                chosen = tuple(
                    torch.where(use, m, a) for m, a in zip(books["symmetric"], books["asymmetric"], strict=True)
                )
                other = {**books, "auto, squared error": both(part.plain(b, criterion="mse"))}
                by_output = both(part.residual(b, by_output=True))
                asked += [("weights", made, name, errors) for name, errors in other.items()]
                asked += [("output", by_output, "auto by output", chosen), ("output", by_output, "auto", plain[b])]
            for chosen_by, mine, name, errors in asked:
                alive = torch.stack([*mine, *errors, plain[b + 1][1]]).amin(0) > 0
                ratios = [(m / o)[alive] for m, o in zip(mine, errors, strict=True)]
                equal = ratios[1] / (plain[b + 1][1] / errors[1])[alive].pow(share)
                found.setdefault((b, kind, chosen_by, name), []).append((*ratios, equal, mine[1], errors[1]))
    out = []
    for (b, _, chosen_by, name), parts in found.items():
        all_rows = [torch.cat(x) for x in zip(*parts, strict=True)]
        row: dict[str, Any] = {"model": model.name, "bits": b, "kind": kind, "chosen_by": chosen_by, "against": name}
        row["rows"] = len(all_rows[0])
        row["output_total"] = round(float(all_rows[3].sum() / all_rows[4].sum()), 4)
        for what, ratio in zip(("weight", "output", "equal_bytes"), all_rows, strict=False):
            told = what != "equal_bytes" or name == "auto"
            row[f"{what}_ratio"] = round(float(ratio.log().mean().exp()), 4) if told else ""
            row[f"{what}_wins"] = round(float((ratio < 1).double().mean()), 4) if told else ""
        out.append(row)
    return out


def searched(model: Model) -> list[LayerSpec]:
    return [la for la in model.table if model.policy.fixed_width(la) is None]


# --- samples

VARIANTS = (
    "omq", "omq+residual", "omq+promoted", "nearest", "nearest+residual", "nearest+tied", "nearest+choice", "nearest+everywhere",
    "gptq", "compensated+residual", "compensated+tied", "compensated+choice",
)  # fmt: skip
"""``omq+residual``: the promoted rows of `omq` have a branch; ``omq+promoted``: more rows promoted instead, at those
bytes, where the integer program's losses fall most for a bit. ``+residual``: a branch is one more choice of 2 to 5 bits
in the integer program, at the budget of the study; ``+everywhere``: the only choice at 2 and 3 bits; ``+tied``: the
second scale is one of four times the first, for 2 bits a row. ``+choice``: no branch, but the scheme of each row by
output error: the control for what a second quantizer to choose from brings without a bit."""

Masks = Mapping[str, NDArray[np.bool_]]
COLUMNS = (
    "model", "setting", "variant", "bytes", "rows", "loss", "fd_fp", "fd_fp_spread", "paired_psnr", "paired_psnr_spread", "fd_data",
    "seconds",
)  # fmt: skip
"""``rows``: that have a branch, or a scheme by output error. ``loss``: what the integer program expects, in its own
unit."""


def widths_of(option: str) -> tuple[int, ...]:
    """The widths at which a row may have the option: ``branch``, ``tied`` or ``choice``."""
    return WIDTHS if option == "choice" else BITS


def make(part: Layer, option: str, bits: int, which: Tensor, *, compensated: bool) -> Tensor:
    if option == "choice":
        return part.choice(bits, which, compensated=compensated)
    return part.residual(bits, which, compensated=compensated, tied=option == "tied")


def ratios(model: Model, recipe: Recipe, option: str) -> NDArray[np.float64]:
    """Output error of a row with the option over that of a plain one ``[C, W]``, rounded as the recipe does."""
    fmt = replace(model.format, scheme="auto", smooth=True)  # of alpha 0.5, as the integer program has it
    parts = []
    for layer in searched(model):
        part = Layer(model, layer, fmt, recipe)
        each = []
        for b in widths_of(option):
            mine = error_of(make(part, option, b, EVERY, compensated=recipe.compensated), part.moment)
            plain = error_of(part.plain(b, compensated=recipe.compensated), part.moment)
            each.append(torch.where(plain > 0, mine / plain.clamp_min(1e-30), 1.0))
        parts.append(torch.stack(each, 1))
    return torch.cat(parts).numpy()


def kept_ratios(model: Model, recipe: Recipe, option: str) -> NDArray[np.float64]:
    """`ratios`, kept in the work folder under the digest of the profile and of how rows are fitted."""
    of = artifacts.digest_of([artifacts.digest_file(model.work / "profile.npz"), BITS, TIED_BITS, FACTORS, ROUNDS])[:12]
    path = model.work / f"residual-{option}-{'gptq' if recipe.compensated else 'nearest'}-{of}.npy"
    if not path.is_file():
        np.save(path, ratios(model, recipe, option))
    known: NDArray[np.float64] = np.load(path)
    return known


def with_option(
    model: Model,
    recipe: Recipe,
    setting: str,
    base: BitMap,
    option: str,
    known: NDArray[np.float64],
    *,
    everywhere: bool = False,
) -> tuple[BitMap, Masks, float]:
    """The exact map at the budget of ``base`` when rows may have the option; alphas of smoothing are those of
    ``base``."""
    spec = replace(recipe.spec, act_bits=SETTINGS[setting][1], act_timesteps=True)
    limit = size_bytes(model.table, model.bit_map(METHODS[recipe.size_of], setting))
    profile = model.rounds_by_gptq(spec) if recipe.compensated else model.profile
    program = program_of(spec, Budget(quantity="bytes", limit=limit), model.table, profile, model.policy, model.format)
    old, widths, more = program.problem, program.widths, widths_of(option)
    at = [widths.index(b) for b in more]
    allowed = None
    if everywhere:
        allowed = np.ones((old.n_items, len(widths) + len(more)), dtype=bool)
        allowed[:, [widths.index(2), widths.index(3), *(len(widths) + i for i, b in enumerate(more) if b > 3)]] = False
    more_bits, per_layer = OPTION_BITS[option]
    result = solve(
        AllocationProblem(
            loss=np.asfortranarray(np.hstack([old.loss, old.loss[:, at] * known])),
            cost=np.asfortranarray(np.hstack([old.cost, old.cost[:, at] + more_bits])),
            limit=old.limit - per_layer * len(program.layers),
            allowed=allowed,
            ties=old.ties,
        )
    )
    both = replace(program, widths=(*widths, *more))
    starts = np.flatnonzero(np.diff(program.item_layer)) + 1
    masks = dict(zip(program.layers, np.split(result.choice >= len(widths), starts), strict=True))
    return replace(base, weights={**base.weights, **both.weights(result.choice)}), masks, float(result.loss)


ROUNDINGS = ("gptq", "nearest")
EXPECTED_COLUMNS = ("model", "setting", "rounding", "option", "loss_ratio", "rows")
"""``loss_ratio``: what the integer program expects with the option over what it expects without, at the same bytes."""


def expected(model: Model, setting: str, rounding: str, option: str) -> dict[str, Any]:
    """One row of residual_expected.csv; nothing is sampled."""
    recipe = COMPENSATED if rounding == "gptq" else NEAREST
    known = kept_ratios(model, recipe, option)
    base = model.bit_map(OMQ, setting)  # stands for any map: alphas of smoothing are not used
    plain = with_option(model, recipe, setting, base, "choice", np.ones((len(known), len(WIDTHS))))[2]
    _, masks, loss = with_option(model, recipe, setting, base, option, known)
    row = {"model": model.name, "setting": setting, "rounding": rounding, "option": option}
    return row | {"loss_ratio": round(loss / plain, 4), "rows": sum(int(m.sum()) for m in masks.values())}


def promoted(model: Model, bit_map: BitMap, bits: int) -> Masks:
    """The rows that OMQ gave one bit more."""
    names = [la.name for la in searched(model) if bit_map.is_mixed(la.name)]
    return {n: bit_map.weights[n] == bits + 1 for n in names}


def more_promoted(model: Model, recipe: Recipe, bit_map: BitMap, bits: int, limit_bits: int) -> BitMap:
    """More rows of the mixed layers at ``bits + 1``, best first, until the model takes ``limit_bits``."""
    spec, profile = recipe.spec, model.profile
    loss = channel_losses(profile, model.table, spec.variant, spec.loss, bias_correction=spec.bias_correction)
    low, high = (profile.widths.index(b) for b in (bits, bits + 1))
    weights = {n: np.array(w) for n, w in bit_map.weights.items()}
    queue = []
    for layer in searched(model):
        if bit_map.is_mixed(layer.name):
            gains = loss[profile.rows(layer.name)]
            queue += [
                (
                    (gains[c, low] - gains[c, high]) / (layer.weights_per_channel + 1),
                    layer.weights_per_channel + 1,
                    layer.name,
                    c,
                )
                for c in np.flatnonzero(weights[layer.name] == bits)
            ]
    left = limit_bits - size_bits(model.table, bit_map)
    for _, cost, name, channel in sorted(queue, key=lambda item: -item[0]):
        if cost <= left:
            weights[name][channel] += 1
            left -= cost
    return replace(bit_map, weights=weights)


@torch.no_grad()
def module_of(model: Model, recipe: Recipe, bit_map: BitMap, masks: Masks, option: str) -> torch.nn.Module:
    """The quantized model, with the option in the rows of ``masks``."""
    module = convert(model.student(recipe, bit_map, 0)).module
    exact: dict[str, Any] = dict(model.denoiser.module.named_modules())
    parts: dict[str, Any] = dict(module.named_modules())
    means = model.moments(recipe)["means"]
    for name, mask in masks.items():
        layer = model.table[name]
        weight = rows_of(parts[name].weight.detach().clone(), layer)
        part = Layer(model, layer, bit_map.format_of(name), recipe)
        for b in widths_of(option):
            which = torch.from_numpy(np.flatnonzero(mask & (bit_map.channel_widths(name, layer.n_channels) == b)))
            if not len(which):
                continue
            error = make(part, option, b, which, compensated=recipe.compensated)
            error = error if part.factor is None else error / part.factor
            weight[which] = rows_of(exact[name].weight.detach().float(), layer)[which] + error
            if means is not None and name in means and exact[name].bias is not None:
                parts[name].bias[which] = exact[name].bias[which] - bias_shift(error, means[name])
        parts[name].weight.copy_(weight_of(weight, layer))
    return module


class Samples:
    """The variants of one model, measured one by one; what they share is made once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._ratios: dict[tuple[bool, str], NDArray[np.float64]] = {}

    def row(self, setting: str, variant: str) -> dict[str, Any]:
        began = time.perf_counter()
        model, (family, _, change) = self.model, variant.partition("+")
        recipe = {"omq": OMQ, "nearest": NEAREST, "gptq": COMPENSATED}[family]
        bits = SETTINGS[setting][0]
        bit_map = model.bit_map(recipe, setting)
        masks: Masks = {}
        loss: float | str = ""
        option = change if change in ("tied", "choice") else "branch"
        if family == "omq":
            masks = promoted(model, bit_map, bits) if change else {}
            if change == "promoted":
                limit = size_bits(model.table, bit_map) + extra_bits(masks)
                bit_map, masks = more_promoted(model, recipe, bit_map, bits, limit), {}
        else:
            key = recipe.compensated, option
            if key not in self._ratios:
                self._ratios[key] = kept_ratios(model, recipe, option)
            known = self._ratios[key] if change else np.ones_like(self._ratios[key])
            new, found_masks, value = with_option(
                model, recipe, setting, bit_map, option, known, everywhere=change == "everywhere"
            )
            bit_map, masks = (new, found_masks) if change else (bit_map, {})
            loss = float(f"{value:.5g}")
        size = -(-(size_bits(model.table, bit_map) + extra_bits(masks, option)) // 8)
        found = measure(model, module_of(model, recipe, bit_map, masks, option), EVALUATION_SEED)
        row = {"model": model.name, "setting": setting, "variant": variant, "bytes": size, "loss": loss, **found}
        row |= {"rows": sum(int(m.sum()) for m in masks.values()), "seconds": round(time.perf_counter() - began, 1)}
        return {k: row[k] for k in COLUMNS}


def extra_bits(masks: Masks, option: str = "branch") -> int:
    """Stored bits of the option in the rows of ``masks``."""
    (each, once), used = OPTION_BITS[option], [int(m.sum()) for m in masks.values()]
    return sum(each * n + once * (n > 0) for n in used)


PARTS = ("rows", "expected", "samples")


def read(path: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(path.open())) if path.is_file() else []


def write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    quoted = [",".join(f'"{r[k]}"' if "," in str(r[k]) else str(r[k]) for k in columns) for r in rows]
    artifacts.write_text(path, "\n".join([",".join(columns), *quoted]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of the comparisons row by row")
    parser.add_argument("--settings", nargs="+", default=("W2A4", "W3A4", "W2A6"), choices=SETTINGS)
    parser.add_argument(
        "--roundings", nargs="+", default=ROUNDINGS, choices=ROUNDINGS, help="of what the integer program expects"
    )
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument(
        "--results", type=Path, default=HERE, help="folder of residual.csv, residual_rows.csv and residual_expected.csv"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/mpq_dm"))
    args = parser.parse_args()
    models = {name: Model(name, Schedule(), args.work) for name in args.models}
    if "rows" in args.part:
        path = args.results / "residual_rows.csv"
        rows = read(path)
        for name, model in models.items():
            for kind in args.kinds:
                if (name, kind) not in {(r["model"], r["kind"]) for r in rows}:
                    rows += row_table(model, kind)
                    write(path, ROW_COLUMNS, rows)
    if "expected" in args.part:
        path = args.results / "residual_expected.csv"
        rows = read(path)
        for rounding, option in [(r, o) for r in args.roundings for o in ("branch", "tied", "choice")]:
            for name, model in models.items():
                for setting in args.settings:
                    if [name, setting, rounding, option] not in [[r[k] for k in EXPECTED_COLUMNS[:4]] for r in rows]:
                        rows.append(expected(model, setting, rounding, option))
                        write(path, EXPECTED_COLUMNS, rows)
    if "samples" not in args.part:
        return
    path = args.results / "residual.csv"
    rows = read(path)
    done = {(r["model"], r["setting"], r["variant"]) for r in rows}
    shared = {name: Samples(model) for name, model in models.items()}
    for setting in args.settings:
        for name in args.models:
            for variant in args.variants:
                if (name, setting, variant) not in done:
                    rows.append(shared[name].row(setting, variant))
                    write(path, COLUMNS, rows)
                    print(", ".join(f"{k} {rows[-1][k]}" for k in COLUMNS), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
