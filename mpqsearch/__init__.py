"""mpqsearch: search-based bit-allocation optimizer for diffusion models.

    import mpqsearch as mpq

    model = mpq.load_model("fmnist-unet")
    profile = mpq.profile_model(model)
    made = mpq.allocate_bits(model, profile, "3bit")
    small = mpq.quantize(model, made, profile)
    mpq.compare(model, small).savefig("samples.png")

The names below are loaded when they are first used: ``import mpqsearch`` alone loads neither torch nor a solver.
Everything else is in the subpackages; `mpqsearch.cli` is the command line.
"""

from typing import TYPE_CHECKING, Any

from mpqsearch._version import __version__

if TYPE_CHECKING:
    from mpqsearch.api import allocate_bits, compare, discover, load_model, load_quantized, profile_model, quantize

_API = ("allocate_bits", "compare", "discover", "load_model", "load_quantized", "profile_model", "quantize")

__all__ = [
    "__version__",
    "allocate_bits",
    "compare",
    "discover",
    "load_model",
    "load_quantized",
    "profile_model",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in _API:
        from mpqsearch import api

        return getattr(api, name)
    raise AttributeError(f"module 'mpqsearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
