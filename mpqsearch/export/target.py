"""What the targets that another library reads share: planning, the manifest, damage, the fresh process, the
comparison."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import digest_file, environment, read_json, write_json
from mpqsearch.core import FULL_PRECISION, LayerSpec, StoredBits, stored_total, unquantized_bits
from mpqsearch.core.formats import WIDTHS
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.export.contract import Capabilities, Choice, ExportJob, PlanEntry, Verification, VerifyEntry
from mpqsearch.export.neutral import NeutralExporter
from mpqsearch.export.rounding import plan_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

MANIFEST, CHECK, CONFIG = "export.json", "check.safetensors", "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The name that diffusers looks for."""

SIZE_TOLERANCE = 0.01
"""Largest relative difference between the bytes that the cost model promises and those on disk, headers apart."""


class ConsumerTarget:
    """Base of a target that a library other than this one loads.

    A target sets the attributes, gives ``choices`` and ``cost``, writes its own files in ``write_files`` and reads them
    with the library in ``read_back``, which runs in a process of its own.

    ``requires``: pip name of the library, ``imports``: the modules that must be there. ``kinds``: layer kinds it
    quantizes. ``limits``: for messages, which shapes it needs. ``payload``: weights are written. ``full_bits`` and
    ``kept_bits``: bits of a value in layers at full precision, and in parameters that are no weight layer.
    ``tolerance``: largest difference of the forward pass as a share of the largest output. ``rerounds``: the library
    derives scales anew, so that ranges and schemes of a map are not used. ``needs_config``: the model is built from
    ``config.json`` to read the export back. ``tested``: version of the library that was run. ``by_consumer``: False
    when the consumer was never run; ``read_back`` is then our own reading. ``get``: where it comes from, when that is
    not ``pip install`` of ``requires``.
    """

    name = ""
    requires = ""
    imports: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("Linear",)
    limits = ""
    payload = True
    rerounds = True
    needs_config = True
    full_bits = 32
    kept_bits = 32
    tolerance = 1e-4
    tested = ""
    by_consumer = True
    get = ""
    notes: tuple[str, ...] = ()

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """The formats of a layer; see `mpqsearch.export.contract.Exporter`."""
        raise NotImplementedError

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Stored bits of a layer in one of its formats."""
        raise NotImplementedError

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Write the target's own files, and ``check.safetensors`` when a forward pass can be compared."""
        raise NotImplementedError

    def read_back(self, folder: Path, module: nn.Module | None = None) -> dict[str, Any]:
        """Load the folder with the library, into ``module`` when it is given, else into a model built from
        ``config.json``.

        Returns ``widths`` by layer (16 for planned layers that are not quantized), and as far as known ``choices``,
        ``problems``, ``forward_error``, ``versions``, ``stored_bytes`` and ``header_bytes``.
        """
        raise NotImplementedError

    def capabilities(self) -> Capabilities:
        """What the target can hold, over all shapes."""
        widths = tuple(sorted({c.width for c in self.all_choices()}))
        return Capabilities(
            widths=widths,
            kinds=self.kinds,
            granularity="layer",
            payload=self.payload,
            requires=self.requires,
            tested=self.tested,
            by_consumer=self.by_consumer,
            get=self.get or f"pip install '{self.requires}'",
            notes=self.notes,
        )

    def all_choices(self) -> tuple[Choice, ...]:
        """The formats of a layer whose shape fits everything."""
        return self.choices(LayerSpec(name="any", kind=self.kinds[0], weight_shape=(1024, 1024)))

    def cost(self, layer: LayerSpec, choice: Choice | None) -> StoredBits:
        """What the layer takes in the target's own file; None stands for full precision."""
        return unquantized_bits(layer, self.full_bits) if choice is None else self.coded(layer, choice)

    def plan(self, job: ExportJob) -> list[PlanEntry]:
        """One entry per layer; see `plan_layers` for the roundings."""
        return plan_layers(job, self.name, self.choices, self.kinds, self.limits)

    def promise(self, job: ExportJob, plan: Sequence[PlanEntry]) -> StoredBits:
        """Stored bits of the whole model under a plan."""
        table = job.table
        layers = {e.layer: self.cost(table[e.layer], self.choice_of(table[e.layer], e.choice)) for e in plan}
        return stored_total(table, layers, self.kept_bits)

    def choice_of(self, layer: LayerSpec, name: str) -> Choice | None:
        """The choice of that name; None for the empty name, which is full precision."""
        return next(c for c in self.choices(layer) if c.name == name) if name else None

    def write(self, folder: Path, job: ExportJob) -> list[Path]:
        """Write the folder; ``export.json`` last, it says that all is whole.

        Raises `ConfigError` without the library, without a model where weights are written, and for a width refused by
        ``rounding="error"``.
        """
        plan = self.plan(job)
        if job.denoiser is None:
            raise ConfigError(f"the target {self.name!r} needs the model: give ExportJob a denoiser")
        self.require()
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / CHECK).unlink(missing_ok=True)
        paths = [*self.write_files(folder, job, plan), *NeutralExporter().write(folder, job)]
        paths = list(dict.fromkeys(paths))
        promised = self.promise(job, plan)
        data = {
            "target": self.name,
            "rounding": job.rounding,
            "map_digest": job.bit_map.digest,
            "plan": [
                {
                    "layer": e.layer,
                    "asked": e.asked_text,
                    "will_get": e.will_get,
                    "choice": e.choice,
                    "reason": e.reason,
                    "detail": e.detail,
                }
                for e in plan
            ],
            "promised_bits": {
                "payload": promised.payload,
                "metadata": promised.metadata,
                "unquantized": promised.unquantized,
            },
            "payload": self.payload,
            "verified_by": self.requires if self.by_consumer else "",
            "sample_shape": list(job.denoiser.sample_shape),
            "files": {p.relative_to(folder).as_posix(): digest_file(p) for p in paths},
            "environment": environment((self.requires, "torch", "diffusers", "safetensors")),
        }
        write_json(folder / MANIFEST, "mpqsearch/export", data, job.inputs)
        return [*paths, folder / MANIFEST]

    def verify(self, folder: Path, module: nn.Module | None = None) -> Verification:
        """Load the folder with the library and compare widths, forward pass and size with the plan.

        A diffusers model is built from ``config.json`` in a fresh process. For any other, give ``module``, a new
        instance of the same class; it is filled in this process.
        """
        problems = damage(folder, self.name)
        if problems:
            return Verification(target=self.name, entries=(), problems=tuple(problems))
        if self.missing():
            return Verification(target=self.name, entries=(), problems=(self.install_line(),))
        if module is not None or not self.by_consumer:
            seen = self.read_back(folder, module)
        elif (folder / CONFIG).is_file() or not self.needs_config:
            seen = fresh_process([(self.name, folder)])[0]
        else:
            why = (
                f"{folder} has no {CONFIG}: not a diffusers model. Give verify() a new instance of its class as module."
            )
            return Verification(target=self.name, entries=(), problems=(why,))
        return self.compare(read_json(folder / MANIFEST, "mpqsearch/export").data, seen)

    def compare(self, manifest: Mapping[str, Any], seen: Mapping[str, Any]) -> Verification:
        """What the plan says against what was read back."""
        widths, choices = dict(seen["widths"]), dict(seen.get("choices", {}))
        entries = tuple(
            VerifyEntry(
                layer=p["layer"],
                asked=p["asked"],
                planned=p["will_get"],
                got=widths.pop(p["layer"], -1 if p["will_get"] is None else None),
                reason=p["reason"],
                planned_choice=p["choice"] if "choices" in seen else "",
                got_choice=choices.get(p["layer"], ""),
            )
            for p in manifest["plan"]
        )
        problems = list(seen.get("problems", ()))
        problems += [f"{name} is quantized to {bits} bits and is not in the plan" for name, bits in widths.items()]
        error = seen.get("forward_error")
        if error is not None and not math.isfinite(error):
            problems.append("the forward pass is not finite")
            error = None
        if error is not None and error > self.tolerance:
            problems.append(
                f"the forward pass differs by {error:.2g} of the largest output, more than {self.tolerance:g}"
            )
        stored = seen.get("stored_bytes")
        promised = None if stored is None else -(-sum(manifest["promised_bits"].values()) // 8)
        if stored is not None and promised is not None and abs(stored - promised) > SIZE_TOLERANCE * promised:
            problems.append(
                f"the tensors take {stored} bytes, {promised} were promised: more than {SIZE_TOLERANCE:.0%} apart"
            )
        return Verification(
            target=self.name,
            entries=entries,
            problems=tuple(problems),
            by_consumer=self.by_consumer,
            forward_error=error,
            versions=dict(seen.get("versions", {})),
            promised_bytes=promised,
            stored_bytes=stored,
            header_bytes=seen.get("header_bytes"),
        )

    def missing(self) -> list[str]:
        """Modules of the library that are not installed."""
        return [m for m in self.imports if importlib.util.find_spec(m) is None]

    def install_line(self) -> str:
        """What to say when the library is absent."""
        return f"{', '.join(self.missing())} is not installed. Run: {self.capabilities().get}"

    def require(self) -> None:
        """Raise `ConfigError` with the line that installs the library, when it is absent."""
        if self.missing():
            raise ConfigError(self.install_line())

    @property
    def asks_itself(self) -> bool:
        """Whether `round_trip` gives the errors of the target's own quantizer, for which the library must be there."""
        return type(self).round_trip is not ConsumerTarget.round_trip

    def require_quantizer(self) -> None:
        """Raise `ConfigError` with the line that installs the library, when an allocation cannot be priced without
        it."""
        if self.asks_itself:
            self.require()

    def round_trip(self, weight: Tensor, layer: LayerSpec, choice: Choice) -> Tensor:
        """The weight as the target gives it back, in float32; only for targets that round by themselves."""
        raise ConfigError(f"the target {self.name!r} has no quantizer that can be called on one weight")


def int_choices(widths: Sequence[int], name: str = "int{}") -> tuple[Choice, ...]:
    """Choices that are called after their width."""
    assert set(widths) <= set(WIDTHS)
    return tuple(Choice(name=name.format(w), width=w) for w in widths)


def planned_widths(plan: Sequence[PlanEntry]) -> dict[str, int]:
    """Width of every layer that is quantized, in the order of the plan."""
    return {e.layer: e.will_get for e in plan if e.will_get is not None and e.will_get != FULL_PRECISION}


def write_config(folder: Path, module: nn.Module, extra: Mapping[str, Any] | None = None) -> list[Path]:
    """``config.json`` of a diffusers model, from which the check and diffusers build it; nothing for other models."""
    from mpqsearch.artifacts import write_text

    to_text = getattr(module, "to_json_string", None)
    if to_text is None:
        (folder / CONFIG).unlink(missing_ok=True)
        return []
    data = {**json.loads(to_text()), **(extra or {})}
    write_text(folder / CONFIG, json.dumps(data, indent=1, sort_keys=True) + "\n")
    return [folder / CONFIG]


def damage(folder: Path, target: str) -> list[str]:
    """What is wrong with the files of an export, before anything is loaded."""
    try:
        data = read_json(folder / MANIFEST, "mpqsearch/export").data
    except ArtifactError as error:
        return [str(error)]
    if data.get("target") != target:
        return [f"{folder} is an export for {data.get('target')!r}, not for {target!r}"]
    found = {name: digest_file(folder / name) if (folder / name).is_file() else None for name in data["files"]}
    changed = [name for name, digest in data["files"].items() if found[name] != digest]
    return [f"{folder / name} is missing or was changed after the export. Export again." for name in changed]


def fresh_process(exports: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    """What ``read_back`` of each target says of its folder, in a process of its own, where nothing of this one can
    help."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "mpqsearch.export.check", *(str(part) for pair in exports for part in pair)]
    done = subprocess.run(  # noqa: S603 - our own module, and the folders are arguments, not commands
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"widths"')]
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    for target, folder in exports[len(found) :]:
        found.append({"widths": {}, "problems": [f"{target} could not load {folder}: {last}"]})
    return found
