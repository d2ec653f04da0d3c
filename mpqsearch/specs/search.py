"""The outer search around one method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpqsearch.core import Budget
from mpqsearch.errors import ConfigError, UnknownNameError

SAMPLERS = ("tpe", "gp", "nsga2", "cmaes", "random")
PRUNERS = ("wilcoxon", "median", "none")

ERRORS = ("features", "latents")
"""What is measured of a final sample: squared distance of the extractor's features of its picture, or mean squared
error of its latents (of pixel models: of the sample itself), for which nothing is decoded; to the full-precision sample
of the same noise. The mean of the first bounds from above the squared Wasserstein distance of the features'
distributions, of which the Fréchet distance is the Gaussian form."""

DEFAULT_SPACE: Mapping[str, Any] = {
    "exponent": [0.5, 2.0],
    "shrinkage": ["base", 0.0, 0.3],
    "low_bits": [-1.0, 2.0],
    "kurtosis": [-1.0, 1.0],
    "depth": [-3.0, 3.0],
    "role_conv": [0.2, 5.0],
    "role_shortcut": [0.2, 5.0],
    "role_attention": [0.2, 5.0],
    "role_time": [0.2, 5.0],
    "role_resample": [0.2, 5.0],
    "granularity": ["channel", "layer"],
    "scheme": ["base", "asymmetric"],
    "rounding": ["base", "nearest"],
    "bias_correction": ["base", "off"],
}
"""The space of a search that declares none: how losses are built, and the quantizer, which on a model that nobody has
seen before can matter more than all widths."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """The outer search around one method.

    method
        The method whose integer program is searched around. Empty: the last one with an integer program. Example:
        ``"measured"``.
    trials [trials]
        Maps that are tried; 0: no search.
    sampler
        Of Optuna: ``tpe``, ``gp``, ``nsga2``, ``cmaes`` or ``random``.
    pruner
        What ends bad trials early: ``wilcoxon``, ``median`` or ``none``.
    seed
        Of the sampler.
    budgets
        The sizes that are searched at; empty: those of ``[allocate]``. Example: ``["uniform:3"]``.
    samples [samples]
        Samples that score a trial. Their seeds are not those of ``[evaluate]``, on which the chosen maps are judged.
    first_seed
        Seed of the first of them.
    chunk [samples]
        So many are drawn before the pruner is asked.
    error
        What is minimised: ``features`` (squared distance of the extractor's features of a sample to those of the
        full-precision one) or ``latents``.
    top_k [maps]
        Maps of each budget that run again on fresh seeds, which choose the map that is returned.
    final_samples [samples]
        Further seeds for these; 0: the search seeds choose. Only what beats the plain program's map there by more than
        a standard error takes its place.
    study
        Name of the study in its storage. Empty: that of the run folder, with the folder's identity. Example:
        ``"mine"``.
    space
        What may change, and within which range: a list makes a parameter active, one value freezes it
        (`mpqsearch.search.space`, and the guide of the search).
    """

    method: str = ""
    trials: int = 0
    sampler: str = "tpe"
    pruner: str = "wilcoxon"
    seed: int = 0
    budgets: tuple[str, ...] = ()
    samples: int = 16
    first_seed: int = 4_000_000
    chunk: int = 4
    error: str = "features"
    top_k: int = 4
    final_samples: int = 48
    study: str = ""
    space: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_SPACE))

    @property
    def seeds(self) -> int:
        """All seeds from ``first_seed`` that something is chosen on: search seeds and final seeds."""
        return self.samples + self.final_samples

    def __post_init__(self) -> None:
        least = {"trials": 0, "samples": 2, "top_k": 1, "final_samples": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"search.{name} must be at least {low}, got {getattr(self, name)}")
        if not 1 <= self.chunk <= self.samples:
            raise ConfigError(f"search.chunk must lie in 1..{self.samples} (search.samples), got {self.chunk}")
        for what, known in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("error", ERRORS)):
            if getattr(self, what) not in known:
                raise UnknownNameError(f"{what} of the search", getattr(self, what), known, f"(search.{what})")
        for text in self.budgets:
            Budget.parse(text)
