"""Samples of several methods at one budget, from the same noise, and how far they are from full precision."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mpqsearch.errors import ConfigError
from mpqsearch.report.style import axes_or_new

Images = NDArray[np.uint8]

GAP = 2
"""Pixels between two tiles of a strip."""

_GAP_VALUE = 128


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """Rows of images, each ``[N, H, W, C]`` uint8 with C of 1 or 3; sample ``i`` of every row began from the same
    noise.

    The first row is the reference, usually full precision. ``gain`` is the factor by which differences are made
    visible. Build it with `sample_grid`.
    """

    title: str
    rows: tuple[tuple[str, Images], ...]
    gain: float = 4.0

    @property
    def reference(self) -> Images:
        """Images of the first row."""
        return self.rows[0][1]

    def images(self, label: str) -> Images:
        """Images of one row."""
        return dict(self.rows)[label]


def sample_grid(title: str, rows: Mapping[str, NDArray[Any]], *, columns: int = 8, gain: float = 4.0) -> SampleGrid:
    """The first ``columns`` images of each row; ``[N, H, W]`` or ``[N, C, H, W]`` uint8, reference row first.

    Raises `ConfigError` when there is no row, or a row has another shape or dtype than the first.
    """
    if not rows:
        raise ConfigError(f"sample grid {title!r}: at least one row of images is needed")
    clean = {
        label: _channels_last(images, f"sample grid {title!r}, row {label!r}")[:columns]
        for label, images in rows.items()
    }
    first = next(iter(clean.values()))
    for label, images in clean.items():
        if images.shape != first.shape:
            raise ConfigError(
                f"sample grid {title!r}: row {label!r} has the shape {images.shape}, the first row {first.shape}; "
                "rows must hold the same samples"
            )
    return SampleGrid(title=title, rows=tuple(clean.items()), gain=gain)


def difference(grid: SampleGrid, label: str) -> Images:
    """``|row - reference| * gain``, clipped to 255: ``[N, H, W, C]``."""
    gap = np.abs(grid.images(label).astype(np.int16) - grid.reference.astype(np.int16))
    return np.clip(np.rint(gap * grid.gain), 0, 255).astype(np.uint8)


def sample_strip(images: Images) -> Images:
    """Images ``[N, H, W, C]`` side by side with grey gaps: ``[H, N * (W + 2) - 2, C]``."""
    n, height, width, channels = images.shape
    strip = np.full((height, n * (width + GAP) - GAP, channels), _GAP_VALUE, dtype=np.uint8)
    for i, image in enumerate(images):
        strip[:, i * (width + GAP) : i * (width + GAP) + width] = image
    return strip


def difference_strip(grid: SampleGrid, label: str) -> Images:
    """The differences of one row side by side."""
    return sample_strip(difference(grid, label))


def png_bytes(image: Images) -> bytes:
    """An image ``[H, W, C]`` as PNG, pixel for pixel."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def plot_samples(grid: SampleGrid, ax: Axes | None = None) -> Axes:
    """Draw the samples, a row per method, on ``ax`` (default: a new figure)."""
    return _plot_strips(grid, {label: sample_strip(images) for label, images in grid.rows}, grid.title, ax)


def plot_sample_difference(grid: SampleGrid, ax: Axes | None = None) -> Axes:
    """Draw what differs from the first row, brightened by ``grid.gain``, on ``ax`` (default: a new figure)."""
    strips = {label: difference_strip(grid, label) for label, _ in grid.rows[1:]}
    return _plot_strips(grid, strips, f"|difference to {grid.rows[0][0]}| × {grid.gain:g}", ax)


def _plot_strips(grid: SampleGrid, strips: Mapping[str, Images], title: str, ax: Axes | None) -> Axes:
    n, height, width, _ = grid.reference.shape
    tile = 0.55
    ax = axes_or_new(ax, (1.3 + tile * n, 0.5 + tile * height / width * max(len(strips), 1)))
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xticks([])
    ax.set_title(title, loc="left")
    if not strips:
        return ax
    gap = np.full((GAP, next(iter(strips.values())).shape[1], grid.reference.shape[3]), _GAP_VALUE, dtype=np.uint8)
    parts = [part for strip in strips.values() for part in (strip, gap)][:-1]
    image = np.concatenate(parts)
    ax.imshow(image[:, :, 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set_yticks([i * (height + GAP) + height / 2 for i in range(len(strips))], list(strips))
    ax.tick_params(length=0)
    return ax


def _channels_last(images: NDArray[Any], where: str) -> Images:
    array = np.asarray(images)
    if array.dtype != np.uint8:
        raise ConfigError(f"{where}: uint8 images are needed, got {array.dtype}")
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ConfigError(
            f"{where}: images must be [N, H, W] or [N, 1 or 3, H, W] and not empty, got {np.shape(images)}"
        )
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))
