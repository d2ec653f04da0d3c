"""Measured descent: the closing stage of a search, channel by channel at the map that is there.

A point of the search space moves all channels by a dozen numbers. Here every channel may move by itself: one backward
pass through the sampler gives the slope of the samples' error for every channel at every width
(`mpqsearch.profile.final_probes` along the residual), with all present errors in it, and the integer program is solved
for slope plus curvature. The slope holds for small steps only, so a round tries steps of several lengths on common
seeds, and takes the best one only when it is better by more than a standard error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import AllocationProblem, solve
from mpqsearch.core import FULL_PRECISION
from mpqsearch.errors import ConfigError
from mpqsearch.methods import MethodSpec, Program, program_of
from mpqsearch.search.ladder import Ladder, Slopes
from mpqsearch.search.surrogate import Candidate, Floats, Surrogate

GAP = 1e-3
"""Gap to which a step is solved: slopes are far less certain than that."""

HALVINGS = 14
"""Halvings of the logarithm of the damping, over eight decades: to within a thousandth."""

DECADES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSpec:
    """How a map is refined, at each budget.

    rounds
        Slopes are measured so often at most; two rounds in a row without a better map end it.
    slope_samples, samples
        Fresh seeds of each round: for the slopes, and for choosing among the steps. ``batch`` seeds share a backward
        pass.
    shares
        Lengths of the steps, as the share of the present error that the slope promises to take away. Interactions that
        the curvature of single channels does not hold make the right one smaller than 1.
    decay
        Factor by which the steps of every further round are shorter: the first ones take away what all samples agree
        on.
    changed
        Share of the channels that a step may change at most.
    """

    rounds: int = 3
    slope_samples: int = 16
    samples: int = 16
    batch: int = 4
    shares: tuple[float, ...] = (0.2, 0.5)
    decay: float = 0.5
    changed: float = 0.2

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.batch < 1 or self.slope_samples < 2 * self.batch or self.samples < 2:
            raise ConfigError(
                "a refinement needs rounds >= 0, batch >= 1, slope_samples of at least two batches (their spread says "
                "what is noise) and samples >= "
                f"2, got {self.rounds}, {self.batch}, {self.slope_samples} and {self.samples}"
            )
        if (
            not self.shares
            or not all(0 < s <= 2 for s in self.shares)
            or not (0 < self.changed <= 1 and 0 < self.decay <= 1)
        ):
            raise ConfigError(
                f"a refinement needs shares in (0, 2], changed and decay in (0, 1], got {self.shares}, {self.changed} "
                f"and {self.decay}"
            )

    @property
    def seeds(self) -> int:
        """Seeds that all rounds take together."""
        return self.rounds * (self.slope_samples + self.samples)


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What became of a map: ``candidate`` is ``start`` itself where nothing was better. ``forwards`` is what it cost;
    ``rounds`` are plain rows."""

    start: Candidate
    candidate: Candidate
    forwards: int
    rounds: tuple[dict[str, Any], ...]

    @property
    def moved(self) -> bool:
        """True when a better map was found."""
        return self.candidate.digest != self.start.digest


def refine(surrogate: Surrogate, ladder: Ladder, start: Candidate, spec: RefineSpec, *, first_seed: int) -> Refinement:
    """Refine one map within its budget, on the seeds ``first_seed .. first_seed + spec.seeds - 1``.

    A round costs ``4 slope_samples + (steps + 1) samples`` final samples in forward passes, a backward pass counted as
    two.

    Raises:
        ConfigError: The budget is one of BOPs, the map keeps searched layers at full precision, or the seeds are among
        those of the ladder.
    """
    seeds = range(first_seed, first_seed + spec.seeds)
    if set(seeds) & {*ladder.seeds, *ladder.final}:
        raise ConfigError(
            f"the seeds of a refinement ({seeds}) must not be among the search or final seeds: they would choose twice"
        )
    asked, now, misses = ladder.asked, start, 0
    gathered: list[Slopes] = []
    rows: list[dict[str, Any]] = []
    for number in range(spec.rounds):
        part = seeds[number * (spec.slope_samples + spec.samples) :]
        own, judged = (
            tuple(part[: spec.slope_samples]),
            tuple(part[spec.slope_samples : spec.slope_samples + spec.samples]),
        )
        gathered.append(ladder.slopes(now, own, spec.batch))
        proposed = steps(
            surrogate, now, gathered, replace(spec, shares=tuple(s * spec.decay**number for s in spec.shares))
        )
        before = np.array(ladder.errors_on(now, judged))
        best = now
        row: dict[str, Any] = {"round": number, "error": float(before.mean()), "tried": [], "accepted": False}
        for share, candidate, changed in proposed:
            change = np.array(ladder.errors_on(candidate, judged)) - before
            noise = float(change.std(ddof=1) / np.sqrt(len(change)))
            row["tried"].append(
                {"share": share, "changed": changed, "change": float(change.mean()), "std_error": noise}
            )
            if change.mean() < -noise and change.mean() < row.get("change", 0.0):
                best, row["change"], row["accepted"] = candidate, float(change.mean()), True
        rows.append(row)
        if row["accepted"]:
            now, gathered, misses = best, [], 0
        else:  # the map stays, so the next round's slopes add to these
            misses += 1
            if misses == 2:
                break
    return Refinement(start=start, candidate=now, forwards=ladder.asked - asked, rounds=tuple(rows))


def steps(
    surrogate: Surrogate, now: Candidate, measured: Sequence[Slopes], spec: RefineSpec
) -> list[tuple[float, Candidate, float]]:
    """Candidates ``(share, map, share of channels changed)`` from the slopes at a map, one for each length of step;
    equal maps once.

    Each is the solution of the integer program for ``2 slope + damping * curvature``, with the damping at which the
    slope promises that share of the present error. Slopes are first shrunk by the noise in them, or a step would go
    where noise is largest; the curvature of a change is taken as that of two independent errors, the present one and
    the new one, under the method's own losses.
    """
    table, profile = surrogate.table, surrogate.profile
    method = _method_of(surrogate, now)
    program = program_of(method, surrogate.room(method, now.budget), table, profile, surrogate.policy, surrogate.format)
    rows = np.concatenate([np.arange(*profile.rows(n).indices(sum(profile.channels))[:2]) for n in program.layers])
    columns = [profile.widths.index(b) for b in program.widths]
    present = _present(program, now)
    slope = 2 * _shrunk(profile, np.concatenate([m.rows for m in measured]))[rows][:, columns]
    losses = surrogate.losses_of({}, method)[rows][:, columns]
    each = np.arange(len(present))
    curvature = losses + losses[each, present][:, None]
    curvature[each, present] = 0.0
    error = float(np.mean([m.error for m in measured]))
    unit = float(np.abs(slope).mean() / max(float(curvature.mean()), np.finfo(np.float64).tiny))
    found: list[tuple[float, Candidate, float]] = []
    for share in spec.shares:
        low, high = -DECADES, DECADES
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            choice = _solved(program.problem, slope + unit * 10**middle * curvature)
            too_far = -slope[each, choice].sum() > share * error or (choice != present).mean() > spec.changed
            low, high = (middle, high) if too_far else (low, middle)
        choice = _solved(program.problem, slope + unit * 10**high * curvature)
        bit_map = replace(now.bit_map, weights={**now.bit_map.weights, **program.weights(choice)})
        candidate = surrogate.measured_map(bit_map, now.budget, bias_correction=now.bias_correction, status="refined")
        if candidate.digest not in {now.digest, *(c.digest for _, c, _ in found)}:
            found.append((share, candidate, float((choice != present).mean())))
    return found


def _method_of(surrogate: Surrogate, now: Candidate) -> MethodSpec:
    """The method by channel that makes maps like this one: its scheme, smoothing, rounding, activations and bias
    correction."""
    fmt, bit_map = now.bit_map.format, now.bit_map
    return replace(
        surrogate.method,
        allocator="ilp-channel",
        scheme=fmt.scheme,
        smooth=fmt.smooth,
        rounding=fmt.rounding,
        bias_correction=now.bias_correction,
        act_bits=max(
            (b for n, b in bit_map.activations.items() if surrogate.policy.fixed_width(surrogate.table[n]) is None),
            default=FULL_PRECISION,
        ),
        act_timesteps=bit_map.activation_steps > 1,
    )


def _present(program: Program, now: Candidate) -> NDArray[np.int32]:
    """Choice ``[n]`` of every channel in the map."""
    for name in program.layers:
        if set(np.unique(now.bit_map.weights[name]).tolist()) - set(program.widths):
            raise ConfigError(
                f"refinement: the map gives {name!r} a width outside {program.widths}, which are searched"
            )
    return program.choice(now.bit_map)


def _shrunk(profile: Any, batches: Floats) -> Floats:
    """Mean slope ``[C, W]`` over batches ``[P, C, W]``, each entry times ``m**2 / (m**2 + s**2)`` of its mean and
    standard error.

    Few batches tell little of one entry's noise, so its square is averaged with that of its layer, in proportion to the
    layer's mean squares.
    """
    mean = batches.mean(0)
    power, noise = np.square(mean), batches.var(0, ddof=1) / len(batches)
    above, below = (profile.layer_sum(a).sum(1) for a in (noise, power))
    of_layer = np.divide(above, below, out=np.ones_like(below), where=below > 0)
    row_power = power.mean(1, keepdims=True)
    pooled = (noise + np.repeat(of_layer, profile.channels)[:, None] * row_power) / 2
    shrunk: Floats = mean * np.divide(power, power + pooled, out=np.zeros_like(power), where=power > 0)
    return shrunk


def _solved(problem: AllocationProblem, score: Floats) -> NDArray[np.int32]:
    """The program with another table of losses; a constant a channel makes them positive and changes nothing."""
    shifted = np.asfortranarray(score - score.min(axis=1, keepdims=True))
    return solve(replace(problem, loss=shifted), gap_tolerance=GAP, time_limit_s=10.0).choice
