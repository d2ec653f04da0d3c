"""What can be set, room by room: frozen dataclasses that check themselves and import neither torch nor Optuna.

A room's functions take its spec as an argument; `mpqsearch.config` reads the same classes from TOML. There is no second
copy of any of them.
"""

from mpqsearch.specs.calibration import CalibrationSpec
from mpqsearch.specs.distill import DistillSpec, TRDSpec
from mpqsearch.specs.prompts import PromptsSpec
from mpqsearch.specs.sampler import SamplerSpec
from mpqsearch.specs.search import SearchSpec

__all__ = ["CalibrationSpec", "DistillSpec", "PromptsSpec", "SamplerSpec", "SearchSpec", "TRDSpec"]
