"""Every verb on every kind of model: the models, a study of the smallest sizes, and what each verb is called with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

KINDS = ("unconditional", "class-conditional", "recorded")
"""A model without classes, one with classes and guidance, and a pipeline that is known from recorded calls only."""

STUDY = """
[model]
source = {source}
dtype = "{dtype}"
[policy]
widths = [2, 4, 8]
[quantizer]
n_candidates = 8
[sampler]
steps = 2
guidance = {guidance}
batch = 4
[calibration]
{captured}
samples = 2
probe_inputs = 2
probes = 1
sampler_seeds = 2
sampler_probes = 1
context_seeds = 0
schemes = ["auto"]
[allocate]
budgets = ["uniform:4"]
[[methods]]
name = "uniform"
allocator = "uniform"
scheme = "auto"
[[methods]]
name = "ilp-layer"
allocator = "ilp-layer"
scheme = "auto"
[[methods]]
name = "ilp-channel"
allocator = "ilp-channel"
scheme = "auto"
bias_correction = true
[search]
trials = 2
samples = 2
chunk = 2
final_samples = 2
repeats = 1
[search.space]
exponent = [0.5, 2.0]
[evaluate]
samples = 4
extractor = "random-conv"
[distill]
methods = ["ilp-channel"]
steps = 2
batch = 2
rank = 2
relation.pooled_size = 2
[report]
chosen = "ilp-channel"
[export]
targets = ["neutral", "packed"]
"""

SAMPLING = ("search", "evaluate", "distill", "report", "run")
"""Verbs that draw samples, which a model known from recorded calls cannot."""

BUDGET = ("--method", "ilp-channel", "--budget", "uniform:4")

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "layers": ("--json",),
    "profile": ("--json",),
    "allocate": ("--json", "--path", "--explain"),
    "quantize": ("--json", *BUDGET),
    "search": ("--json",),
    "evaluate": ("--json",),
    "distill": ("--json", *BUDGET),
    "report": ("--json",),
    "export": ("--json", *BUDGET, "--target", "neutral", "--target", "packed"),
    "import": ("{run}/allocations/uniform@uniform-4/bitmap.json", "--json", "--name", "theirs"),
    "run": ("{study}", "--json"),
    "inspect": ("{run}/profile.json",),
    "doctor": ("--json",),
}
"""What each verb is called with, in the order in which a user comes to them."""


@dataclass(frozen=True, kw_only=True)
class Road:
    """A study of one model, and the run folder that its verbs fill, both in ``folder``."""

    folder: Path

    @property
    def study(self) -> Path:
        return self.folder / "study.toml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def command(self, verb: str, *more: str, device: str = "cpu") -> list[str]:
        """The command line of a verb, with further arguments."""
        names = {"run": self.run, "study": self.study}
        arguments = [verb, *(a.format(**names) for a in ARGUMENTS[verb]), *more]
        if verb in ("inspect", "doctor"):
            return arguments
        study = [] if verb == "run" else ["--config", str(self.study)]
        return [*arguments, *study, "--run-dir", str(self.run), "--device", device]


def new_road(folder: Path, kind: str, dtype: str = "float32") -> Road:
    """Write a tiny model of ``kind`` and its study."""
    source, captured = folder / "model", ""
    if kind == "recorded":
        captured = f"captured = {json.dumps(str(_record(source, folder / 'calls.safetensors')))}"
    else:
        _save(source, kind)
    return study_of(folder, str(source), dtype=dtype, captured=captured, guidance=2.0 if "class" in kind else 1.0)


def study_of(folder: Path, source: str, *, dtype: str = "float32", captured: str = "", guidance: float = 1.0) -> Road:
    """Write the study of a model that is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    road = Road(folder=folder)
    text = STUDY.format(source=json.dumps(source), dtype=dtype, captured=captured, guidance=guidance)
    road.study.write_text(text)
    return road


def _save(folder: Path, kind: str) -> None:
    from tests.support.tiny import tiny_dit, tiny_unet

    module = tiny_dit() if kind == "class-conditional" else tiny_unet(classes=0)
    module.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]


def _record(source: Path, calls_file: Path) -> Path:
    """A pipeline in miniature, and what a user records around it."""
    import torch

    from mpqsearch.models import capture, save_calls
    from mpqsearch.sampling import load_model
    from tests.support.tiny import tiny_prompted_pipeline

    module = load_model(str(tiny_prompted_pipeline(source))).module
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 4, 8, generator=generator)
    with torch.no_grad(), capture(module, limit=2) as calls:
        for t in (900, 100):
            module(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(t), encoder_hidden_states=text)
    save_calls(calls_file, calls)
    return calls_file
