"""From a point of the search space to bit maps: the integer program with its losses built as the point says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import PairwiseTerms
from mpqsearch.artifacts import digest_of
from mpqsearch.core import (
    FULL_PRECISION,
    BitMap,
    Budget,
    LayerTable,
    Policy,
    QuantFormat,
    SensitivityProfile,
    average_bits,
    size_bits,
    size_bytes,
)
from mpqsearch.errors import ConfigError
from mpqsearch.methods import LOSSES, Allocation, MethodSpec, allocate, channel_losses, predicted_loss
from mpqsearch.search.space import BASE, Theta, is_default, value_of

Floats = NDArray[np.float64]

Remeasure = Callable[[SensitivityProfile, BitMap], SensitivityProfile]
"""Gains measured again with a map in place: see `mpqsearch.profile.remeasure`."""

Alphas = Callable[[BitMap], BitMap]
"""A map with the alpha of smoothing that suits each layer: see `mpqsearch.profile.choose_alphas`."""

Priced = Callable[[MethodSpec], SensitivityProfile]
"""The profile with the errors that a method's rounding leaves."""

_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One map to be measured, with what is known before: the budget, the predicted loss under the method's own loss,
    and the solver's word."""

    bit_map: BitMap
    budget: Budget
    bias_correction: bool
    predicted: float
    size_bytes: int
    average_bits: float
    status: str = "none"
    gap: float = 0.0

    @cached_property
    def digest(self) -> str:
        """What the measured values depend on, besides model and samples: equal maps are measured once, whatever found
        them."""
        return digest_of([self.bit_map.digest, self.bias_correction])


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The integer program around one method. ``losses_of`` and ``candidate`` are pure functions of a point of the
    space.

    ``correction`` ``[L, W]`` multiplies the layer totals first (what `mpqsearch.search.refit` learned),
    ``interactions`` are pairwise terms over the searched layers at the searched widths, ``remeasure`` measures
    sensitivities again at a map, and ``operating_loss`` names the loss that they are in. ``alphas`` chooses those of
    smoothing, ``priced`` gives the profile as the rounding of a method prices it (None: as nearest rounding does).
    ``act_bits`` is the activation width of all searched layers (16: that of the method); the other layers' are the
    policy's.
    """

    table: LayerTable
    profile: SensitivityProfile
    policy: Policy
    format: QuantFormat
    method: MethodSpec
    correction: Floats | None = None
    interactions: PairwiseTerms | None = None
    remeasure: Remeasure | None = None
    alphas: Alphas | None = None
    priced: Priced | None = None
    act_bits: int = FULL_PRECISION
    operating_loss: str = "operating"
    _remeasured: dict[str, SensitivityProfile] = field(default_factory=dict, repr=False, compare=False)
    _alphas: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    # Not an argument: `dataclasses.replace` with another correction starts anew.
    _last_losses: list[tuple[Any, SensitivityProfile, Floats]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.method.allocator not in ("ilp-layer", "ilp-channel"):
            raise ConfigError(
                "search.method must name a method with an integer program (ilp-layer or ilp-channel); "
                f"{self.method.name!r} is "
                f"{self.method.allocator!r}"
            )

    def method_of(self, theta: Theta) -> MethodSpec:
        """The method with granularity, scheme, smoothing and bias correction as the point says."""
        changes: dict[str, Any] = {}
        if value_of(theta, "granularity") != BASE:
            changes["allocator"] = f"ilp-{value_of(theta, 'granularity')}"
        if value_of(theta, "smooth") != BASE:
            changes["smooth"] = value_of(theta, "smooth") != 0
        if value_of(theta, "scheme") != BASE:
            changes["scheme"] = value_of(theta, "scheme")
        scheme = changes.get("scheme", self.method.scheme)
        if changes.get("smooth", self.method.smooth) and f"{scheme}+smooth" not in self.profile.variants:
            changes["scheme"] = "asymmetric"
        if value_of(theta, "bias_correction") != BASE:
            changes["bias_correction"] = value_of(theta, "bias_correction") == "on"
        if value_of(theta, "act_timesteps") != BASE:
            changes["act_timesteps"] = value_of(theta, "act_timesteps") == "on"
        if value_of(theta, "rounding") != BASE:
            changes["rounding"] = value_of(theta, "rounding")
        quantized = [b for b in self._role_widths(theta).values() if b != FULL_PRECISION]
        if quantized and max(quantized) != self.method.act_bits:
            changes["act_bits"] = max(quantized)  # the budget pays for the scales of the widest
        return replace(self.method, **changes) if changes else self.method

    def policy_of(self, theta: Theta) -> Policy:
        """The policy with the allowed widths of the point."""
        widths = self.policy.widths
        if value_of(theta, "widths") != BASE:
            widths = _read_widths(str(value_of(theta, "widths")))
        widths = tuple(b for b in widths if b >= value_of(theta, "min_bits"))
        if widths == self.policy.widths:
            return self.policy
        if not widths or set(widths) - set(self.policy.widths):
            raise ConfigError(f"search.space: the widths {widths} are not among the policy's {self.policy.widths}")
        return replace(self.policy, widths=widths)

    def format_of(self, theta: Theta) -> QuantFormat:
        """The range search of the measured maps."""
        changes: dict[str, Any] = {}
        if value_of(theta, "criterion") != BASE:
            changes["criterion"] = value_of(theta, "criterion")
        if value_of(theta, "range_p"):
            changes["p"] = value_of(theta, "range_p")
        return replace(self.format, **changes) if changes else self.format

    def losses_of(self, theta: Theta, method: MethodSpec, profile: SensitivityProfile | None = None) -> Floats:
        """Losses ``[C, W]`` of every channel at every width. The method's own table, untouched, where the point changes
        nothing."""
        profile = self.profile_for(method) if profile is None else profile

        def table_of(loss: str) -> Floats:
            # Other losses than the method's own may know nearest rounding alone.
            source = profile if loss == method.loss or not profile.calibration.get("gptq") else self.profile
            return channel_losses(source, self.table, method.variant, loss, bias_correction=method.bias_correction)

        own = table_of(method.loss)
        if self.correction is None and is_default(theta, _shapes_losses):
            return own
        totals = profile.layer_sum(own)  # [L, W]
        new = totals if self.correction is None else totals * self.correction
        mixed = {k: float(value_of(theta, f"mix_{k}")) for k in LOSSES if k != method.loss}
        if any(mixed.values()):
            logs = (1 - sum(mixed.values())) * _log(new)
            for loss, weight in mixed.items():
                if weight:
                    logs = logs + weight * _log(_in_scale_of(profile.layer_sum(table_of(loss)), new))
            new = np.where(new > 0, np.exp(logs), 0.0)
        exponent = float(value_of(theta, "exponent"))
        if exponent != 1.0:
            reference = _middle(new)
            new = reference * (new / reference) ** exponent
        new = new * self._multipliers(theta, profile)
        share = np.divide(own, np.repeat(totals, profile.channels, axis=0), out=np.zeros_like(own), where=own > 0)
        share = self._shares(theta, profile, share)
        losses: Floats = share * np.repeat(new, profile.channels, axis=0)
        return losses

    def profile_for(self, method: MethodSpec) -> SensitivityProfile:
        """The profile that prices a method: with GPTQ rounding, the errors that it leaves."""
        return self.profile if self.priced is None or method.rounding == "nearest" else self.priced(method)

    def _multipliers(self, theta: Theta, profile: SensitivityProfile) -> Floats:
        """Factors ``[L, W]``: roles, depth, few bits, timesteps."""
        n, widths = len(profile.names), np.array(profile.widths, dtype=np.float64)
        layers = np.array([float(value_of(theta, f"role_{self.table[name].role}")) for name in profile.names])
        position = np.linspace(0.0, 1.0, n) if n > 1 else np.full(1, 0.5)
        layers = layers * 2.0 ** (float(value_of(theta, "depth")) * (position - 0.5))
        tilt = float(value_of(theta, "timestep"))
        if tilt:
            layers = layers * timestep_factor(profile, tilt)
        bits: Floats = 2.0 ** (float(value_of(theta, "low_bits")) * (4.0 - widths))
        return layers[:, None] * bits

    def _shares(self, theta: Theta, profile: SensitivityProfile, share: Floats) -> Floats:
        """The share ``[C, W]`` of every channel in its layer, reshaped; kurtosis then scales channels across the whole
        model."""
        exponent = float(value_of(theta, "row_exponent"))
        if exponent != 1.0:
            raised = np.where(share > 0, share, 0.0) ** exponent
            sums = np.repeat(profile.layer_sum(raised), profile.channels, axis=0)
            share = np.divide(raised, sums, out=np.zeros_like(raised), where=sums > 0)
        power = float(value_of(theta, "kurtosis"))
        if power:
            heavy = profile.need("kurtosis_smoothed", "the search by kurtosis").astype(np.float64)
            share = share * (np.maximum(heavy, 0.1) / 3.0)[:, None] ** power
        return share

    def candidate(self, theta: Theta, budget: Budget) -> Candidate:
        """Solve at one budget. Raises `InfeasibleBudgetError` when the widths of the point do not fit it."""
        method, policy, fmt = self.method_of(theta), self.policy_of(theta), self.format_of(theta)
        made = self._solve(theta, budget, method, policy, fmt, self.profile_for(method))
        for _ in range(int(value_of(theta, "rounds"))):
            if self.remeasure is None:
                raise ConfigError(
                    "search.space.rounds needs the model at hand to measure gains again; this surrogate has none"
                )
            there = self._at(made.bit_map)
            made = self._solve(theta, budget, replace(method, loss=self.operating_loss), policy, fmt, there)
        return self.finished(replace(made, budget=budget), theta)

    def room(self, method: MethodSpec, budget: Budget) -> Budget:
        """The budget, in bytes where scales by timestep would raise a limit that is that of uniform maps: every point
        has the plain one's size."""
        if budget.quantity != "uniform_bits" or method.act_timesteps == self.method.act_timesteps:
            return budget
        return Budget(quantity="bytes", limit=self.limit_bits(budget) // 8)

    def limit_bits(self, budget: Budget) -> int:
        """Bits that a map of the whole model may take at a budget of size, with the method's own activations."""
        steps = int(self.profile.calibration.get("sampler", {}).get("steps", 1)) if self.method.act_timesteps else 1
        quantized = [b for b in self._role_widths({}).values() if b != FULL_PRECISION]
        return budget.limit_bits(
            self.table, self.policy, act_bits=max(quantized, default=FULL_PRECISION), activation_steps=steps
        )

    def _role_widths(self, theta: Theta) -> dict[str, int]:
        """Activation width of each role of the model's searched layers."""
        own = self.act_bits if self.act_bits != FULL_PRECISION else self.method.act_bits
        key = ("searched roles", self.policy.key)
        if key not in self.table.memo:
            self.table.memo[key] = sorted({la.role for la in self.table if self.policy.fixed_width(la) is None})
        roles = self.table.memo[key]
        chosen = {role: value_of(theta, f"act_{role}") for role in roles}
        return {role: own if value == BASE else int(value) for role, value in chosen.items()}

    def finished(self, made: Allocation, theta: Theta | None = None) -> Candidate:
        """An allocation as something to measure, with the activation widths of the point."""
        result, bit_map = made.result, made.bit_map
        widths = self._role_widths(theta or {})
        if bit_map.activations and len(set(widths.values())) > 1:
            searched = {la.name: widths[la.role] for la in self.table if self.policy.fixed_width(la) is None}
            every = {**bit_map.activations, **searched}
            bit_map = replace(bit_map, activations={n: b for n, b in every.items() if b != FULL_PRECISION})
        if value_of(theta or {}, "smooth") == "layers" and bit_map.activations:
            bit_map = self._with_alphas(bit_map, made.budget)
        stored = made.size_bits if bit_map is made.bit_map else size_bits(self.table, bit_map)
        return Candidate(
            bit_map=bit_map,
            budget=made.budget,
            bias_correction=made.method.bias_correction,
            predicted=made.predicted_loss,
            size_bytes=-(-stored // 8),
            average_bits=stored / self.table.n_parameters,
            status="none" if result is None else result.status,
            gap=0.0 if result is None or not np.isfinite(result.gap) else float(result.gap),
        )

    def _with_alphas(self, bit_map: BitMap, budget: Budget) -> BitMap:
        """Alphas by layer, chosen once a budget: they depend on the widths of the weights far less than on the
        inputs."""
        if self.alphas is None:
            raise ConfigError(
                "search.space.smooth = 'layers' needs the model at hand to choose alphas; this surrogate has none"
            )
        key = (budget.label(), bit_map.format, tuple(sorted(bit_map.activations.items())), bit_map.activation_steps)
        if key not in self._alphas:
            self._alphas[key] = self.alphas(bit_map).formats
        return replace(bit_map, formats={**bit_map.formats, **self._alphas[key]})

    def measured_map(
        self, bit_map: BitMap, budget: Budget, *, bias_correction: bool, status: str = "none"
    ) -> Candidate:
        """A map from elsewhere as something to measure."""
        return Candidate(
            bit_map=bit_map,
            budget=budget,
            bias_correction=bias_correction,
            predicted=predicted_loss(
                self.table,
                self.profile_for(
                    replace(
                        self.method,
                        scheme=bit_map.format.scheme,
                        smooth=bit_map.format.smooth,
                        rounding=bit_map.format.rounding,
                    )
                ),
                bit_map,
                bias_correction=bias_correction,
            ),
            size_bytes=size_bytes(self.table, bit_map),
            average_bits=average_bits(self.table, bit_map),
            status=status,
        )

    def _solve(
        self,
        theta: Theta,
        budget: Budget,
        method: MethodSpec,
        policy: Policy,
        fmt: QuantFormat,
        profile: SensitivityProfile,
    ) -> Allocation:
        losses = self._losses_at(theta, method, profile)
        return allocate(
            method,
            self.room(method, budget),
            self.table,
            self.profile_for(method),
            policy,
            fmt,
            losses=losses,
            pairs=self._pairs(theta, method, policy, losses),
        )

    def _losses_at(self, theta: Theta, method: MethodSpec, profile: SensitivityProfile) -> Floats:
        """`losses_of`, kept for the next budget of the same point."""
        key = (frozenset(theta.items()), method)
        for known, at, losses in self._last_losses:
            if known == key and at is profile:
                return losses
        losses = self.losses_of(theta, method, profile)
        losses.setflags(write=False)
        self._last_losses[:] = [(key, profile, losses)]
        return losses

    def _pairs(self, theta: Theta, method: MethodSpec, policy: Policy, losses: Floats) -> PairwiseTerms | None:
        alpha = float(value_of(theta, "pairwise"))
        if not alpha or method.allocator != "ilp-layer":
            return None
        if self.interactions is None:
            raise ConfigError(
                "search.space.pairwise needs measured interactions between layers; this surrogate has none"
            )
        # Terms are measured in units of the method's own totals; the point may have rescaled those.
        columns = [sorted(self.policy.widths).index(b) for b in sorted(policy.widths)]
        value = self.interactions.value[:, columns][:, :, columns]
        own = self.losses_of({}, method)
        scale = (
            float(np.median(losses[losses > 0]) / np.median(own[own > 0]))
            if (losses > 0).any() and (own > 0).any()
            else 1.0
        )
        return PairwiseTerms(
            first=self.interactions.first, second=self.interactions.second, value=alpha * scale * value
        )

    def _at(self, bit_map: BitMap) -> SensitivityProfile:
        if bit_map.digest not in self._remeasured:
            assert self.remeasure is not None
            self._remeasured[bit_map.digest] = self.remeasure(self.profile, bit_map)
        return self._remeasured[bit_map.digest]


def timestep_factor(profile: SensitivityProfile, tilt: float) -> Floats:
    """Factor ``[L]`` of a layer's loss when timestep buckets are weighted by ``exp(tilt * (bucket - 1/2))``, bucket 0
    clean samples, 1 noise.

    Raises `ConfigError` when the profile has no gains by timestep.
    """
    gains = profile.arrays.get("step_sensitivity")
    if gains is None:
        raise ConfigError(
            "search.space.timestep needs gains by timestep in the profile (step_sensitivity); profile again"
        )
    by_step = profile.layer_sum(gains.astype(np.float64))
    buckets = np.linspace(0.0, 1.0, by_step.shape[1])
    weights = np.exp(tilt * (buckets - 0.5))
    weights /= weights.mean()
    plain = by_step.mean(axis=1)
    tilted = (by_step * weights).mean(axis=1)
    factor: Floats = np.divide(tilted, plain, out=np.ones_like(plain), where=plain > 0)
    return factor


def _shapes_losses(name: str) -> bool:
    """True of parameters that change the loss table itself."""
    return name in ("exponent", "row_exponent", "low_bits", "kurtosis", "depth", "timestep") or name.startswith(
        ("mix_", "role_")
    )


def _log(totals: Floats) -> Floats:
    logs: Floats = np.log(np.maximum(totals, _TINY))
    return logs


def _middle(totals: Floats) -> float:
    """Geometric mean of the positive totals."""
    positive = totals[totals > 0]
    return float(np.exp(np.log(positive).mean())) if positive.size else 1.0


def _in_scale_of(other: Floats, own: Floats) -> Floats:
    """``other`` in the units of ``own`` (equal geometric means); where ``other`` is zero, ``own`` stands."""
    both = (other > 0) & (own > 0)
    if not both.any():
        return own
    scale = np.exp((np.log(own[both]) - np.log(other[both])).mean())
    scaled: Floats = np.where(both, other * scale, own)
    return scaled


def _read_widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"search.space.widths is a list such as '2,3,4,6,8', got {text!r}") from error
    return tuple(sorted(widths))
