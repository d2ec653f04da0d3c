"""Which files a model source names, and digests of their content; needs no torch.

A model, a reference or the weights of an extractor may be replaced in place, under the same path. What was made from a
file is therefore known by the file's bytes and never by its path.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqsearch import artifacts
from mpqsearch.errors import ArtifactError, ModelError, UnknownNameError
from mpqsearch.untrusted import build, file_name, read_json

REFERENCE = Path(__file__).parent / "models" / "reference"
EMBEDDED = ("fmnist-t2i", "fmnist-flow", "fmnist-unet", "fmnist-dit")
"""Denoisers that ship with the package; see the model cards beside their weights."""

COMPONENTS = ("unet", "transformer", "prior", "decoder")
"""Parts of a pipeline that may be its denoiser, in the order in which they are looked for."""

TOGETHER = (("transformer", "transformer_2"), ("transformer", "unconditional_transformer"))
"""Denoisers that one pipeline calls in turn: they are one model with two parts."""

ENCODER = "text_encoder"
"""How pipelines begin the names of their text encoders."""

AUTOENCODER = "vae"
"""The name of the autoencoder of a pipeline, which decodes its latents."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

WEIGHTS = "diffusion_pytorch_model"
"""How diffusers begins the names of weight files."""

SETTLED_S = 2.0
"""A file that was written more recently than this is hashed again: another write might leave its times as they are."""


def is_function(source: str) -> bool:
    """Whether a source is ``package.module:function``, which returns the model."""
    package, sign, name = source.partition(":")
    return bool(sign) and all(part.isidentifier() for part in (*package.split("."), name))


def local_folder(source: str) -> Path | None:
    """The folder of a source, embedded names included; None for ``owner/name`` of a hub and for
    ``package.module:function``.

    Raises `ModelError` or `UnknownNameError` when it is none of these.
    """
    if source in EMBEDDED:
        return REFERENCE / source
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.suffix in (*PICKLES, ".safetensors"):
        kind = "a pickle checkpoint, which may run code when loaded" if path.suffix in PICKLES else "a single file"
        raise ModelError(
            f"{source} is {kind}. Give a diffusers folder with config.json and *.safetensors; "
            "model.save_pretrained(folder, safe_serialization=True) writes one."
        )
    if is_function(source) or re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return None
    raise UnknownNameError(
        "model",
        source,
        EMBEDDED,
        "It is no folder here, no owner/name of a hub and no package.module:function either.",
    )


def model_name(source: str) -> str:
    """What a model is called in tables: its embedded name, the last part of its folder or hub identifier, or the name
    of the function that returns it."""
    if is_function(source):
        return source.partition(":")[2]
    return source if source in EMBEDDED else Path(source).expanduser().resolve().name


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `ModelError` when it is none."""
    return dict(build(dict, read_json(path, ModelError, infinite=True), str(path), ModelError))


def components_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of the components that a pipeline has, from its ``model_index.json``."""
    pairs = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
    return {
        file_name(name, "a component of a pipeline", ModelError): (str(library), str(kind))
        for name, (library, kind) in pairs.items()
        if kind
    }


def is_encoder(part: str) -> bool:
    """Whether a component of a pipeline is a text encoder, by its name."""
    return part.startswith(ENCODER)


def kind_of(name: str) -> str:
    """What a part of a pipeline is, by its name or that of a layer in it: ``text`` for a text encoder, ``autoencoder``,
    and the empty word for a denoiser."""
    if is_encoder(name):
        return "text"
    return "autoencoder" if name.partition(".")[0] == AUTOENCODER else ""


def denoisers_of(index: Mapping[str, Any], component: str | Sequence[str], source: str) -> dict[str, str]:
    """Classes of the denoisers of a pipeline by component name: one, or two that its pipeline calls in turn.

    ``component`` is the part that the user named; empty: the first of `COMPONENTS` that the pipeline has. Several are
    denoisers, then text encoders and the autoencoder. Raises `UnknownNameError` when there is none of this name, and
    `ModelError` for these without a denoiser.
    """
    found = components_of(index)
    if not isinstance(component, str) or is_encoder(component):
        return _parts_of(found, (component,) if isinstance(component, str) else component, source)
    first = component or next((p for p in COMPONENTS if p in found), "")
    if first not in found:
        raise UnknownNameError(
            f"component of the pipeline {source!r} ({index.get('_class_name')})",
            first or "/".join(COMPONENTS),
            found,
            "Name its denoiser with model.component.",
        )
    together = () if component else next((p for p in TOGETHER if all(n in found for n in p)), ())
    return {name: found[name][1] for name in together or (first,)}


def _parts_of(found: Mapping[str, tuple[str, str]], asked: Sequence[str], source: str) -> dict[str, str]:
    """Classes of several parts of a pipeline that share a budget, the denoisers first."""
    denoisers = {*COMPONENTS, *(name for pair in TOGETHER for name in pair)}
    decoders = {AUTOENCODER} if "Autoencoder" in found.get(AUTOENCODER, ("", ""))[1] else set()
    allowed = [n for n in found if n in denoisers | decoders or (is_encoder(n) and found[n][0] == "transformers")]
    for name in asked:
        if name not in allowed:
            why = f"{source!r} has {name!r}, which stays as it is. " if name in found else ""
            known = "Denoisers, text encoders and the autoencoder can be parts of a budget."
            raise UnknownNameError("part", name, allowed, why + known)
    if all(map(kind_of, asked)):
        raise ModelError(
            f"no denoiser is among {', '.join(asked)} of {source!r}: name a denoiser, too (allowed: "
            f"{', '.join(allowed)})"
        )
    return {name: found[name][1] for name in sorted(asked, key=lambda name: bool(kind_of(name)))}


def kept_components(source: str, component: str | Sequence[str]) -> dict[str, int]:
    """Bytes of the weights of a pipeline's other components, by name; none for a source that is no pipeline folder."""
    folder = local_folder(source)
    if folder is None or not (folder / "model_index.json").is_file():
        return {}
    index = read_config(folder / "model_index.json")
    others = [name for name in components_of(index) if name not in denoisers_of(index, component, source)]
    sizes = {n: sum(file.stat().st_size for file in (folder / n).glob("*.safetensors")) for n in others}
    return {name: size for name, size in sizes.items() if size}


def denoiser_folders(source: str, folder: Path, component: str | Sequence[str]) -> dict[str, Path]:
    """The folders with the denoisers' own ``config.json`` by the names of the parts; the name of a single one is empty.

    That is ``folder`` itself, or those of a pipeline folder. Raises `ModelError` when there is none, or when a
    component of a plain model is asked for.
    """
    folders = {"": folder}
    if (folder / "model_index.json").is_file():
        names = denoisers_of(read_config(folder / "model_index.json"), component, source)
        folders = {name if len(names) > 1 else "": folder / name for name in names}
    elif component:
        shown = component if isinstance(component, str) else ", ".join(component)
        raise ModelError(f"{source} is a model and no pipeline, so it has no component {shown!r}: leave it out")
    for inner in folders.values():
        if not (inner / "config.json").is_file():
            raise ModelError(
                f"{inner} has neither config.json nor model_index.json: it is no diffusers model or pipeline folder"
            )
    return folders


def model_files(source: str, component: str | Sequence[str] = "") -> dict[str, Path] | None:
    """The files that a denoiser and its samples depend on, by names that hold no path: of a model folder weights,
    configuration and scheduler, of a pipeline folder those of all its components.

    None for sources that are no folder, whose files are not looked for. Raises what `local_folder` and
    `denoiser_folders` raise.
    """
    folder = local_folder(source)
    if folder is None:
        return None
    (inner, *_) = denoiser_folders(source, folder, component).values()
    if (folder / "model_index.json").is_file():
        parts = components_of(read_config(folder / "model_index.json"))
        found = (p for name in parts for p in (folder / name).rglob("*") if p.suffix in _READ)
        files = {p.relative_to(folder).as_posix(): p for p in (*(folder / n for n in _MEANT), *found)}
    else:
        files = {n: inner / n for n in ("config.json", "denoiser.json", "scheduler_config.json")}
        files |= {p.name: p for pattern in ("safetensors", "json") for p in inner.glob(f"{WEIGHTS}*.{pattern}")}
        files["scheduler/scheduler_config.json"] = inner.parent / "scheduler" / "scheduler_config.json"
    return {name: path for name, path in sorted(files.items()) if path.is_file()}


_MEANT = ("model_index.json", "sampler.json", "prompts.txt")
"""Files of a pipeline folder that say what it is and how it is meant to be drawn."""

_READ = (".safetensors", ".json", ".txt", ".model")
"""Ends of the files that a pipeline is made from: weights, configurations, and the words of tokenizers."""


class FileDigests:
    """SHA-256 of files, remembered in ``record`` with their size, times and inode, and computed again when one differs.

    With ``record`` None they are remembered in memory only.
    """

    def __init__(self, record: Path | None) -> None:
        self._record = record
        self._entries: dict[str, Any] = {}
        if record is not None and record.is_file():
            with contextlib.suppress(ArtifactError):  # a damaged record is written anew
                self._entries = dict(artifacts.read_json(record, "mpqsearch/digests").data)

    def of(self, file: Path) -> str:
        """SHA-256 of the content of ``file``; ``absent`` when there is none."""
        file = file.resolve()
        try:
            stat = file.stat()
        except OSError:
            return "absent"
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = self._entries.get(str(file))
        if entry is not None and entry["seen"] == seen:
            return str(entry["sha256"])
        settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_S * 1e9
        digest = artifacts.digest_file(file)
        if settled:
            self._entries[str(file)] = {"seen": seen, "sha256": digest}
            if self._record is not None:
                artifacts.write_json(self._record, "mpqsearch/digests", self._entries, {})
        return digest

    def of_all(self, files: Mapping[str, Path]) -> str:
        """One digest of several files by name."""
        return artifacts.digest_of({name: self.of(path) for name, path in files.items()})
