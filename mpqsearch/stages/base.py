"""The run folder that all stages share: paths, the model, timing, progress bars."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mpqsearch import artifacts
from mpqsearch.config import Config
from mpqsearch.core import Budget, LayerTable, SensitivityProfile
from mpqsearch.errors import ArtifactError, ConfigError, StaleArtifactError
from mpqsearch.progress import bar_of, check_interrupt, is_watched, say
from mpqsearch.prompts import Prompts, read_prompts
from mpqsearch.sources import REFERENCE, FileDigests, model_files, model_name
from mpqsearch.untrusted import file_name

if TYPE_CHECKING:
    from mpqsearch.metrics import DataReference, FeatureExtractor, Scorer
    from mpqsearch.models import Denoiser, StreamedModel

log = logging.getLogger("mpqsearch")

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass
class Run:
    """One run folder with its configuration: what the stages read and write. ``table`` and ``profile`` are there once
    the stages of these names have run. With ``reads_only`` nothing is measured: what is not there is an error that
    names the verb that makes it."""

    config: Config
    folder: Path
    overwrite: bool = False
    dry_run: bool = False
    reads_only: bool = False
    given: Denoiser | None = None
    say: Say = say
    table: LayerTable = field(init=False, repr=False)
    profile: SensitivityProfile = field(init=False, repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    _shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model with the runner of the study, loaded once; or the one that was given."""
        if self.given is not None:
            return self.given
        from mpqsearch.models import load_calls
        from mpqsearch.sampling import load_model

        c, captured = self.config.model, self.config.calibration.captured
        return load_model(
            c.source,
            device=c.device,
            revision=c.revision,
            dtype=c.dtype,
            component=self.config.component,
            sampler=self.config.sampler,
            prompts=self.prompts,
            calls=load_calls(captured) if captured else None,
            encoded=self._encoded,
        )

    @cached_property
    def prompts(self) -> Prompts | None:
        """What samples are asked to show, by seed."""
        return read_prompts(self.config.prompts)

    @property
    def _encoded(self) -> Path | None:
        """Where encoded prompts are kept: by the content of the pipeline, so that other weights never answer."""
        files = None if self.dry_run else model_files(self.config.model.source, self.config.component)
        return None if files is None else self.path("stats", f"prompts-{self.files.of_all(files)[:16]}")

    @cached_property
    def apart(self) -> tuple[str, ...]:
        """Parts of the model of which each keeps to a budget by itself; none where they share it. Raises `ConfigError`
        for a model with one part."""
        if self.config.budget.combine == "sum":
            return ()
        from mpqsearch.models.runner import parts_of  # imports torch, which nothing else here needs

        module = self.streamed.module if self.config.calibration.weights_only else self.denoiser.module
        parts = self.config.budget.parts or tuple(parts_of(module))
        if len(parts) < 2:
            raise ConfigError(
                f'budget.combine = "max" compares parts, and {self.config.model.source} has one denoiser: name text '
                "encoders in budget.parts, or leave combine out"
            )
        return parts

    @cached_property
    def streamed(self) -> StreamedModel:
        """The model with its weights left on disk."""
        from mpqsearch.models import open_streamed

        return open_streamed(self.config.model.source, component=self.config.component)

    @cached_property
    def files(self) -> FileDigests:
        """Digests of files by content, remembered in the run folder."""
        return FileDigests(None if self.dry_run else self.path("stats", "digests.json"))

    @property
    def source_inputs(self) -> dict[str, str]:
        """Digests of the content that the model and its samples come from, whatever its path: files, prompts, recorded
        calls, and settings.

        The files of a hub source are not looked for: its weights are loaded and count by themselves with what its
        runner says of the rest, as those of a given model do.
        """
        c, captured = self.config.model, self.config.calibration.captured
        files = model_files(c.source, self.config.component) if self.given is None else None
        inputs = {
            "model_files": self.files.of_all(files) if files is not None else self._loaded_digest,
            "model_settings": artifacts.digest_of([self.config.component, c.dtype, dict(self.config.sampler.call)]),
        }
        inputs |= {"prompts": self.prompts.digest} if self.prompts is not None else {}
        return inputs | ({"calls": self.files.of(Path(captured))} if captured else {})

    @property
    def _loaded_digest(self) -> str:
        return artifacts.digest_of([self.denoiser.digest, self.denoiser.runner.identity])

    def digests(self, *tables: str) -> dict[str, str]:
        """Digests of tables of the configuration, by their names."""
        data = self.config.to_data()
        return {name: artifacts.digest_of(data[name]) for name in tables}

    @property
    def evaluation_inputs(self) -> dict[str, str]:
        """Digests of what measures samples: the settings, and the content of the extractor and of the reference."""
        c = self.config.evaluate
        # What "auto" stands for follows from the model, which is among the inputs of all that is measured.
        names = tuple(p.name for p in sorted(REFERENCE.iterdir())) if c.extractor == "auto" else (c.extractor,)

        def digest(given: str, file: str) -> str:
            if given and file == "model.safetensors" and c.extractor in ("clip", "dinov2"):
                from mpqsearch.metrics.text import model_files

                return self.files.of_all(model_files(given, c.extractor))
            if given:
                return self.files.of(Path(given))
            return self.files.of_all({name: REFERENCE / name / file for name in names})

        inputs = {
            "evaluate": artifacts.digest_of([c.samples, c.first_seed, c.extractor]),
            "extractor_weights": digest(c.extractor_weights, "model.safetensors"),
            "reference": digest(c.reference, "reference.safetensors"),
        }
        for i, text in enumerate(c.scorers):
            from mpqsearch.metrics.named import scorer_inputs

            name, files = scorer_inputs(text)
            inputs[f"scorer {i}"] = artifacts.digest_of([name, self.files.of_all(files)])
        return inputs

    @cached_property
    def picture(self) -> tuple[int, ...] | None:
        """Shape of one sample as it is looked at: ``(C, H, W)``, of a video ``(F, C, H, W)``; None for what is none."""
        path, inputs = self.path("stats", "picture.json"), self.source_inputs | self.digests("sampler")
        if artifacts.is_current(path, "mpqsearch/picture", inputs, overwrite=True):
            shape = artifacts.read_json(path, "mpqsearch/picture").data["shape"]
            return None if shape is None else tuple(shape)
        found = self.denoiser.runner.picture(self.denoiser.module)
        if not self.dry_run:
            artifacts.write_json(path, "mpqsearch/picture", {"shape": found and list(found)}, inputs)
        return found

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The features that samples are measured with, on the device of the run."""
        from mpqsearch.metrics import AUTO, extractor_for, load_extractor
        from mpqsearch.models import resolve_device

        c, name = self.config.evaluate, self.config.evaluate.extractor
        if name == AUTO:
            model = model_name(self.config.model.source) if self.given is None else self.given.name
            name = extractor_for((self.picture or ())[-3:], model)
        weights = Path(c.extractor_weights) if c.extractor_weights else None
        return load_extractor(name, weights=weights, device=resolve_device(self.config.model.device))

    @cached_property
    def data_reference(self) -> DataReference | None:
        """Statistics of the data that samples are measured against, if there are any."""
        from mpqsearch.metrics import load_reference

        c = self.config.evaluate
        return load_reference(Path(c.reference) if c.reference else None, self.extractor)

    @cached_property
    def scorers(self) -> tuple[Scorer, ...]:
        """Scores of single pictures beside those of the extractor."""
        from mpqsearch.metrics import load_scorer
        from mpqsearch.models import resolve_device

        device = resolve_device(self.config.model.device)
        return tuple(load_scorer(text, device=device) for text in self.config.evaluate.scorers)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once in this process: what takes the model to measure and several maps share."""
        if key not in self._shared:
            self._shared[key] = make()
        value: T = self._shared[key]
        return value

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of a block to the record of its stage."""
        check_interrupt()
        began = time.perf_counter()
        try:
            with bar_of(stage, 0, enabled=not is_watched()):
                yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def path(self, *parts: str) -> Path:
        """A path in the run folder. Raises `ConfigError` when a part, such as a method's name, would lead out of it."""
        return self.folder.joinpath(*(file_name(part, "a method, budget, target or import") for part in parts))


def slug(method: str, budget: Budget) -> str:
    """Folder name of one allocation."""
    return f"{method}@{budget.label().replace(':', '-')}"


def start(run: Run) -> None:
    """Write the resolved configuration and the environment of this run.

    Raises `ArtifactError` when a map from elsewhere is missing, which would else show after the profile.
    """
    for name, file in run.config.allocate.maps.items():
        if not Path(file).exists():
            raise ArtifactError(
                f"{file} does not exist (allocate.maps.{name}, or --map). Name a file that `mpqsearch import` wrote "
                "or can read, or leave it out."
            )
    if run.dry_run:
        return
    artifacts.write_text(run.path("config.toml"), run.config.to_toml())
    artifacts.write_json(run.path("environment.json"), "mpqsearch/environment", artifacts.environment(), {})


def same_model(run: Run) -> None:
    """Raise `StaleArtifactError` when the weights are not those of ``layers.json``."""
    if run.denoiser.digest != run.table.digest:
        raise StaleArtifactError(
            f"the weights of {run.config.model.source} ({run.denoiser.digest[:10]}) are not those that "
            f"{run.path('layers.json')} was made "
            f"from ({run.table.digest[:10]}). Use another --run-dir, or --overwrite to make everything again."
        )
