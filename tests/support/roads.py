"""Every verb on every kind of model: the models, a study of the smallest sizes, and what each verb is called with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

KINDS = (
    "unconditional",
    "class-conditional",
    "text-to-image",
    "flow-matching",
    "two-denoiser",
    "recorded",
)
"""Tiny models: pixels without classes and a module folder with classes and guidance, which the plain sampler draws;
pipelines with prompts in the latents of an autoencoder, one of them by flow matching; video by two denoisers; and a
pipeline that is known from recorded calls only."""

_SIZE = "height = 16, width = 16"
_PIPELINES = {
    "text-to-image": ("StableDiffusionPipeline", f"{{{_SIZE}}}"),
    "flow-matching": ("FluxPipeline", f"{{{_SIZE}}}"),
    "two-denoiser": ("WanPipeline:2.2", f"{{{_SIZE}, num_frames = 5}}"),
}
"""Class of the pipeline and further arguments of its call, by kind."""

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
batch = 4
{sampler}
[prompts]
{prompts}
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

SAMPLING = ("search", "evaluate", "distill", "run")
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
    "record": ("{model}", "--json", "--calls", "4", "--output", "{run}/calls.safetensors", "--overwrite"),
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
        names = {"run": self.run, "study": self.study, "model": self.folder / "model"}
        arguments = [verb, *(a.format(**names) for a in ARGUMENTS[verb]), *more]
        if verb in ("inspect", "doctor"):
            return arguments
        study = [] if verb == "run" else ["--config", str(self.study)]
        folder = [] if verb == "record" else ["--run-dir", str(self.run)]
        return [*arguments, *study, *folder, "--device", device]


def new_road(folder: Path, kind: str, dtype: str = "float32") -> Road:
    """Write a tiny model of ``kind`` and its study."""
    source, given = folder / "model", {}
    if kind in ("unconditional", "class-conditional"):
        _save_module(source, kind)
    else:
        name, call = _PIPELINES.get(kind, _PIPELINES["text-to-image"])
        _save_pipeline(source, name)
        given = {"prompts": f"file = {json.dumps(str(_write_prompts(folder / 'prompts.txt')))}"}
        given["sampler"] = f"call = {call}"
    if kind == "recorded":
        given = {"captured": f"captured = {json.dumps(str(_record(source, folder)))}"}
    return study_of(folder, str(source), dtype=dtype, guidance=2.0 if "class" in kind else None, **given)


def study_of(
    folder: Path,
    source: str,
    *,
    dtype: str = "float32",
    captured: str = "",
    sampler: str = "",
    prompts: str = "",
    guidance: float | None = None,
) -> Road:
    """Write the study of a model that is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    road = Road(folder=folder)
    sampler += "" if guidance is None else f"\nguidance = {guidance}"
    text = STUDY.format(source=json.dumps(source), dtype=dtype, captured=captured, sampler=sampler, prompts=prompts)
    road.study.write_text(text)
    return road


def _save_module(folder: Path, kind: str) -> None:
    from tests.support.tiny import CLASSES, DDPM, tiny_dit, tiny_unet

    module = tiny_dit() if kind == "class-conditional" else tiny_unet(classes=0)
    module.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    (folder / "scheduler_config.json").write_text(json.dumps(DDPM))
    if kind == "class-conditional":
        (folder / "denoiser.json").write_text(json.dumps({"n_classes": CLASSES, "null_class": CLASSES}))


def _save_pipeline(folder: Path, name: str) -> None:
    from tests.support.pipelines import TINY

    TINY[name]()[0].save_pretrained(folder)


def _write_prompts(file: Path) -> Path:
    file.write_text("".join(f"a lighthouse beside {n} boats\n" for n in range(2, 22)))
    return file


def _record(source: Path, folder: Path) -> Path:
    """What `mpqsearch record` writes."""
    from mpqsearch.models import save_calls
    from mpqsearch.prompts import read_prompts
    from mpqsearch.sampling import load_model, record
    from mpqsearch.specs import PromptsSpec, SamplerSpec

    sampler = SamplerSpec(steps=2, call={"height": 16, "width": 16})
    prompts = read_prompts(PromptsSpec(file=str(folder / "prompts.txt")))
    save_calls(folder / "calls.safetensors", record(load_model(str(source), sampler=sampler, prompts=prompts), limit=4))
    return folder / "calls.safetensors"
