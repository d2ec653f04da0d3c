"""From a point of the search space to a bit map: the integer program with its losses built as the point says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.artifacts import digest_of
from mpqsearch.core import (
    BitMap,
    Budget,
    LayerTable,
    Policy,
    QuantFormat,
    SensitivityProfile,
    average_bits,
)
from mpqsearch.errors import ConfigError
from mpqsearch.methods import Allocation, MethodSpec, Programs, channel_losses
from mpqsearch.search.space import BASE, PARAMETERS, Theta, value_of

Floats = NDArray[np.float64]

Priced = Callable[[MethodSpec], SensitivityProfile]
"""The profile with the errors that a method's rounding leaves."""

SHAPING = ("exponent", "low_bits", "kurtosis", "depth")
"""Parameters that change the loss table, with those of roles."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A bit map to be measured. ``predicted`` is its loss under the method's own loss; the sizes count everything.

    ``target`` and ``choices``: the export target whose formats the layers take; empty for our own quantizer.
    """

    bit_map: BitMap
    budget: Budget
    bias_correction: bool
    predicted: float
    size_bytes: int
    average_bits: float
    target: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, table: LayerTable, solved: Allocation, budget: Budget) -> Candidate:
        """A solved map at the budget that it was asked for."""
        return cls(
            bit_map=solved.bit_map,
            budget=budget,
            bias_correction=solved.method.bias_correction,
            predicted=solved.predicted_loss,
            size_bytes=solved.size_bytes,
            average_bits=average_bits(table, solved.bit_map),
        )

    @property
    def digest(self) -> str:
        """Digest of all that measured values depend on besides model and samples: equal maps are measured once."""
        own = [self.target, dict(self.choices)] if self.target else []
        return digest_of([self.bit_map.digest, self.bias_correction, *own])


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The integer program around one method. ``candidate`` is a pure function of a point of the space and a budget.

    ``priced`` gives the profile as the rounding of a method prices it; None: as nearest rounding does.
    """

    table: LayerTable
    profile: SensitivityProfile
    policy: Policy
    format: QuantFormat
    method: MethodSpec
    priced: Priced | None = None

    def __post_init__(self) -> None:
        if self.method.allocator not in ("ilp-layer", "ilp-channel"):
            raise ConfigError(
                "search.method must name a method with an integer program (ilp-layer or ilp-channel); "
                f"{self.method.name!r} is {self.method.allocator!r}"
            )

    def candidate(self, theta: Theta, budget: Budget) -> Candidate:
        """Solve at one budget. Raises `InfeasibleBudgetError` when nothing fits."""
        method, policy = self.method_of(theta), self.policy_of(theta)
        losses = self.losses_of(theta, method) if _is_shaped(theta) else None
        solved = self.programs(method, policy).allocate(method, self.room(budget, method, policy), losses=losses)
        return Candidate.of(self.table, solved, budget)

    def uniform(self, budget: Budget) -> Candidate:
        """The widest uniform map that fits the budget: what the maps of a search are held against."""
        method = replace(self.method, name="uniform", allocator="uniform", act_choices=())
        return Candidate.of(self.table, self.programs(method).allocate(method, budget), budget)

    def programs(self, method: MethodSpec, policy: Policy | None = None) -> Programs:
        """The programs with the profile that prices a method, under a policy (None: the search's own)."""
        return Programs(
            table=self.table, profile=self.profile_for(method), policy=policy or self.policy, format=self.format
        )

    def method_of(self, theta: Theta) -> MethodSpec:
        """The method with granularity, loss, quantizer and scales as the point says."""
        chosen = {
            n: value_of(theta, n) for n in ("granularity", "loss", "scheme", "rounding", "shrinkage", "act_scales")
        }
        switches = {n: value_of(theta, n) for n in ("bias_correction", "smooth")}
        changes: dict[str, Any] = {n: v for n, v in chosen.items() if v != BASE}
        changes |= {n: v == "on" for n, v in switches.items() if v != BASE}
        if "granularity" in changes:
            changes["allocator"] = f"ilp-{changes.pop('granularity')}"
        method = replace(self.method, **changes)
        # Of the schemes, some have no smoothed errors in the profile.
        if method.smooth and method.format_name not in self.profile.formats:
            method = replace(method, scheme="asymmetric")
        return method

    def policy_of(self, theta: Theta) -> Policy:
        """The policy with the width of first and last layer as the point says."""
        bits = value_of(theta, "end_bits")
        if bits == BASE:
            return self.policy
        return replace(self.policy, roles={**self.policy.roles, "first": int(bits), "last": int(bits)})

    def room(self, budget: Budget, method: MethodSpec, policy: Policy) -> Budget:
        """The budget, in bytes where policy or scales would move a limit that is counted from uniform maps: every
        point of the space has the plain program's size."""
        plain = policy == self.policy and method.act_scales == self.method.act_scales
        if budget.quantity != "uniform_bits" or plain:
            return budget
        return Budget(quantity="bytes", limit=self.programs(self.method).limit(budget, self.method) // 8)

    def profile_for(self, method: MethodSpec) -> SensitivityProfile:
        """The profile that prices a method: with GPTQ rounding, the errors that it leaves."""
        return self.profile if self.priced is None or method.rounding == "nearest" else self.priced(method)

    def losses_of(self, theta: Theta, method: MethodSpec) -> Floats:
        """Losses ``[C, W]`` of every channel at every width; the method's own where the point changes nothing."""
        profile = self.profile_for(method)
        losses = channel_losses(
            profile,
            self.table,
            method.format_name,
            method.loss,
            bias_correction=method.bias_correction,
            shrinkage=method.shrinkage,
            rounding=method.rounding,
        )
        if not _is_shaped(theta):
            return losses
        totals = profile.layer_sum(losses)  # [L, W]
        shares = _divided(losses, np.repeat(totals, profile.channels, axis=0))
        middle = _geometric_mean(totals)
        totals = middle * (totals / middle) ** float(value_of(theta, "exponent")) * self._factors(theta, profile)
        shaped: Floats = self._shares(theta, profile, shares) * np.repeat(totals, profile.channels, axis=0)
        return shaped

    def _factors(self, theta: Theta, profile: SensitivityProfile) -> Floats:
        """Factors ``[L, W]`` of roles, depth and few bits."""
        roles = np.array([float(value_of(theta, f"role_{self.table[n].role}")) for n in profile.names])
        position = np.linspace(0.0, 1.0, len(roles)) if len(roles) > 1 else np.full(1, 0.5)
        layers = roles * 2.0 ** (float(value_of(theta, "depth")) * (position - 0.5))
        widths = np.array(profile.widths, dtype=np.float64)
        factors: Floats = layers[:, None] * 2.0 ** (float(value_of(theta, "low_bits")) * (4.0 - widths))
        return factors

    def _shares(self, theta: Theta, profile: SensitivityProfile, shares: Floats) -> Floats:
        """Shares ``[C, W]`` of the channels in their layer, times a power of their kurtosis."""
        power = float(value_of(theta, "kurtosis"))
        if power:
            kurtosis = profile.need("kurtosis_smoothed", "the search by kurtosis").astype(np.float64)
            shares = shares * (np.maximum(kurtosis, 0.1) / 3.0)[:, None] ** power
        return shares


def _is_shaped(theta: Theta) -> bool:
    """Whether a point changes the loss table itself."""
    shaping = (n for n in theta if n in SHAPING or n.startswith("role_"))
    return any(value_of(theta, n) != PARAMETERS[n].default for n in shaping)


def _divided(a: Floats, b: Floats) -> Floats:
    """``a / b``, 0 where ``b`` is not positive."""
    quotient: Floats = np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    return quotient


def _geometric_mean(totals: Floats) -> float:
    """Of the positive totals; 1 without any."""
    positive = totals[totals > 0]
    return float(np.exp(np.log(positive).mean())) if positive.size else 1.0
