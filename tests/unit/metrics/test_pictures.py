"""Statistics of a folder of pictures: what is read, what is refused, and the verb that writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mpqsearch.cli import app
from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.metrics import load_extractor, load_reference
from mpqsearch.metrics.pictures import picture_features, picture_files


def painted(folder: Path, n: int = 5, shape: tuple[int, ...] = (40, 60, 3)) -> list[np.ndarray]:
    rng, pictures = np.random.default_rng(0), []
    for i in range(n):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        path = folder / ("inner" if i % 2 else ".") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        pictures.append(pixels)
    return pictures


def test_the_verb_writes_the_statistics_of_the_pixels(tmp_path: Path) -> None:
    painted(tmp_path / "photos")
    (tmp_path / "photos/notes.txt").write_text("no picture")
    file, extractor = tmp_path / "photos.safetensors", load_extractor("random-conv")
    arguments = ["reference", str(tmp_path / "photos"), "--extractor", "random-conv", "-o", str(file)]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0
    assert "singular: 128 features" in said.output
    found = load_reference(file, extractor)
    assert found is not None
    pixels = [np.array(Image.open(p)) for p in picture_files(tmp_path / "photos")]
    features = extractor(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()).double()
    torch.testing.assert_close(found.statistics.mean, features.mean(0))
    torch.testing.assert_close(found.statistics.covariance, features.T.cov(), rtol=1e-6, atol=1e-9)
    assert found.statistics.n == 5
    before = file.read_bytes()
    assert CliRunner().invoke(app, arguments).exit_code != 0, "a file that is there is not written over"
    assert file.read_bytes() == before


def test_pictures_of_several_sizes_are_cropped_when_asked(tmp_path: Path) -> None:
    painted(tmp_path)
    Image.fromarray(np.full((64, 64), 200, dtype=np.uint8)).save(tmp_path / "z.jpg")
    files, extractor = picture_files(tmp_path), load_extractor("random-conv")
    with pytest.raises(ConfigError, match=r"z.jpg is 64x64, the pictures before it are 60x40: give --size"):
        list(picture_features(files, extractor))
    parts = list(picture_features(files, extractor, size=32, batch=4))
    assert [tuple(part.shape) for part in parts] == [(4, 128), (2, 128)]
    assert len(next(iter(picture_features(files, load_extractor("fmnist-cnn"), size=28)))) == 6, "read as grey"


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of pictures"):
        picture_files(tmp_path / "nothing")
    painted(tmp_path, 1)
    with pytest.raises(ConfigError, match="at least two"):
        picture_files(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    with pytest.raises(ArtifactError, match=r"bad.png cannot be read as a picture"):
        list(picture_features(picture_files(tmp_path), load_extractor("random-conv")))
