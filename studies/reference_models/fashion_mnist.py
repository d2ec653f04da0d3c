"""Fashion-MNIST from its four idx.gz files, with checked digests."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MD5 = {
    "train-images": "cf8536b0aa1a6ac5fa3f23001093305c",
    "train-labels": "10bea18fdb374794d4bb42e356e600c9",
    "t10k-images": "f78720b4224f21cce2f2ccf2d7a94c9a",
    "t10k-labels": "0d30e22e447f3c33dab9ed536400ac01",
}
DEFAULT_DIR = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist


def load(split: str, data_dir: Path = DEFAULT_DIR) -> tuple[Tensor, Tensor]:
    """Return ``(images, labels)`` of ``split`` ("train" or "t10k"): ``uint8 [N, 1, 28, 28]`` and ``int64 [N]``.

    Raises `FileNotFoundError` with the way to get the files, `ValueError` when a file is not the published one.
    """
    images = _read(data_dir / f"{split}-images-idx3-ubyte.gz", MD5[f"{split}-images"], header=16)
    labels = _read(data_dir / f"{split}-labels-idx1-ubyte.gz", MD5[f"{split}-labels"], header=8)
    return (
        torch.from_numpy(images.reshape(-1, 1, 28, 28).copy()),
        torch.from_numpy(labels.astype(np.int64)),
    )


def to_unit(images: Tensor) -> Tensor:
    """Map ``uint8`` pixels to ``float32`` in ``[-1, 1]``."""
    return images.float() / 127.5 - 1.0


def _read(path: Path, md5: str, header: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Install Debian's package dataset-fashion-mnist, or put the four idx.gz files of "
            "Fashion-MNIST into a folder and name it with --data-dir."
        )
    raw = path.read_bytes()
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path} is not the published file: MD5 {found}, expected {md5}. Fetch it again.")
    return np.frombuffer(gzip.decompress(raw), dtype=np.uint8, offset=header)
