"""What every target shares: plan, write with a manifest, and verify in a fresh process what the consumer holds."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqsearch.artifacts import digest_file, environment, read_json, write_json, write_text
from mpqsearch.core import (
    FULL_PRECISION,
    BitMap,
    LayerSpec,
    LayerTable,
    StoredBits,
    stored_total,
    unquantized_bits,
)
from mpqsearch.core.formats import WIDTHS
from mpqsearch.errors import ArtifactError, ConfigError, UnknownNameError
from mpqsearch.export.contract import (
    AS_PLANNED,
    CHECK,
    CONFIG,
    EXPECTED,
    MANIFEST,
    WEIGHTS,
    Choice,
    ExportJob,
    PlanEntry,
    Verification,
    VerifyEntry,
)
from mpqsearch.export.mapfile import write_map
from mpqsearch.export.plan import plan_layers, share
from mpqsearch.sources import kind_of
from mpqsearch.specs.targets import TARGETS
from mpqsearch.untrusted import parse_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpqsearch.models.denoiser import Denoiser

SIZE_TOLERANCE = 0.01
"""Largest relative difference between the bytes that the cost model promises and those on disk, headers apart."""

EXACT = 1e-5
"""Relative difference of two forward passes with the same weights, on other devices or in another order."""

HALF = 2e-3
"""As `EXACT`, of models whose biases and norms are in 16 bits in one of them."""

READ_SECONDS = 1800
"""A consumer that has not read an export by then is stopped."""


class Target:
    """Base of a target: a subclass sets the attributes, gives ``choices`` and ``coded``, writes its own files in
    ``write_files`` and reads them with the consumer in ``read_back``, which runs in a process of its own.

    ``requires``: pip name of the consumer, empty when there is none; ``imports``: the modules that must be there;
    ``tested``: the version that was run, or whose source was read where ``by_consumer`` is False: such a consumer was
    never run on what is written here, and ``read_back`` is our own reading. ``get``: how to get it, when that is not
    ``pip install`` of ``requires``. ``kinds``: layer kinds it quantizes (empty: all). ``granularity``: ``layer`` or
    ``channel``. ``holds_any_map``: there are no formats of its own to allocate over. ``limits``: for messages, which
    shapes it needs. ``payload``: weights are written. ``inputs``: widths of layers' inputs are written too.
    ``encoders``: text encoders and autoencoder have a place in it.
    ``full_bits`` and ``kept_bits``: bits of a value in layers at full precision, and in parameters that are no weight
    layer. ``tolerance``: largest difference of the forward pass as a share of the largest output. ``rerounds``: the
    consumer derives scales anew, so that ranges and schemes of a map are not used. ``any_scheme``: codes of all schemes
    are held as they are, not only those with integer zero points and without smoothing. ``file``: the one with the
    weights. ``needs_config``: the model is built
    from ``config.json`` to read the export back. ``loading``: Python that makes ``model`` of the folder ``{folder}``
    and the class ``{cls}`` of diffusers, for the card.
    """

    name = ""
    requires = ""
    imports: tuple[str, ...] = ()
    tested = ""
    by_consumer = True
    get = ""
    kinds: tuple[str, ...] = ("Linear",)
    granularity = "layer"
    holds_any_map = False
    limits = ""
    payload = True
    inputs = False
    encoders = False
    rerounds = True
    needs_config = True
    full_bits = 32
    kept_bits = 32
    tolerance = 1e-4
    any_scheme = False
    loading = ""
    file = WEIGHTS

    def choices(self, layer: LayerSpec) -> tuple[Choice, ...]:
        """The formats that the target has for this layer, the preferred one of each width first; empty: it stays at
        full precision."""
        raise NotImplementedError

    def coded(self, layer: LayerSpec, choice: Choice) -> StoredBits:
        """Stored bits of a layer in one of its formats."""
        raise NotImplementedError

    def write_files(self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry]) -> list[Path]:
        """Write the target's own files, and a check when a forward pass can be compared.

        The model of the job is a copy of its own, on the CPU in float32, where weights are written.
        """
        raise NotImplementedError

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Load the folder with the consumer.

        Returns ``widths`` by quantized layer, and as far as known ``choices``, ``problems``, ``forward_error``,
        ``stored_bytes`` and ``header_bytes``.
        """
        raise NotImplementedError

    @property
    def install(self) -> str:
        """How to get the consumer."""
        return self.get or f"pip install '{self.requires}'"

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of a weight over all shapes, ascending, without full precision."""
        return tuple(sorted({c.width for c in self.all_choices()}))

    def all_choices(self) -> tuple[Choice, ...]:
        """The formats of a layer whose shape and place fit everything."""
        kind = self.kinds[0] if self.kinds else "Linear"
        return self.choices(LayerSpec(name="blocks.0.any", kind=kind, weight_shape=(1024, 1024)))

    def untested(self) -> str:
        """The consumer's installed version when it is another than ``tested``; empty when it is the same or there is
        none."""
        try:
            version = metadata.version(self.requires) if self.requires and self.by_consumer else ""
        except metadata.PackageNotFoundError:
            return ""
        return "" if version.startswith(self.tested) else version

    def tied(self, table: LayerTable) -> list[tuple[str, ...]]:
        """Layers that must have one format, since they are one layer in the file; two or more in each group."""
        return []

    def lost_inputs(self, bit_map: BitMap) -> dict[str, int]:
        """Layers whose inputs the map quantizes, with the width, where the target says nothing of inputs."""
        return {} if self.inputs else {n: b for n, b in bit_map.activations.items() if b != FULL_PRECISION}

    def check_parts(self, table: LayerTable) -> None:
        """Raise `ConfigError` for a model with other parts than denoisers where these have no place."""
        held = dict.fromkeys(la.name.partition(".")[0] for la in table if kind_of(la.name))
        if held and not self.encoders:
            raise ConfigError(
                f"{self.name} holds a denoiser alone, and {', '.join(held)} is in the budget (budget.parts): export "
                "for packed or neutral, or leave it out of budget.parts"
            )

    def cost(self, layer: LayerSpec, choice: Choice | None) -> StoredBits:
        """What the layer takes in the target's own file; None stands for full precision."""
        return unquantized_bits(layer, self.full_bits) if choice is None else self.coded(layer, choice)

    def plan(self, job: ExportJob) -> list[PlanEntry]:
        """One entry per layer, in the order of the table; see `plan_layers`. Layers that are `tied` share a format."""
        return share(plan_layers(job, self), self.tied(job.table))

    def promise(self, job: ExportJob, plan: Sequence[PlanEntry]) -> StoredBits:
        """Stored bits of the whole model under a plan."""
        table = job.table
        layers = {e.layer: self.cost(table[e.layer], self.choice_of(table[e.layer], e.choice)) for e in plan}
        return stored_total(table, layers, self.kept_bits)

    def choice_of(self, layer: LayerSpec, name: str) -> Choice | None:
        """The choice of that name; None for the empty name, which is full precision."""
        return next(c for c in self.choices(layer) if c.name == name) if name else None

    def write(self, folder: Path, job: ExportJob) -> list[Path]:
        """Write the folder: the target's files, the neutral map, and last ``export.json``, which says that all is
        whole.

        Raises `ConfigError` without the library, or without a model where weights are written.
        """
        self.check_parts(job.table)
        plan = self.plan(job)
        if job.denoiser is None and self.payload:
            raise ConfigError(f"the target {self.name!r} needs the model: give ExportJob a denoiser")
        self.require()
        for name in (MANIFEST, CHECK, EXPECTED):
            (folder / name).unlink(missing_ok=True)
        own = job
        if self.payload:
            from mpqsearch.export.check import source_of

            own = replace(job, denoiser=source_of(job))
        paths = [*self.write_files(folder, own, plan), *write_map(folder, job)]
        write_json(folder / MANIFEST, "mpqsearch/export", self._manifest(folder, job, plan, paths), job.inputs)
        return [*paths, folder / MANIFEST]

    def _manifest(
        self, folder: Path, job: ExportJob, plan: Sequence[PlanEntry], paths: Sequence[Path]
    ) -> dict[str, Any]:
        keys = ("layer", "will_get", "choice", "reason", "detail")
        return {
            "target": self.name,
            "map_digest": job.bit_map.digest,
            "plan": [{key: getattr(e, key) for key in keys} | {"asked": e.asked_text} for e in plan],
            "promised_bits": asdict(self.promise(job, plan)),
            "holds_evaluated": self.holds_evaluated(job, plan),
            "payload": self.payload,
            "verified_by": self.requires if self.by_consumer else "",
            "files": {p.relative_to(folder).as_posix(): digest_file(p) for p in paths},
            "environment": environment((self.requires or "mpqsearch", "torch", "diffusers", "safetensors")),
        }

    def holds_evaluated(self, job: ExportJob, plan: Sequence[PlanEntry]) -> bool:
        """Whether the file holds the very codes of the model that was evaluated, so that both must predict the same."""
        formats = [job.bit_map.format_of(e.layer) for e in plan if e.will_get != FULL_PRECISION]
        codes = self.any_scheme or all(f.scheme == "asymmetric" and not f.smooth for f in formats)
        exact = all(e.reason in AS_PLANNED for e in plan) and not self.lost_inputs(job.bit_map)
        return codes and exact and _in_single(job.denoiser) and not self.rerounds

    def sizes(self, folder: Path) -> dict[str, int]:
        """``stored_bytes`` of the tensors in an export, and ``header_bytes``: names, shapes and padding."""
        from mpqsearch.export.check import stored_size

        return stored_size(folder / self.file)

    def names_bits(self, job: ExportJob, plan: Sequence[PlanEntry]) -> int:
        """Bits of names and shapes in the file, where these are computed before it is written; else 0."""
        return 0

    def unread(self, module: nn.Module) -> str:
        """What those who would load the file do not know of the model, in a sentence that says what to do; empty when
        nothing is known to be amiss."""
        return ""

    def weights(self, folder: Path) -> Mapping[str, Tensor]:
        """All values of the model by their names, as the consumer decodes them from an export: what is measured.

        Raises `ConfigError` for a target of which that is not known here, or a model that cannot be built again.
        """
        raise ConfigError(f"what {self.name} decodes from its file cannot be read here, so the file is not measured")

    def verify(self, folder: Path) -> Verification:
        """Load the folder with the consumer, in a fresh process, and compare widths, forward pass and size with the
        plan. The model is built from ``config.json``, so weights of models that diffusers does not have are not read.
        """
        problems = damage(folder, self.name)
        if not problems and self.missing():
            problems = [self.install_line()]
        if not problems and self.needs_config and not (folder / CONFIG).is_file():
            problems = [f"{folder} has no {CONFIG}: only models of diffusers can be built again and read back"]
        if problems:
            return Verification(target=self.name, entries=(), problems=tuple(problems))
        seen = fresh_process([(self.name, folder)])[0] if self.imports else self.read_back(folder)
        return self.compare(read_json(folder / MANIFEST, "mpqsearch/export").data, seen)

    def compare(self, manifest: Mapping[str, Any], seen: Mapping[str, Any]) -> Verification:
        """What the plan says against what was read back; ``widths`` is None when nothing could be."""
        choices, widths = dict(seen.get("choices", {})), seen["widths"]
        held = {} if widths is None else {p["layer"]: FULL_PRECISION for p in manifest["plan"]} | dict(widths)
        entries = tuple(
            VerifyEntry(
                layer=p["layer"],
                asked=p["asked"],
                planned=p["will_get"],
                got=held.pop(p["layer"], -1 if p["will_get"] is None else None),
                reason=p["reason"],
                planned_choice=p["choice"] if "choices" in seen else "",
                got_choice=choices.get(p["layer"], ""),
            )
            for p in manifest["plan"]
        )
        problems = list(seen.get("problems", ()))
        problems += [f"{name} is quantized to {bits} bits and is not in the plan" for name, bits in held.items()]
        error = seen.get("forward_error")
        if error is not None and not math.isfinite(error):
            problems.append("the forward pass is not finite")
            error = None
        if error is not None and error > self.tolerance:
            limit = f"{self.tolerance:g}"
            problems.append(f"the forward pass differs by {error:.2g} of the largest output, more than {limit}")
        evaluated = seen.get("evaluated_error")
        allowed = EXACT + 10 * self.tolerance + (HALF if self.kept_bits < 32 else 0)
        if evaluated is not None and manifest["holds_evaluated"] and not evaluated <= allowed:
            problems.append(f"the forward pass differs by {evaluated:.2g} (rms) from the model that was evaluated")
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
            evaluated_error=evaluated if evaluated is not None and math.isfinite(evaluated) else None,
            versions=dict(seen.get("versions", {})),
            promised_bytes=promised,
            stored_bytes=stored,
            header_bytes=seen.get("header_bytes"),
        )

    def missing(self) -> list[str]:
        """Modules of the consumer that are not installed."""
        return [m for m in self.imports if not _is_installed(m)]

    def install_line(self) -> str:
        """What to say when the consumer is absent."""
        return f"{', '.join(self.missing())} is not installed. Run: {self.install}"

    def require(self) -> None:
        """Raise `ConfigError` with the line that installs the consumer, when it is absent."""
        if self.missing():
            raise ConfigError(self.install_line())

    @property
    def rounds(self) -> bool:
        """Whether `round_trip` gives the errors of the target's own quantizer."""
        return type(self).round_trip is not Target.round_trip

    @property
    def asks_itself(self) -> bool:
        """Whether the library must be there for `round_trip`."""
        return self.rounds

    @property
    def decodes(self) -> bool:
        """Whether `weights` gives what the consumer decodes from a file, so that the file can be measured."""
        return type(self).weights is not Target.weights

    def round_trip(self, weight: Tensor, layer: LayerSpec, choice: Choice) -> Tensor:
        """The weight as the target gives it back, in float32; only for targets that round by themselves."""
        raise ConfigError(f"the target {self.name!r} has no quantizer that can be called on one weight")


def _in_single(denoiser: Denoiser | None) -> bool:
    """Whether a model is evaluated in single precision, as its files are written."""
    if denoiser is None:
        return False
    from mpqsearch.models.devices import float_dtype

    return float_dtype(denoiser.module).itemsize >= 4


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is part of
        return False


def get_exporter(name: str) -> Target:
    """The target of that name. Raises `UnknownNameError`, listing the known ones, for any other name."""
    if name not in TARGETS:
        raise UnknownNameError("export target", name, TARGETS)
    make = TARGETS[name]
    if isinstance(make, str):
        module, _, kind = make.partition(":")
        make = getattr(import_module(module), kind)
    target: Target = make()
    return target


def int_choices(widths: Sequence[int], name: str = "int{}") -> tuple[Choice, ...]:
    """Choices that are called after their width."""
    assert set(widths) <= set(WIDTHS)
    return tuple(Choice(name=name.format(w), width=w) for w in widths)


def planned_widths(plan: Sequence[PlanEntry]) -> dict[str, int]:
    """Width of every layer that is quantized, in the order of the plan."""
    return {e.layer: e.will_get for e in plan if e.will_get is not None and e.will_get != FULL_PRECISION}


def write_config(folder: Path, module: nn.Module, extra: Mapping[str, Any] | None = None) -> list[Path]:
    """``config.json`` of a diffusers model, from which the check and diffusers build it; nothing for other models."""
    config = plain_config(module)
    if config is None:
        (folder / CONFIG).unlink(missing_ok=True)
        return []
    write_text(folder / CONFIG, json.dumps({**config, **(extra or {})}, indent=1, sort_keys=True) + "\n")
    return [folder / CONFIG]


def plain_config(module: nn.Module) -> dict[str, Any] | None:
    """The configuration that diffusers or transformers writes of a model; None for one of another kind."""
    own = module if hasattr(module, "to_json_string") else getattr(module, "config", None)
    to_text = getattr(own, "to_json_string", None)
    if to_text is None:
        return None
    config = dict(parse_json(to_text(), type(module).__name__, infinite=True))
    return config if own is module else config | {"architectures": [type(module).__name__]}


def damage(folder: Path, target: str) -> list[str]:
    """What is wrong with the files of an export, before anything is loaded."""
    try:
        data = read_json(folder / MANIFEST, "mpqsearch/export").data
    except ArtifactError as error:
        return [str(error)]
    if data.get("target") != target:
        return [f"{folder} is an export for {data.get('target')!r}, not for {target!r}"]
    changed = [
        name
        for name, digest in data["files"].items()
        if not (folder / name).is_file() or digest_file(folder / name) != digest
    ]
    return [f"{folder / name} is missing or was changed after the export. Export again." for name in changed]


def fresh_process(exports: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    """What ``read_back`` of each target says of its folder, in a process of its own, where nothing of this one can
    help."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "mpqsearch.export", *(str(part) for pair in exports for part in pair)]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, and the folders are arguments, not commands
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
            timeout=READ_SECONDS,
        )
        output, said = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        said = f"stopped after {READ_SECONDS} seconds"
    reports = [parse_json(line, "its report") for line in output.splitlines() if line.startswith('{"widths"')]
    last = (said.strip().splitlines() or ["no message"])[-1]
    for target, folder in exports[len(reports) :]:
        reports.append({"widths": None, "problems": [f"{target} could not load {folder}: {last}"]})
    return reports
