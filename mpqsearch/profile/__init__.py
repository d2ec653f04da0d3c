"""Sensitivity of every channel and layer: kurtosis, exact output errors, gains. No Hessian anywhere."""

from mpqsearch.profile.inputs import InputCollector, columns_of
from mpqsearch.profile.measure import CalibrationSpec, final_errors, profile_model
from mpqsearch.profile.probes import ProbeResult, probe

__all__ = ["CalibrationSpec", "InputCollector", "ProbeResult", "columns_of", "final_errors", "probe", "profile_model"]
