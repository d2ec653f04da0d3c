"""Sensitivity of every output channel and layer: kurtosis, exact output errors, end-to-end effects. No Hessian."""

from mpqsearch._verbs import make_callable
from mpqsearch.profile.activations import collect_ranges, scales_of
from mpqsearch.profile.calibrate import calibrate
from mpqsearch.profile.final_probes import final_effects, projected_effects
from mpqsearch.profile.gptq import gptq_profile, in_formats
from mpqsearch.profile.gradients import WithGradients, gradient_bytes, gradient_moments
from mpqsearch.profile.inputs import columns_of
from mpqsearch.profile.measure import profile_model
from mpqsearch.profile.partial import Arrays, Partial
from mpqsearch.profile.second_moments import SecondMoments, beyond_limit, input_statistics, statistics_of
from mpqsearch.profile.streaming import profile_weights
from mpqsearch.profile.tables import WeightErrors, formats_of
from mpqsearch.specs import CalibrationSpec

__all__ = [
    "Arrays",
    "CalibrationSpec",
    "Partial",
    "SecondMoments",
    "WeightErrors",
    "WithGradients",
    "beyond_limit",
    "calibrate",
    "collect_ranges",
    "columns_of",
    "final_effects",
    "formats_of",
    "gptq_profile",
    "gradient_bytes",
    "gradient_moments",
    "in_formats",
    "input_statistics",
    "profile_model",
    "profile_weights",
    "projected_effects",
    "scales_of",
    "statistics_of",
]

make_callable(__name__)
