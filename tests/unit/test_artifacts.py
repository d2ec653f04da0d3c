from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqsearch import artifacts
from mpqsearch.core import BitMap
from mpqsearch.errors import ArtifactError, MpqsearchError, StaleArtifactError
from tests.support import tiny_profile, tiny_table


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    artifacts.write_json(path, "mpqsearch/metrics", {"x": [1, 2]}, {"model": "abc"})
    found = artifacts.read_json(path, "mpqsearch/metrics")
    assert found.data == {"x": [1, 2]}
    assert found.inputs == {"model": "abc"}
    with pytest.raises(ArtifactError, match="'mpqsearch/profile' is needed"):
        artifacts.read_json(path, "mpqsearch/profile")
    with pytest.raises(ArtifactError, match="NaN"):
        artifacts.write_json(path, "mpqsearch/metrics", {"x": float("nan")}, {})
    assert artifacts.read_json(path, "mpqsearch/metrics").data == {"x": [1, 2]}, (
        "the refused write must not touch the file"
    )
    with pytest.raises(ArtifactError, match="does not exist"):
        artifacts.read_json(tmp_path / "none.json", "mpqsearch/metrics")


@pytest.mark.parametrize("damage", ["", "{", '{"schema": "mpqsearch/metrics"}', "[1]", "\x00\x01"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(damage)
    with pytest.raises(ArtifactError, match=r"a\.json is damaged"):
        artifacts.read_json(path, "mpqsearch/metrics")


def test_newer_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, "mpqsearch/metrics", {}, {})
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "version": artifacts.VERSIONS["mpqsearch/metrics"] + 1}))
    with pytest.raises(ArtifactError, match="Upgrade"):
        artifacts.read_json(path, "mpqsearch/metrics")


def test_stale_outputs_name_the_inputs_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert not artifacts.is_current(path, "mpqsearch/metrics", {"model": "a" * 64})
    artifacts.write_json(path, "mpqsearch/metrics", {}, {"model": "a" * 64, "sampler": "s"})
    assert artifacts.is_current(path, "mpqsearch/metrics", {"model": "a" * 64, "sampler": "s"})
    with pytest.raises(
        StaleArtifactError, match=r"model \(aaaaaaaaaa on disk, bbbbbbbbbb now\).*--overwrite"
    ) as caught:
        artifacts.is_current(path, "mpqsearch/metrics", {"model": "b" * 64, "sampler": "s"})
    assert "sampler" not in str(caught.value)
    assert caught.value.exit_code == 4
    assert not artifacts.is_current(path, "mpqsearch/metrics", {"model": "b"}, overwrite=True)


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, "mpqsearch/metrics", {"old": 1}, {})

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="disk is full"):
        artifacts.write_json(path, "mpqsearch/metrics", {"new": 1}, {})
    monkeypatch.undo()
    assert artifacts.read_json(path, "mpqsearch/metrics").data == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_interrupt_while_writing_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), artifacts.atomic_write(tmp_path / "x.bin") as handle:
        handle.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_profile_round_trip_checks_its_arrays(tmp_path: Path) -> None:
    profile = tiny_profile(tiny_table())
    path = tmp_path / "profile.json"
    artifacts.save_profile(path, profile, {"model": "m"})
    back = artifacts.load_profile(path)
    assert back.names == profile.names
    assert back.formats == profile.formats
    assert {"asymmetric", "asymmetric+smooth", "auto"} <= set(back.formats)
    for key, array in profile.arrays.items():
        np.testing.assert_array_equal(back.arrays[key], array)
    side = path.with_suffix(".npz")
    side.write_bytes(side.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"profile\.npz"):
        artifacts.load_profile(path)
    side.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        artifacts.load_profile(path)


def big_map(n: int) -> BitMap:
    rng = np.random.default_rng(0)
    return BitMap(model_digest="d", weights={"a": rng.integers(1, 9, n), "b": np.array(3)})


@pytest.mark.parametrize("n", [100, artifacts.SIDECAR_CHANNELS + 1])
def test_bit_maps_of_any_length_come_back(tmp_path: Path, n: int) -> None:
    path = tmp_path / "bitmap.json"
    artifacts.save_bit_map(path, big_map(n), {})
    assert path.with_suffix(".safetensors").exists() == (n > artifacts.SIDECAR_CHANNELS)
    assert artifacts.load_bit_map(path).digest == big_map(n).digest


def test_a_tampered_or_foreign_sidecar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bitmap.json"
    artifacts.save_bit_map(path, big_map(5000), {})
    side = path.with_suffix(".safetensors")
    raw = bytearray(side.read_bytes())
    raw[-1] ^= 1
    side.write_bytes(bytes(raw))
    with pytest.raises(ArtifactError, match="not the file"):
        artifacts.load_bit_map(path)
    body: dict[str, Any] = json.loads(path.read_text())
    body["data"]["sidecar"]["file"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        artifacts.load_bit_map(path)
    del body["digest"]  # another program's file
    path.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="same folder"):
        artifacts.load_bit_map(path)


def test_arrays_of_any_name_and_kind_round_trip(tmp_path: Path) -> None:
    arrays = {"file": np.arange(3), "allow_pickle": np.zeros((0, 2)), "a:b/c": np.array(True), "x": np.array(["é"])}
    artifacts.write_arrays(tmp_path / "a.npz", arrays)
    back = artifacts.read_arrays(tmp_path / "a.npz")
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
    with pytest.raises(ValueError, match="Object arrays"):
        artifacts.write_arrays(tmp_path / "b.npz", {"x": np.array([{}])})
    assert not (tmp_path / "b.npz").exists()


def mutations(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in plain data, and of every container."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from mutations(inner, (*at, key))
    elif isinstance(value, list) and value:
        yield from mutations(value[0], (*at, 0))


def signed(body: Any) -> Any:
    """An envelope whose digest is right, whatever it holds: what a careful forger writes."""
    if isinstance(body, dict) and {"schema", "version", "inputs", "data"} <= set(body) and "digest" in body:
        told = [body[key] for key in ("schema", "version", "inputs")] + [body.get("files", {}), body["data"]]
        body["digest"] = hashlib.sha256(json.dumps(told, separators=(",", ":")).encode()).hexdigest()
    return body


WRONG = (None, -1, 0.5, "x", [], {}, [None], 10**30, True)


@pytest.mark.parametrize("kind", ["layers", "profile", "bitmap"])
def test_a_file_with_one_wrong_value_is_read_or_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    table = tiny_table(n_layers=2, channels=3, fan_in=4)
    path = tmp_path / f"{kind}.json"
    if kind == "layers":
        artifacts.save_layers(path, table, {})
    elif kind == "profile":
        artifacts.save_profile(path, tiny_profile(table, (2, 4)), {})
    else:
        weights = {layer.name: np.array([2, 3, 4], dtype=np.uint8) for layer in table}
        artifacts.save_bit_map(path, BitMap(model_digest=table.digest, weights=weights), {})
    load = {"layers": artifacts.load_layers, "profile": artifacts.load_profile, "bitmap": artifacts.load_bit_map}[kind]
    good = path.read_text()
    refused = 0
    for place in mutations(json.loads(good)):
        for wrong in WRONG:
            holder: Any = {"top": json.loads(good)}
            inner = holder
            for key in ("top", *place)[:-1]:
                inner = inner[key]
            inner[("top", *place)[-1]] = wrong
            path.write_text(json.dumps(signed(holder["top"])))
            try:
                load(path)
            except MpqsearchError:
                refused += 1
    assert refused > 50
