"""Samples that are measured batch by batch: what is kept of them, on disk and in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpqsearch.errors import ArtifactError, ConfigError, NumericsError, StaleArtifactError
from mpqsearch.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    Reference,
    SampleStore,
    Scorer,
    distance_to_full_precision,
    evaluate,
    features_of,
    frechet_distance,
    load_extractor,
    module_extractor,
)
from mpqsearch.metrics.frechet import paired_kernel_distance
from mpqsearch.models.runner import Drawn, Label
from tests.support.drawn import batches_of, reference_of


class Corner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :2, :2].flatten(1)


def pair(n: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1
    return full, (full + 0.1 * torch.randn(full.shape, generator=generator)).clamp(-1, 1)


def video_pair(n: int = 5, frames: int = 3) -> tuple[Drawn, Drawn]:
    generator = torch.Generator().manual_seed(0)
    full = torch.randint(0, 240, (n, frames, 3, 8, 8), dtype=torch.uint8, generator=generator)
    noise = torch.randint(0, 16, full.shape, dtype=torch.uint8, generator=generator)
    latents = torch.randn(n, 4, 2, 4, 4, generator=generator)
    seeds, labels = tuple(range(n)), tuple(f"prompt {i}" for i in range(n))
    return (
        Drawn(seeds=seeds, latents=latents, images=full, labels=labels),
        Drawn(seeds=seeds, latents=latents + 0.5, images=full + noise, labels=labels),
    )


def as_reference(batch: Drawn, extractor: FeatureExtractor, folder: Path, scorers: Sequence[Scorer] = ()) -> Reference:
    store = SampleStore(folder, batch.seeds, {})
    store.add(batch)
    return Reference.of(store, extractor, scorers=scorers)


def test_values_do_not_depend_on_how_samples_come(tmp_path: Path) -> None:
    extractor = module_extractor(Corner(), "corner")
    full, noisy = pair()
    base = reference_of(full, extractor, tmp_path)  # written four at a time
    whole, parts = (evaluate(batches_of(noisy, batch=b), base, keep=4) for b in (10, 3))
    assert set(whole.metrics) == {"paired_mse", "paired_psnr", "fd_fp", "kid_fp"}
    for key, value in whole.metrics.items():
        for name in ("value", "low", "high"):
            assert getattr(parts.metrics[key], name) == pytest.approx(getattr(value, name), rel=1e-9), key
    assert whole.images is not None
    assert parts.images is not None
    assert torch.equal(parts.images, whole.images)
    assert whole.images.shape == (4, 3, 8, 8)
    assert evaluate(batches_of(noisy), base).images is None
    ours = features_of(batches_of(noisy), extractor)
    assert whole.features is not None
    assert torch.equal(whole.features, ours)
    theirs = FeatureStatistics.of(features_of(batches_of(full), extractor))
    assert whole.metrics["fd_fp"].value == pytest.approx(frechet_distance(theirs, FeatureStatistics.of(ours)))
    assert distance_to_full_precision(batches_of(noisy), theirs, extractor) == whole.metrics["fd_fp"].value


def test_a_batch_is_dropped_once_it_was_measured(tmp_path: Path) -> None:
    extractor = module_extractor(Corner(), "corner")
    full, noisy = pair(24)
    base = reference_of(full, extractor, tmp_path)
    seen: list[weakref.ref[Tensor]] = []

    def watched() -> Iterator[Drawn]:
        for start in range(0, 24, 4):
            gc.collect()
            assert sum(r() is not None for r in seen) <= 2  # the batch before may still have its name
            images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
            latents = noisy[start : start + 4].clone()
            seen.extend((weakref.ref(images), weakref.ref(latents)))
            yield Drawn(seeds=tuple(range(start, start + 4)), latents=latents, images=images, labels=(None,) * 4)

    evaluate(watched(), base)
    assert len(seen) == 12


def test_frames_of_a_video_are_samples_of_features_and_videos_are_resampled(tmp_path: Path) -> None:
    extractor = module_extractor(Corner(), "corner")
    full, noisy = video_pair()
    found = evaluate([noisy], as_reference(full, extractor, tmp_path))
    assert full.images is not None
    assert noisy.images is not None
    ours, theirs = (extractor(batch.images.flatten(0, 1)) for batch in (noisy, full))  # type: ignore[union-attr]
    assert found.features is not None
    assert torch.equal(found.features, ours)
    expected = frechet_distance(FeatureStatistics.of(theirs), FeatureStatistics.of(ours))
    assert found.metrics["fd_fp"].value == pytest.approx(expected, rel=1e-9)
    assert found.metrics["fd_fp"].name.endswith("-15 vs FP")
    assert found.metrics["fd_fp"].n_samples == 5
    assert found.metrics["kid_fp"].value == pytest.approx(float(paired_kernel_distance(theirs, ours)), rel=1e-9)
    assert found.metrics["paired_mse"].value == pytest.approx(0.25, rel=1e-6)
    error = (noisy.images.double() - full.images.double()).square().flatten(2).mean(2)
    assert found.metrics["paired_psnr"].value == pytest.approx(float((10 * (255**2 / error).log10()).mean()), rel=1e-9)
    # The interval of a mean over five videos, with the spread between videos and not between frames.
    each = (10 * (255**2 / error).log10()).mean(1)
    half = found.metrics["paired_psnr"].high - found.metrics["paired_psnr"].value
    assert half == pytest.approx(1.96 * float(each.std(unbiased=False)) / 5**0.5, rel=0.4)


def test_without_pictures_there_is_the_paired_error_alone(tmp_path: Path) -> None:
    extractor = load_extractor("random-conv")
    full, noisy = (
        Drawn(seeds=(3, 5, 8), latents=torch.ones(3, 2, 100) * v, images=None, labels=("a", "b", "c"))
        for v in (1.0, 3.0)
    )
    base = as_reference(full, extractor, tmp_path)
    assert base.features is None
    found = evaluate([noisy], base)
    assert {key: m.value for key, m in found.metrics.items()} == {"paired_mse": 4.0}
    assert found.features is None
    assert base.evaluation().metrics == {}
    with pytest.raises(ConfigError, match="no pictures"):
        features_of([noisy], extractor)


def test_samples_of_other_noise_are_refused(tmp_path: Path) -> None:
    extractor = module_extractor(Corner(), "corner")
    full, noisy = pair()
    base = reference_of(full, extractor, tmp_path)
    made = list(batches_of(noisy, batch=5))
    with pytest.raises(ConfigError, match=r"seeds 5\.\.9 cannot be compared with those of 0\.\.4"):
        evaluate(made[::-1], base)
    with pytest.raises(ConfigError, match="5 samples were given, the full-precision ones are 10"):
        evaluate(made[:1], base)


def test_features_that_are_not_finite_are_said_of_their_sample(tmp_path: Path) -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).mean(1, keepdim=True).log()

    extractor = module_extractor(Log(), "log", scale=255.0, shift=0.0)
    images = torch.full((4, 3, 8, 8), 9, dtype=torch.uint8)
    images[2] = 0
    made = list(batches_of(torch.zeros(4, 3, 8, 8), images=images, labels=["a", "b", "c", "d"], batch=4))
    with pytest.raises(NumericsError, match=r"of seed 2 \('c'\) are not finite"):
        Reference.of(stored(tmp_path, made), extractor)
    assert distance_to_full_precision(made, FeatureStatistics.of(torch.rand(4, 1)), extractor) == float("inf")


def stored(folder: Path, batches: Sequence[Drawn]) -> SampleStore:
    store = SampleStore(folder, [s for batch in batches for s in batch.seeds], {})
    store.fill(batches)
    return store


@pytest.mark.parametrize("labels", [None, [3, 1, 4, 1, 5, 9, 2], [f"a {c} bag" for c in "abcdefg"]])
def test_what_is_stored_comes_back(tmp_path: Path, labels: list[Label] | None) -> None:
    full, _ = pair(7)
    made = list(batches_of(full, labels=labels, batch=3))
    store = stored(tmp_path, made)
    assert store.missing == ()
    for ours, theirs in zip(store.batches(), made, strict=True):
        assert (ours.seeds, ours.labels) == (theirs.seeds, theirs.labels)
        assert torch.equal(ours.latents, theirs.latents)
        assert ours.images is not None
        assert theirs.images is not None
        assert torch.equal(ours.images, theirs.images)
    across = store.read(2, 5)
    assert across.seeds == (2, 3, 4)
    assert across.labels == tuple((labels or [None] * 7)[2:5])
    assert torch.equal(across.latents, full[2:5])
    assert store.read(0, 100).seeds == tuple(range(7))  # as many as there are
    assert torch.equal(SampleStore(tmp_path, range(7), {}).read(6, 7).latents, full[6:])


def test_a_store_continues_where_it_stopped(tmp_path: Path) -> None:
    full, _ = pair(7)
    first, second, third = batches_of(full, batch=3)
    SampleStore(tmp_path, range(7), {"model": "a"}).fill([first, second])
    store = SampleStore(tmp_path, range(7), {"model": "a"})
    assert store.missing == (6,)
    with pytest.raises(ArtifactError, match="lacks samples 5 to 6"):
        store.read(5, 7)
    with pytest.raises(ConfigError, match=r"are of the seeds \(6,\), not \(0, 1\)"):
        store.add(first)
    store.add(third)
    assert torch.equal(store.read(0, 7).latents, full)


def test_a_store_of_other_samples_is_stale(tmp_path: Path) -> None:
    full, _ = pair(7)
    SampleStore(tmp_path, range(7), {"model": "a"}).fill(batches_of(full))
    for seeds, inputs in ((range(7), {"model": "b"}), (range(6), {"model": "a"})):
        with pytest.raises(StaleArtifactError, match=r"samples\.json was made from other inputs"):
            SampleStore(tmp_path, seeds, inputs)
    assert SampleStore(tmp_path, range(7), {"model": "b"}, overwrite=True).missing == tuple(range(7))
    assert not list(tmp_path.glob("*.npz"))


def test_a_damaged_file_of_a_store_is_named(tmp_path: Path) -> None:
    full, _ = pair(7)
    store = stored(tmp_path, list(batches_of(full, batch=4)))
    (tmp_path / "000004-000007.npz").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match=r"000004-000007\.npz is damaged"):
        list(store.batches())
    (tmp_path / "000004-000007.npz").unlink()
    assert store.missing == (4, 5, 6)
