"""Seeded sampling with one noise stream a sample, over diffusers' own schedulers."""

from mpqsearch.sampling.sampler import (
    SAMPLERS,
    Chain,
    SamplerSpec,
    Step,
    chain_of,
    labels_of,
    noise_of,
    prediction_gains,
    sample,
    timesteps_of,
    to_uint8,
    trajectory,
)

__all__ = [
    "SAMPLERS",
    "Chain",
    "SamplerSpec",
    "Step",
    "chain_of",
    "labels_of",
    "noise_of",
    "prediction_gains",
    "sample",
    "timesteps_of",
    "to_uint8",
    "trajectory",
]
