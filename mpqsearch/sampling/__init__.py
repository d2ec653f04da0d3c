"""Seeded sampling with one noise stream a sample, over diffusers' own schedulers."""

from mpqsearch.sampling.sampler import (
    Chain,
    Step,
    chain_of,
    condition_to,
    labels_of,
    noise_of,
    prediction_sensitivities,
    sample,
    timesteps_of,
    to_uint8,
    trajectory,
)
from mpqsearch.specs import SamplerSpec
from mpqsearch.specs.sampler import SAMPLERS

__all__ = [
    "SAMPLERS",
    "Chain",
    "SamplerSpec",
    "Step",
    "chain_of",
    "condition_to",
    "labels_of",
    "noise_of",
    "prediction_sensitivities",
    "sample",
    "timesteps_of",
    "to_uint8",
    "trajectory",
]
