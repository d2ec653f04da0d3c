"""Seeded sampling with one noise stream a sample, over diffusers' own schedulers."""

from mpqsearch.sampling.sampler import SAMPLERS, SamplerSpec, Step, labels_of, noise_of, sample, timesteps_of, to_uint8, trajectory

__all__ = ["SAMPLERS", "SamplerSpec", "Step", "labels_of", "noise_of", "sample", "timesteps_of", "to_uint8", "trajectory"]
