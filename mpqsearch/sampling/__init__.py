"""Runners: a denoiser, run the way its users run it, and what every room derives from that."""

from mpqsearch.sampling.chain import Chain, SchedulerStep, chain, gradients, prediction_gains, scheduler_steps
from mpqsearch.sampling.draw import batch_of, can_sample, each_call, latents, n_calls, record, require_sampler, samples
from mpqsearch.sampling.load import adapt, imported, load_model
from mpqsearch.sampling.pipeline import PipelineRunner
from mpqsearch.sampling.plain import PlainRunner, to_uint8
from mpqsearch.sampling.recorded import RecordedRunner
from mpqsearch.specs import SamplerSpec
from mpqsearch.specs.sampler import SAMPLERS

__all__ = [
    "SAMPLERS",
    "Chain",
    "PipelineRunner",
    "PlainRunner",
    "RecordedRunner",
    "SamplerSpec",
    "SchedulerStep",
    "adapt",
    "batch_of",
    "can_sample",
    "chain",
    "each_call",
    "gradients",
    "imported",
    "latents",
    "load_model",
    "n_calls",
    "prediction_gains",
    "record",
    "require_sampler",
    "samples",
    "scheduler_steps",
    "to_uint8",
]
