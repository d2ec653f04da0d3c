"""Pictures of a folder, batch by batch, for statistics of a user's own data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpqsearch.errors import ArtifactError, ConfigError
from mpqsearch.metrics.extractors import FeatureExtractor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and the folders in it, in the order of their names.

    Raises `ConfigError` when there are fewer than two: they have no covariance.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder of pictures")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(files) < 2:
        raise ConfigError(f"{folder} holds {len(files)} pictures ({', '.join(SUFFIXES)}); at least two are needed")
    return files


def picture_features(
    files: Sequence[Path], extractor: FeatureExtractor, size: int = 0, batch: int = 64
) -> Iterator[Tensor]:
    """Features ``[n, d]`` of pictures, a batch at a time: no more than one batch of pictures is in memory.

    ``size``: the largest square in the middle of each is scaled to so many pixels (Lanczos); 0: pictures as they are,
    which must then all have one size. They are read as grey where the extractor takes one channel, as RGB otherwise.
    Raises `ConfigError` for a picture of another size, `ArtifactError` for one that cannot be read, by name.
    """
    grey = extractor.shape is not None and extractor.shape[0] == 1
    shape: tuple[int, ...] = ()
    for start in range(0, len(files), batch):
        pictures = []
        for path in files[start : start + batch]:
            picture = _read(path, "L" if grey else "RGB", size)
            shape = shape or tuple(picture.shape)
            if tuple(picture.shape) != shape:
                raise ConfigError(
                    f"{path} is {picture.shape[2]}x{picture.shape[1]}, the pictures before it are "
                    f"{shape[2]}x{shape[1]}: give --size, which crops and scales all of them"
                )
            pictures.append(picture)
        yield extractor(torch.stack(pictures))


def _read(path: Path, mode: str, size: int) -> Tensor:
    """One picture, uint8 ``[C, H, W]``."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{path} cannot be read as a picture: {error}. Repair it or take it out.") from error
    if size:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()
