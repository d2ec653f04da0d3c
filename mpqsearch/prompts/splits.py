"""Which prompt and class each seed has: no prompt that something was fitted to or chosen on is in the report."""

from __future__ import annotations

import logging
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

from mpqsearch.artifacts import digest_of
from mpqsearch.errors import ConfigError
from mpqsearch.prompts.reading import Prompt, name_seed, read_file
from mpqsearch.specs.prompts import PromptsSpec

log = logging.getLogger("mpqsearch")

BANDS = {
    "report": 0,
    "calibration": 1_000_000,
    "training": 2_000_000,
    "development": 3_000_000,
    "search": 4_000_000,
}
"""The first seed of each split; the next begins where it ends."""

FITTED = {"calibration": 30, "training": 30, "development": 20, "search": 20}
"""Per cent of the prompts that are not the report's."""

FEWEST = 5
"""Prompts beside the report's with which each split gets one of its own."""

PRESET_REPORT = 5000
"""Prompts that the field reports on: MJHQ-30K and sDCI in SVDQuant."""


def split_of(seed: int) -> str:
    """The split of a seed, by `BANDS`. Raises `ConfigError` for a negative seed."""
    if seed < 0:
        raise ConfigError(f"seeds are at least 0, got {seed}")
    return next(split for split, first in reversed(BANDS.items()) if seed >= first)


def band_of(split: str) -> tuple[int, int]:
    """The first seed of a split, and the first that is not of it."""
    firsts = [*BANDS.values(), sys.maxsize]
    place = list(BANDS).index(split)
    return firsts[place], firsts[place + 1]


@dataclass(frozen=True, repr=False)
class Prompts:
    """What each seed's sample shows: prompts, or classes.

    splits
        Prompts by split, in the order of seeds; empty: classes.
    classes
        Shown in turn where there are no prompts.
    by_name
        The noise of the report's samples is seeded by their names.
    """

    splits: Mapping[str, tuple[Prompt, ...]] = field(default_factory=dict)
    classes: tuple[int, ...] = ()
    by_name: bool = False

    def of(self, seed: int) -> Prompt:
        """What the sample of this seed shows, and the seed of its noise.

        The seed's place in its band, modulo the number of prompts, is the prompt's place in its split. ``noise_seed``
        is the seed itself; with a preset, the report's is `name_seed` of the image's name. Without prompts the label
        is ``classes[seed % len(classes)]``.

        Raises `ConfigError` for a negative seed, and past the last prompt of a preset's report: noise would repeat.
        """
        split = split_of(seed)
        listed = self.splits.get(split)
        if not listed:
            return Prompt(label=self.classes[seed % len(self.classes)], noise_seed=seed)
        place, named = seed - BANDS[split], self.by_name and split == "report"
        if named and place >= len(listed):
            raise ConfigError(
                f"the report has {len(listed)} prompts, seed {seed} is past them: with a preset each is shown once. "
                "Take fewer evaluate.samples, or more prompts.report."
            )
        prompt = listed[place % len(listed)]
        return replace(prompt, noise_seed=name_seed(prompt.name) if named else seed)

    def check(self, *, n_classes: int) -> None:
        """Raise `ConfigError` when a class-conditional model with classes 0 .. n_classes - 1 cannot show these."""
        labels = [*self.classes, *(prompt.label for prompt in self._all())]
        if not n_classes:
            raise ConfigError("the model takes neither prompts nor classes: leave [prompts] out")
        if None in labels:
            raise ConfigError(
                "the model is asked for classes, and a prompt has none: give the file a column 'label', or set "
                "prompts.classes in its place"
            )
        wrong = next((label for label in labels if label is not None and label >= n_classes), None)
        if wrong is not None:
            raise ConfigError(f"the class {wrong} does not exist: the model has the classes 0..{n_classes - 1}")

    @property
    def has_text(self) -> bool:
        """Whether there are texts to show."""
        return any(prompt.text for prompt in self._all())

    @property
    def has_negative(self) -> bool:
        """Whether there are texts that should not be shown."""
        return any(prompt.negative for prompt in self._all())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the seeds show."""
        splits = {
            split: [[p.text, p.negative, p.label, p.name if self.by_name else None] for p in listed]
            for split, listed in self.splits.items()
        }
        return digest_of({"splits": splits, "classes": self.classes, "by_name": self.by_name})

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(listed)}" for split, listed in self.splits.items())
        return f"Prompts({sizes or f'{len(self.classes)} classes'})"

    def _all(self) -> Iterable[Prompt]:
        return (prompt for listed in self.splits.values() for prompt in listed)


def read_prompts(spec: PromptsSpec) -> Prompts | None:
    """Prompts or classes of a configuration; None when it names neither.

    One file is divided so: its prompts, repetitions left out, are shuffled with seed 0 (files are often sorted), the
    first half is the report's, and of the rest calibration and training get 30 % each, development and search 20 %
    each. Fewer than 10 prompts serve all splits, in their order and with a warning. With a ``calibration_file`` all of
    ``file`` is the report's, and the other splits share that file, without the prompts that ``file`` has as well.
    The first k seeds of the report show the first k of the shuffled prompts: with a preset, those on which
    deepcompressor reports k images.

    Raises `ConfigError` for what `read_file` refuses, for a preset without names, and when too few prompts are left
    beside the report's.
    """
    if spec.file:
        return Prompts(splits=_splits(_read(spec.file, spec), spec), by_name=bool(spec.preset))
    return Prompts(classes=spec.classes) if spec.classes else None


def prompts_of(texts: Sequence[str]) -> Prompts:
    """Prompts that are there already, divided as `read_prompts` divides those of a file.

    Raises `ConfigError` when there are none, or when one is empty.
    """
    wrong = next((text for text in texts if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None or not len(texts):
        raise ConfigError(f"prompts are texts, at least one and none of them empty, got {wrong if texts else texts!r}")
    return Prompts(splits=_splits([Prompt(text=text) for text in texts], PromptsSpec()))


def _splits(entries: list[Prompt], spec: PromptsSpec) -> dict[str, tuple[Prompt, ...]]:
    if spec.preset:
        _check_names(entries, spec)
    else:
        entries = _unique(entries)
    apart = _read(spec.calibration_file, spec) if spec.calibration_file else []
    shuffled, n = _shuffled(entries), _report_size(spec, len(entries))
    report = tuple(shuffled[:n])
    rest = _unique(_shuffled(apart) if apart else shuffled[n:], without=report)
    if len(rest) >= FEWEST:
        return {"report": report, **_shares(rest)}
    if apart and rest:
        log.warning("%s: the same %d prompts serve all that is fitted or chosen.", spec.calibration_file, len(rest))
        return {"report": report, **dict.fromkeys(FITTED, tuple(rest))}
    if apart:
        raise ConfigError(f"every prompt of {spec.calibration_file} is in {spec.file}, the report's, as well")
    if spec.preset or spec.report:
        raise ConfigError(
            f"{spec.file} has {len(entries)} prompts, and {n} for the report leave {len(rest)} for calibration, "
            f"training, development and search, which need {FEWEST}. Set prompts.calibration_file (the field takes 128 "
            "captions of COCO) or fewer prompts.report."
        )
    log.warning(
        "%d prompts are too few to keep apart (10 are needed), so all of them serve calibration and the report alike. "
        "What is made fits these prompts, and the report says nothing of others.",
        len(entries),
    )
    return dict.fromkeys(BANDS, tuple(entries))


def _read(file: str, spec: PromptsSpec) -> list[Prompt]:
    return read_file(Path(file).expanduser(), spec.columns)


def _check_names(entries: Sequence[Prompt], spec: PromptsSpec) -> None:
    """Raise `ConfigError` unless every prompt has a name of its own."""
    names = [entry.name for entry in entries]
    if "" in names:
        raise ConfigError(
            f"the preset {spec.preset} seeds noise by the names of images, which {spec.file} has not. It reads "
            "meta_data.json of MJHQ-30K, sDCI.yaml, dataset_coco.json, or a column 'name'."
        )
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"{spec.file} has the image {name!r} twice: with a preset both would have the same noise")


def _report_size(spec: PromptsSpec, available: int) -> int:
    if spec.report > available:
        raise ConfigError(f"prompts.report is {spec.report}, {spec.file} has {available} different prompts")
    if spec.report or spec.calibration_file:
        return spec.report or available
    return min(PRESET_REPORT, available) if spec.preset else (available + 1) // 2


def _unique(prompts: Sequence[Prompt], without: Sequence[Prompt] = ()) -> list[Prompt]:
    """The first of each text and class, in order, leaving out those of ``without``."""
    seen = {(p.text, p.label) for p in without}
    kept = []
    for p in prompts:
        key = (p.text, p.label)
        if key not in seen:
            seen.add(key)
            kept.append(p)
    return kept


def _shuffled(prompts: Sequence[Prompt]) -> list[Prompt]:
    copy = list(prompts)
    random.Random(0).shuffle(copy)  # noqa: S311 - the field's rule
    return copy


def _shares(rest: Sequence[Prompt]) -> dict[str, tuple[Prompt, ...]]:
    bounds = [len(rest) * per_cent // 100 for per_cent in accumulate(FITTED.values(), initial=0)]
    return {split: tuple(rest[a:b]) for split, (a, b) in zip(FITTED, pairwise(bounds), strict=True)}
