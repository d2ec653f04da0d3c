"""Tiny pipelines of diffusers with random weights and the real structure, and arguments to call them with.

``TINY[name]()`` gives a pipeline and the arguments of its call, without prompts, classes, generators and the kind of
output; `arguments` adds those for a batch of seeds. A name is that of the pipeline class, with a variant after a colon.
Nothing is downloaded: tokenizers hold single characters. Each builds in milliseconds and runs in well under a second.
"""

from tests.support.pipelines import images, sounds, unets, videos  # noqa: F401  (each enters its own)
from tests.support.pipelines.registry import (
    ALONE,
    MISFITS,
    NEEDS,
    PROMPTS,
    STOPS,
    TINY,
    Built,
    arguments,
    modules,
    prompt_of,
)
from tests.support.pipelines.running import denoiser_of

__all__ = [
    "ALONE",
    "MISFITS",
    "NEEDS",
    "PROMPTS",
    "STOPS",
    "TINY",
    "Built",
    "arguments",
    "denoiser_of",
    "modules",
    "prompt_of",
]
