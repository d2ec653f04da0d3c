"""Samples of several methods at one budget, from the same noise, and how far they are from full precision."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mpqsearch.artifacts import atomic_write
from mpqsearch.errors import ConfigError
from mpqsearch.report.figures import Drawing
from mpqsearch.report.labels import slug
from mpqsearch.report.style import axes_or_new

Images = NDArray[np.uint8]

GAP = 2
"""Pixels between two tiles of a strip."""

BRIGHTENED = 4
"""Factor by which differences are made visible."""

LARGEST_TILE, LOSSLESS, MOST = 256, 3_000_000, 20_000_000
"""Pixels along the longer side of a sample on the page, pixels of all its samples up to which they are there as they
are (PNG), and the most of them otherwise (JPEG): the page is one file."""

CAPTION_WIDTH, CAPTION_LINES = 22, 5
"""Characters and lines of a caption below its sample."""

_GAP_VALUE = 128


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """Rows of images, each ``[N, H, W, C]`` uint8 with C of 1 or 3; sample ``i`` of every row began from the same
    noise.

    The first row is the reference, usually full precision. ``captions`` say what each sample was asked to show; empty:
    nothing is said. ``first_seed`` is the seed of the first sample, if they follow each other. Build it with
    `sample_grid`.
    """

    title: str
    rows: Mapping[str, Images]
    captions: tuple[str, ...] = ()
    first_seed: int | None = None

    @property
    def reference(self) -> Images:
        """Images of the first row."""
        return next(iter(self.rows.values()))


def sample_grid(
    title: str,
    rows: Mapping[str, NDArray[Any]],
    *,
    columns: int = 8,
    captions: Sequence[str] = (),
    first_seed: int | None = None,
) -> SampleGrid:
    """The first ``columns`` images of each row, reference row first: uint8 ``[N, H, W]``, ``[N, C, H, W]``, or video
    ``[N, F, C, H, W]``, of which the first and the middle frame are shown one above the other.

    Raises `ConfigError` when there is no row, a row has another shape or dtype than the first, or samples lack a
    caption.
    """
    if not rows:
        raise ConfigError(f"sample grid {title!r}: at least one row of images is needed")
    images = {k: _channels_last(v, f"sample grid {title!r}, row {k!r}")[:columns] for k, v in rows.items()}
    grid = SampleGrid(title=title, rows=images, captions=tuple(captions[:columns]), first_seed=first_seed)
    if captions and len(grid.captions) != len(grid.reference):
        raise ConfigError(f"sample grid {title!r}: {len(grid.captions)} captions for {len(grid.reference)} samples")
    for label, row in images.items():
        if row.shape != grid.reference.shape:
            raise ConfigError(
                f"sample grid {title!r}: row {label!r} has the shape {row.shape}, the first row "
                f"{grid.reference.shape}; rows must hold the same samples"
            )
    return grid


def _channels_last(images: NDArray[Any], where: str) -> Images:
    array = np.asarray(images)
    if array.dtype != np.uint8:
        raise ConfigError(f"{where}: uint8 images are needed, got {array.dtype}")
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim == 5 and array.shape[1]:
        array = np.concatenate([array[:, 0], array[:, array.shape[1] // 2]], axis=-2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ConfigError(
            f"{where}: images must be [N, H, W], [N, 1 or 3, H, W] or video [N, F, 1 or 3, H, W], and not empty, got "
            f"{np.shape(images)}"
        )
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def difference(grid: SampleGrid, label: str) -> Images:
    """``|row - reference| * BRIGHTENED``, clipped to 255: ``[N, H, W, C]``."""
    error = np.abs(grid.rows[label].astype(np.int16) - grid.reference.astype(np.int16))
    brightened: Images = np.clip(error * BRIGHTENED, 0, 255).astype(np.uint8)
    return brightened


def sample_strip(images: Images) -> Images:
    """Images ``[N, H, W, C]`` side by side with grey gaps: ``[H, N * (W + 2) - 2, C]``."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=_GAP_VALUE)
    strip: Images = np.concatenate(list(padded), axis=1)
    return strip[:, :-GAP]


def page_scale(grids: Sequence[SampleGrid]) -> float:
    """Factor in 0..1 by which all samples, and as many differences, are reduced on the page; 1: not at all."""
    pixels = sum(2 * len(g.rows) * g.reference[..., 0].size for g in grids)
    side = max((max(g.reference.shape[1:3]) for g in grids), default=1)
    if pixels <= LOSSLESS and side <= LARGEST_TILE:
        return 1.0
    return float(min(LARGEST_TILE / side, (MOST / pixels) ** 0.5, 0.999))


def strip_picture(images: Images, scale: float = 1.0) -> tuple[bytes, str]:
    """The strip of images ``[N, H, W, C]`` and its kind: PNG, pixel for pixel, or JPEG of tiles that are reduced by
    ``scale``."""
    from PIL import Image

    strip = sample_strip(images)
    picture, buffer = Image.fromarray(strip[:, :, 0] if strip.shape[2] == 1 else strip), io.BytesIO()
    if scale == 1:
        picture.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue(), "png"
    picture = picture.resize((round(strip.shape[1] * scale), round(strip.shape[0] * scale)))
    picture.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue(), "jpeg"


def grid_folder(grid: SampleGrid) -> str:
    """Name of the folder and of the picture of a grid."""
    return f"samples_{slug(grid.title)}"


def save_samples(folder: Path, grid: SampleGrid) -> list[Path]:
    """Every sample by itself at its full size, ``<folder>/<grid>/<row>-<number>.jpg``: what a reduced page links to."""
    from PIL import Image

    paths = []
    for label, images in grid.rows.items():
        for i, image in enumerate(images, start=1):
            paths.append(folder / grid_folder(grid) / f"{slug(label)}-{i}.jpg")
            with atomic_write(paths[-1]) as handle:
                picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
                picture.save(handle, format="JPEG", quality=95)
    return paths


def plot_samples(grid: SampleGrid, ax: Axes | None = None) -> Axes:
    """Draw the samples, a row per method, on ``ax`` (default: a new figure)."""
    n, height, width, _ = grid.reference.shape
    tile = 1.1 if grid.captions else 0.55
    below = 0.5 if grid.captions else 0.0
    ax = axes_or_new(ax, (1.3 + tile * n, 0.5 + below + tile * height / width * len(grid.rows)))
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    strips = [
        np.pad(sample_strip(images), ((0, GAP), (0, 0), (0, 0)), constant_values=_GAP_VALUE)
        for images in grid.rows.values()
    ]
    ax.imshow(np.concatenate(strips)[:-GAP], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set_yticks([i * (height + GAP) + height / 2 for i in range(len(strips))], list(grid.rows))
    texts = [textwrap.fill(text, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder=" …") for text in grid.captions]
    places = [i * (width + GAP) + width / 2 for i in range(len(texts))]
    ax.set_xticks(places, texts, fontsize="xx-small", va="top")
    ax.tick_params(length=0)
    ax.set_title(grid.title, loc="left")
    return ax


def grid_drawing(grid: SampleGrid) -> Drawing:
    """A file only: the page lays its strips out itself, so that they fit a phone."""
    return Drawing(
        key=grid_folder(grid),
        section="samples",
        title=grid.title,
        caption="",
        alt="",
        draw=lambda: plot_samples(grid),
        in_page=False,
    )
