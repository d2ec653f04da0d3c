"""mpqsearch: search-based bit-allocation optimizer for diffusion models.

    import mpqsearch as mpq

    model = mpq.load("my-pipeline", sampler=mpq.Sampler(steps=20), prompts="prompts.txt")
    profile = mpq.profile(model)
    allocation = mpq.allocate(model, profile, "3bit")
    small = mpq.quantize(model, allocation, profile)
    mpq.compare(model, small).savefig("samples.png")

`load`, `discover`, `profile`, `allocate`, `quantize`, `evaluate`, `distill`, `search`, `export`, `import_map`, `save`,
`load_quantized` and `compare` are described in `mpqsearch.api`. They are loaded when they are first used: ``import
mpqsearch`` alone loads neither torch nor a solver. `mpqsearch.cli` is the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpqsearch._verbs import VERBS
from mpqsearch._version import __version__

if TYPE_CHECKING:
    from mpqsearch.api import (
        allocate,
        compare,
        discover,
        distill,
        evaluate,
        export,
        import_map,
        load,
        load_quantized,
        profile,
        quantize,
        save,
        search,
    )
    from mpqsearch.core import BitMap, Budget, Policy
    from mpqsearch.core import SensitivityProfile as Profile
    from mpqsearch.methods import MethodSpec as Method
    from mpqsearch.specs import SamplerSpec as Sampler

__all__ = [
    "BitMap",
    "Budget",
    "Method",
    "Policy",
    "Profile",
    "Sampler",
    "__version__",
    "allocate",
    "compare",
    "discover",
    "distill",
    "evaluate",
    "export",
    "import_map",
    "load",
    "load_quantized",
    "profile",
    "quantize",
    "save",
    "search",
]

_NOUNS = {
    "BitMap": ("mpqsearch.core", "BitMap"),
    "Budget": ("mpqsearch.core", "Budget"),
    "Method": ("mpqsearch.methods", "MethodSpec"),
    "Policy": ("mpqsearch.core", "Policy"),
    "Profile": ("mpqsearch.core", "SensitivityProfile"),
    "Sampler": ("mpqsearch.specs", "SamplerSpec"),
}


def __getattr__(name: str) -> Any:
    if name in VERBS:  # a package that can be called, see `mpqsearch._verbs`
        return import_module(f"mpqsearch.{name}")
    if name in _NOUNS:
        module, attribute = _NOUNS[name]
        return getattr(import_module(module), attribute)
    if name in __all__:
        return getattr(import_module("mpqsearch.api"), name)
    raise AttributeError(f"module 'mpqsearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
