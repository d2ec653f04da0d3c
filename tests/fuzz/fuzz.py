"""Malformed inputs for every reader: files that are right are cut, flipped, swapped, retyped, nested, blown up.

``make fuzz`` reads 5,000 of them, the tests 300; the number of an input is its seed. A finding is anything but the
right result or one error of ours: another exception, more than 10 s, more than 1.5 GB, a message of several lines or
with control characters, a secret in it, a file beside those that were there, and, of a file with a digest, a result
that differs from the unharmed one. Every fourth artifact is shown by the command line, whose exit code must be 0 or 2.

    python -m tests.fuzz.fuzz 5000
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mpqsearch import artifacts
from mpqsearch.cli.app import main
from mpqsearch.config import Config, load_config
from mpqsearch.core import BitMap, LayerSpec, LayerTable
from mpqsearch.errors import MpqsearchError
from mpqsearch.export import neutral_extra, read_map
from mpqsearch.methods.costs import CostTable
from mpqsearch.metrics import load_extractor
from mpqsearch.metrics.reference import load_reference, save_reference
from mpqsearch.models import Call, Calls, load_calls, save_calls
from mpqsearch.models.files import weight_files
from mpqsearch.prompts.reading import read_file
from mpqsearch.search import storage
from mpqsearch.secrets import redact
from mpqsearch.sources import denoiser_folders, model_files
from mpqsearch.untrusted import read_bytes
from tests.support import tiny_profile, tiny_table

SECONDS, KILOBYTES = 10.0, 1.5e6

TABLE = LayerTable(
    digest="d" * 64,
    layers=tuple(
        LayerSpec(name=f"blocks.{i}.{part}", kind="Linear", weight_shape=(8, 32), role="linear")
        for i in range(3)
        for part in ("to_q", "to_k")
    ),
)
SMALL = tiny_table(n_layers=2, channels=3, fan_in=4)
EXTRACTOR = load_extractor("random-conv", weights=None, device=torch.device("cpu"))


@dataclass(frozen=True)
class Reader:
    """One kind of input: ``write`` makes a right one in a folder and returns the file, ``read`` reads the folder.
    ``told`` is plain data of a result, for a kind of file that carries a digest."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    told: Callable[[Any], Any] | None = None


def _saved(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def _artifact(
    name: str, save: Callable[[Path], object], load: Callable[[Path], Any], told: Callable[[Any], Any] | None = None
) -> Reader:
    def write(folder: Path) -> Path:
        save(folder / name)
        return folder / name

    return Reader(write, lambda folder: load(folder / name), told)


def _text(name: str, text: str, load: Callable[[Path], Any]) -> Reader:
    return Reader(_saved(name, text), lambda folder: load(folder / name))


def _prompts(name: str, text: str) -> Reader:
    return _text(name, text, lambda path: read_file(path, {}))


def _calls(path: Path) -> None:
    x = torch.ones(1, 2, 4)
    call = Call(args=(x, 5, "a"), kwargs={"cond": {"b": (x, None, 0.5)}}, sample=x, timestep=1.0)
    save_calls(path, Calls([call], model="M"))


def _reference(path: Path) -> None:
    save_reference(path, torch.randn(5, EXTRACTOR.dim, generator=torch.Generator().manual_seed(0)), EXTRACTOR, "d", 3)


SECRET = "hunter22"


def _storage(folder: Path) -> None:
    """Open the storage that the file names; no server answers there."""
    url = read_bytes(folder / "url.txt").decode(errors="replace")
    storage.open_storage(url if "://" in url else folder)


def _foreign(name: str, data: Any) -> Reader:
    text = data if isinstance(data, str) else json.dumps(data)
    return Reader(_saved(name, text), lambda folder: read_map(folder / name, TABLE))


def _map(path: Path) -> None:
    bit_map = BitMap(model_digest=TABLE.digest, weights={la.name: np.array([2, 3] * 4) for la in TABLE})
    artifacts.save_bit_map(path, bit_map, {}, neutral_extra(TABLE, bit_map))


_LINEAR = {"quant_method": "sdnq", "weights_dtype": "int4", "modules_dtype_dict": {"int8": ["blocks.0.*", "to_q"]}}
_AUTOROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "block_name_to_quantize": "blocks",
    "extra_config": {"blocks.0.to_q": {"bits": 8}, ".*to_k": {"bits": 2}},
}
_TORCHAO = {
    "_type": "FqnToConfig",
    "_version": 1,
    "_data": {
        "fqn_to_config": {
            "_default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}},
            "re:blocks\\.[01]\\..*": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {}},
        }
    },
}
_MODELOPT = {"quant_cfg": [{"quantizer_name": "*to_q.weight_quantizer", "cfg": {"num_bits": 4}}]}

READERS: dict[str, Reader] = {
    "layers": _artifact(
        "layers.json",
        lambda p: artifacts.save_layers(p, SMALL, {"a": "b"}),
        artifacts.load_layers,
        lambda table: table.to_data(),
    ),
    "profile": _artifact(
        "profile.json",
        lambda p: artifacts.save_profile(p, tiny_profile(SMALL, (2, 4)), {}),
        artifacts.load_profile,
        lambda profile: profile.header(),
    ),
    "calls": _artifact("calls.safetensors", _calls, load_calls, lambda calls: (calls.digest, calls.model, calls.seen)),
    "reference": _artifact("reference.safetensors", _reference, lambda path: load_reference(path, EXTRACTOR)),
    "weights": _artifact(
        "diffusion_pytorch_model.safetensors",
        lambda path: save_file({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}, path),
        lambda path: weight_files(path.parent).tensors,
    ),
    "costs": _text("costs.csv", "layer,bits,cost,act_bits\na,3,1.5,8\nb,4,2e-3,16\n", CostTable.read),
    "prompts.txt": _prompts("prompts.txt", "a cat\na dog, asleep\n"),
    "prompts.csv": _prompts("prompts.csv", 'prompt,negative,label\n"a, b",c,1\nd,,2\n'),
    "prompts.jsonl": _prompts("prompts.jsonl", '{"prompt": "a", "label": 3}\n"b"\n'),
    "prompts.json": _prompts(
        "prompts.json",
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 1, "caption": "a dog"}],
            }
        ),
    ),
    "prompts.yaml": _prompts("prompts.yaml", "one: {prompt: a cat}\ntwo:\n  prompt: &b a dog\nthree: *b\n"),
    "storage": Reader(
        _saved("url.txt", f"postgresql://me:{SECRET}@127.0.0.1:1/db?token={SECRET}&odbc_connect=PWD={SECRET}"), _storage
    ),
    "bitmap": _artifact("bitmap.json", _map, lambda p: read_map(p, TABLE)),
    "config": Reader(_saved("study.toml", Config().to_toml()), lambda folder: load_config(folder / "study.toml")),
    "sdnq": _foreign("quantization_config.json", _LINEAR),
    "autoround": _foreign("config.json", {"quantization_config": _AUTOROUND}),
    "torchao": _foreign("torchao_config.json", _TORCHAO),
    "modelopt": _foreign("modelopt_config.json", _MODELOPT),
    "quanto": _foreign("quanto_qmap.json", {la.name: {"weights": "qint4", "activations": "none"} for la in TABLE}),
    "mlx": _foreign("config.json", {"quantization": {"group_size": 32, "bits": 4, "blocks.0.to_q": {"bits": 8}}}),
    "sdcpp": _foreign("sdcpp_rules.txt", "^blocks\\.0\\.to_q\\.weight$=q8_0,to_k=q4_0"),
    "ctq": _foreign("ctq_layers.json", {r"blocks\.0": {"format": "int8_tensorwise"}, "_default": {"skip": True}}),
    "diffsynth": _foreign(
        "diffsynth_quant.json", {"configs": [{"method": "bitsandbytes_nf4", "target_modules": ["to_q"]}]}
    ),
    "cachedit": _foreign(
        "cache_dit_quant.json", {"precision_plan": {"to_q": "int4_weight_only"}, "quant_type": "int8"}
    ),
    "comfyui": _foreign(
        "comfyui_metadata.json",
        {"_quantization_metadata": {"format_version": "1.0", "layers": {"blocks.0.to_q": {"format": "nvfp4"}}}},
    ),
    "pipeline": Reader(
        _saved("model_index.json", json.dumps({"_class_name": "P", "unet": ["diffusers", "UNet2DModel"]})),
        lambda folder: (denoiser_folders("m", folder, ""), model_files(str(folder))),
    ),
}

HARMFUL: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 2**70, 10**400, 1e308, "", "x", "../../escaped", "a\0b", "\x1b[31m", "\u202e",
    "=cmd|'x'!A1", [], {}, [[8, 300_000_000]], [[1]] * 1000, {"a": {"b": {}}}, "(a|aa|.)*\\.\\d\\d\\d$", "(" * 200,
    "*" * 500, "x" * 100_000, "\ud800", "ключ", [None], {"": None},
)  # fmt: skip
"""Values that take the place of others."""


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in plain data."""
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


def _changed(data: Any, draw: random.Random) -> Any:
    """Plain data with one value replaced, removed, renamed or wrapped many times."""
    place = draw.choice([p for p in places(data) if p] or [()])
    if not place:
        return draw.choice(HARMFUL)
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    kind, key = draw.randrange(5), place[-1]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(("nam", "\x1b", "a" * 300, "../x", ""))] = holder.pop(key)
    elif kind == 2:
        for _ in range(draw.choice((2, 90, 200))):
            holder[key] = [holder[key]]
    else:
        holder[key] = draw.choice(HARMFUL)
    return data


def _inside(raw: bytes, draw: random.Random) -> bytes:
    """A file of JSON, or one of safetensors, with its data changed and signed again. Raises `ValueError` for others."""
    if raw[8:9] != b"{":
        return json.dumps(signed(_changed(json.loads(raw), draw))).encode()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    if draw.random() < 0.5 and isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["mpqsearch"] = json.dumps(
            _changed(json.loads(header["__metadata__"]["mpqsearch"]), draw)
        )
    else:
        header = _changed(header, draw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[end:]


def harmed(raw: bytes, draw: random.Random) -> tuple[bytes, bool]:
    """A right file after one to three mutations, and whether one of them signed it again."""
    again = False
    for _ in range(draw.randint(1, 3)):
        kind = draw.randrange(9)
        at = draw.randrange(len(raw) + 1)
        if kind == 0:
            raw = raw[:at]
        elif kind == 1 and raw:
            raw = raw[: at - 1] + bytes([raw[at - 1] ^ 1 << draw.randrange(8)]) + raw[at:]
        elif kind == 2:
            raw = raw[:at] + raw[at + draw.randint(1, 40) :]
        elif kind == 3:
            raw = (
                raw[:at] + draw.choice((b"\0", b"\xff", b"[" * 100_000, b"NaN", b"1e999", b'"', b"9" * 5000)) + raw[at:]
            )
        elif kind == 4:
            raw = raw[at:] + raw[:at]
        else:
            try:
                raw, again = _inside(raw, draw), True
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
    return raw, again


def signed(body: Any) -> Any:
    """An envelope with a right digest, so that what is behind it is reached as well."""
    if isinstance(body, dict) and isinstance(body.get("digest"), str) and {"schema", "version", "inputs"} <= set(body):
        body["digest"] = artifacts._digest(body, body.get("data"))
    return body


def findings(seed: int, folder: Path) -> str:
    """What is wrong with how one input is read; empty when nothing is."""
    draw = random.Random(seed)
    name = draw.choice(sorted(READERS))
    reader = READERS[name]
    file = reader.write(folder)
    right = None if reader.told is None else reader.told(reader.read(folder))
    raw, again = harmed(file.read_bytes(), draw)
    if draw.random() < 0.02:
        file.unlink()
        file.symlink_to(draw.choice((file, folder, Path("/dev/zero"), Path("/dev/null"), folder / "none")))
    else:
        file.write_bytes(raw)
    before, began = sorted(folder.rglob("*")), time.process_time()
    problem = ""
    try:
        if reader.told is not None and name != "calls" and draw.random() < 0.25:
            problem = _shown(file)
        else:
            found = reader.read(folder)
            if reader.told is not None and not again and reader.told(found) != right:
                problem = "a harmed file gave another result"
    except MpqsearchError as error:
        text = redact(str(error))
        if len(text) > 3000 or any(c < " " for c in text.replace("\n", "")) or SECRET in text:
            problem = f"a message that cannot be shown: {text[:200]!r}"
    except Exception as error:  # noqa: BLE001 - what is looked for
        problem = f"{type(error).__name__}: {str(error)[:300]}"
    spent = time.process_time() - began
    if spent > SECONDS:
        problem += f" {spent:.1f} s"
    if sorted(folder.rglob("*")) != before:
        problem += " files were written"
    return f"seed {seed}, {name}: {problem}" if problem else ""


def _shown(file: Path) -> str:
    """What is wrong with how the command line shows a file."""
    said, printed = io.StringIO(), io.StringIO()
    sys.argv = ["mpqsearch", "inspect", str(file)]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        code: object = None
        try:
            main()
        except SystemExit as error:
            code = error.code
    text = said.getvalue() + printed.getvalue()
    if code not in (0, 2) or any(c < " " for c in text.replace("\n", "").replace("\t", "")):
        return f"inspect ends with {code}: {text[-300:]!r}"
    return ""


def run(seeds: range) -> list[str]:
    """The findings of some inputs, each in a folder of its own."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # a mutated name may become a file
            found.append(findings(seed, Path(folder)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [f for f in found if f] + ([f"{peak} kB at the peak"] if peak > KILOBYTES else [])


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    wrong = run(range(n))
    print("\n".join(wrong))
    print(f"{n} inputs, {len(wrong)} findings")
    sys.exit(bool(wrong))
