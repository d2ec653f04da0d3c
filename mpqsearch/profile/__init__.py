"""Sensitivity of every channel and layer: kurtosis, exact output errors, gains. No Hessian anywhere."""

from mpqsearch.profile.activations import calibrate_activations, collect_ranges
from mpqsearch.profile.inputs import InputCollector, columns_of
from mpqsearch.profile.measure import CalibrationSpec, FinalErrors, final_errors, profile_base, profile_model, with_final_errors
from mpqsearch.profile.probes import ProbeResult, probe
from mpqsearch.profile.streaming import Partial, profile_weights

__all__ = [
    "CalibrationSpec",
    "FinalErrors",
    "InputCollector",
    "Partial",
    "ProbeResult",
    "calibrate_activations",
    "collect_ranges",
    "columns_of",
    "final_errors",
    "probe",
    "profile_base",
    "profile_model",
    "profile_weights",
    "with_final_errors",
]
