"""mpqsearch: search-based bit-allocation optimizer for diffusion models."""

__version__ = "0.1.0"
