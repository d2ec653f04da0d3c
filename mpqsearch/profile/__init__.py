"""Sensitivity of every channel and layer: kurtosis, exact output errors, gains. No Hessian anywhere."""

from mpqsearch.profile.activations import calibrate_activations, collect_ranges
from mpqsearch.profile.contexts import ContextProbes, context_probes, latin_contexts
from mpqsearch.profile.final_probes import FinalProbes, final_probes
from mpqsearch.profile.gptq import InputMoments, beyond_limit, gptq_profile, input_statistics
from mpqsearch.profile.inputs import InputCollector, columns_of
from mpqsearch.profile.measure import (
    FinalErrors,
    final_errors,
    price_errors,
    profile_base,
    profile_model,
    profile_slopes,
    race_final_errors,
    variants_of,
    with_final_errors,
)
from mpqsearch.profile.operating import remeasure
from mpqsearch.profile.probes import Prober, ProbeResult, probe
from mpqsearch.profile.racing import Stability, relative_error, stability
from mpqsearch.profile.streaming import Partial, profile_weights
from mpqsearch.profile.together import choose_alphas
from mpqsearch.specs import CalibrationSpec

__all__ = [
    "CalibrationSpec",
    "ContextProbes",
    "FinalErrors",
    "FinalProbes",
    "InputCollector",
    "InputMoments",
    "Partial",
    "ProbeResult",
    "Prober",
    "Stability",
    "beyond_limit",
    "calibrate_activations",
    "choose_alphas",
    "collect_ranges",
    "columns_of",
    "context_probes",
    "final_errors",
    "final_probes",
    "gptq_profile",
    "input_statistics",
    "latin_contexts",
    "price_errors",
    "probe",
    "profile_base",
    "profile_model",
    "profile_slopes",
    "profile_weights",
    "race_final_errors",
    "relative_error",
    "remeasure",
    "stability",
    "variants_of",
    "with_final_errors",
]
