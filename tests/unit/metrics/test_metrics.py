from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpqsearch.errors import ArtifactError, ConfigError, ModelError, NumericsError, UnknownNameError, install
from mpqsearch.metrics import (
    FeatureStatistics,
    evaluate,
    extractors,
    frechet,
    frechet_distance,
    load_extractor,
    load_reference,
    module_extractor,
    save_reference,
)
from mpqsearch.metrics.evaluate import frechet_label, seeds_label
from mpqsearch.metrics.frechet import kernel_distance, paired_kernel_distance
from tests.support.drawn import batches_of, reference_of


class Flat(nn.Module):
    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.float().flatten(1)[:, :12]


@pytest.mark.parametrize("n", [6, 40])  # fewer and more samples than dimensions
def test_frechet_distance_equals_torchmetrics(n: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=generator)
    fake = torch.randint(0, 200, (n + 3, 3, 4, 4), dtype=torch.uint8, generator=generator)
    oracle = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 4, 4), antialias=False)
    oracle.set_dtype(torch.float64)
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    flat = Flat()
    ours = frechet_distance(FeatureStatistics.of(flat(real)), FeatureStatistics.of(flat(fake)))
    assert ours == pytest.approx(float(oracle.compute()), rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    of = FeatureStatistics.from_covariance
    a = of(100, torch.zeros(2).double(), torch.diag(torch.tensor([4.0, 1.0]).double()))
    b = of(100, torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 9.0]).double()))
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (1 - 3) ** 2, rel=1e-12)
    assert abs(frechet_distance(a, a)) < 1e-6 * 5
    with pytest.raises(ConfigError, match="2 and 3 dimensions"):
        frechet_distance(a, FeatureStatistics.of(torch.randn(5, 3)))


def test_weighted_statistics_are_those_of_repeated_rows() -> None:
    x, w = torch.randn(6, 3), torch.tensor([0.0, 1, 2, 0, 3, 1])
    weighted, repeated = FeatureStatistics.of(x, w), FeatureStatistics.of(x.repeat_interleave(w.long(), 0))
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.covariance, repeated.covariance)
    assert weighted.n == 7
    with pytest.raises(NumericsError):
        FeatureStatistics.of(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ConfigError, match="two rows"):
        FeatureStatistics.of(torch.randn(1, 3))


def test_kernel_distance_equals_its_double_loop() -> None:
    x, y = torch.randn(5, 3).double(), torch.randn(4, 3).double() + 1

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert float(kernel_distance(x, y)) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)
    pairs = np.mean([k(x[i], y[j]) for i in range(4) for j in range(4) if i != j])
    xx4 = np.mean([k(x[i], x[j]) for i in range(4) for j in range(4) if i != j])
    assert float(paired_kernel_distance(x[:4], y)) == pytest.approx(xx4 + yy - 2 * pairs, rel=1e-12)


@pytest.mark.parametrize("block", [2, 1024])  # the kernel in parts, and whole
def test_weighted_kernel_distances_are_those_of_the_drawn_rows(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(frechet, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(n, 5, generator=generator) for n in (9, 6, 6))
    draws = torch.tensor([[0.0, 1, 3, 0, 1, 1], [1.0, 1, 1, 1, 1, 1], [2.0, 2, 0, 0, 0, 2]])
    drawn = [kernel_distance(x, y.repeat_interleave(w.long(), 0)) for w in draws]
    torch.testing.assert_close(kernel_distance(x, y, draws), torch.cat(drawn), rtol=1e-12, atol=0)
    there = [paired_kernel_distance(z[w > 0], y[w > 0]) for w in draws]
    torch.testing.assert_close(paired_kernel_distance(z, y, draws), torch.cat(there), rtol=1e-10, atol=0)
    with pytest.raises(ConfigError, match="at least two samples on each side, got 1 and 6"):
        kernel_distance(x[:1], y)


def test_results_are_short_to_look_at(tmp_path: Path) -> None:
    extractor = load_extractor("random-conv")
    samples = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = reference_of(samples, extractor, tmp_path)
    found = evaluate(batches_of(samples.flip(0)), reference)
    assert repr(reference) == "Reference(8 full-precision samples (1, 16, 16), seeds 0..7)"
    assert len(repr(found).splitlines()) == 1 + len(found.metrics)
    frame = found.to_frame()
    assert list(frame.index) == list(found.metrics)
    assert frame.loc["paired_mse", "value"] == found.metrics["paired_mse"].value
    assert "<table" in found._repr_html_()


def test_worse_samples_measure_worse_and_identical_ones_measure_zero(tmp_path: Path) -> None:
    extractor = load_extractor("random-conv")
    samples = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = reference_of(samples, extractor, tmp_path)
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
    found = [evaluate(batches_of((samples + s * noise).clamp(-1, 1)), reference).metrics for s in (0.0, 0.05, 0.3)]
    for key in ("paired_mse", "fd_fp"):
        values = [f[key].value for f in found]
        assert values[0] == pytest.approx(0, abs=1e-6)
        assert values[0] < values[1] < values[2]
    assert found[0]["paired_psnr"].value == 100.0 > found[1]["paired_psnr"].value > found[2]["paired_psnr"].value
    value = found[1]["fd_fp"]
    assert value.name.startswith("FD[random-conv@")
    assert "40 vs FP" in value.name
    assert (value.n_samples, value.seeds, value.spread) == (40, "0..39", "bootstrap")
    assert value.low < value.value < value.high
    assert all(f[key].low >= min(f[key].value, 0) for f in found for key in ("paired_mse", "fd_fp")), "no negative end"
    mse = found[1]["paired_mse"]
    # The interval of a mean is known: 1.96 standard errors; 48 resamples leave 10 % on it.
    each = ((samples + 0.05 * noise).clamp(-1, 1) - samples).square().flatten(1).mean(1)
    assert (mse.high - mse.value) == pytest.approx(1.96 * float(each.std()) / 40**0.5, rel=0.4)


def test_the_word_fid_is_reserved() -> None:
    plain, official = (
        extractors.FeatureExtractor(name="x", dim=1, digest="d" * 64, features=lambda i: i, official_fid=f)
        for f in (False, True)
    )
    assert frechet_label(official, 50_000) == "FID-50k"
    assert frechet_label(official, 9_999).startswith("FD[")
    assert frechet_label(plain, 50_000).startswith("FD[")


def test_the_inception_path_with_a_stand_in_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    class StandIn(nn.Module):
        """Has the interface of torch-fidelity's extractor: uint8 [N, 3, H, W] to a tuple of features."""

        def forward(self, x: Tensor) -> tuple[Tensor]:
            assert x.dtype == torch.uint8
            assert x.shape[1] == 3
            return (x.float().mean((2, 3)).repeat(1, 4),)

    def network(weights: Path | None) -> StandIn:
        seen.append(weights)
        return StandIn()

    monkeypatch.setattr(extractors, "_inception_network", network)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"stand-in")
    extractor = load_extractor("inception", weights=file)
    assert seen == [file]
    assert not extractor.official_fid, "other weights than those of 2015 must not be called FID"
    assert extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 12)
    assert load_extractor("inception").official_fid


def test_a_missing_torch_fidelity_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModelError, match=re.escape(install("fid"))):
        load_extractor("inception")
    with pytest.raises(UnknownNameError, match="did you mean 'random-conv'"):
        load_extractor("random-cnn")


def test_random_features_are_pinned() -> None:
    extractor = load_extractor("random-conv")
    assert extractor.digest[:8] == "3e8a1729", "other weights make every stored value incomparable"
    images = torch.arange(3 * 16 * 16).remainder(256).to(torch.uint8).view(1, 3, 16, 16)
    torch.testing.assert_close(extractor(images), load_extractor("random-conv")(images))


def test_reference_statistics_round_trip_and_refuse_other_extractors(tmp_path: Path) -> None:
    extractor = load_extractor("random-conv")
    features = torch.randn(50, extractor.dim)
    save_reference(tmp_path / "r.safetensors", features, extractor, "noise", subset=10)
    found = load_reference(tmp_path / "r.safetensors", extractor)
    assert found is not None
    assert found.statistics.n == 50
    torch.testing.assert_close(found.statistics.covariance, FeatureStatistics.of(features).covariance)
    assert found.features.shape == (10, extractor.dim)
    other = module_extractor(Flat(), "flat")
    with pytest.raises(ArtifactError, match="made with the extractor 'random-conv"):
        load_reference(tmp_path / "r.safetensors", other)
    assert load_reference(None, other) is None
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    with pytest.raises(ArtifactError, match="damaged"):
        load_reference(tmp_path / "bad.safetensors", extractor)


def test_reference_statistics_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    extractor, file = load_extractor("random-conv"), tmp_path / "r.safetensors"
    save_reference(file, torch.randn(4, extractor.dim), extractor, "noise")
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    save_file({k: v.clone().fill_(torch.nan) for k, v in load_file(file).items()}, file, metadata)
    with pytest.raises(ArtifactError, match="holds a number that is NaN or infinite"):
        load_reference(file, extractor)


def test_the_embedded_extractor_has_its_reference() -> None:
    extractor = load_extractor("fmnist-cnn")
    reference = load_reference(None, extractor)
    assert reference is not None
    assert reference.statistics.n == 60_000
    with pytest.raises(ConfigError, match=r"reads pictures \(1, 28, 28\) .*these are \(3, 32, 32\)\. Use"):
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_seed_labels() -> None:
    assert seeds_label(range(5, 9)) == "5..8"
    assert seeds_label([1, 3]).startswith("2 seeds ")


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_handful_of_samples_has_values_and_intervals(tmp_path: Path, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(n, 3, 8, 8, generator=generator)
    noisy = clean + 0.1 * torch.randn(n, 3, 8, 8, generator=generator)
    extractor = module_extractor(Flat(), "flat")
    found = evaluate(batches_of(noisy), reference_of(clean, extractor, tmp_path)).metrics
    assert found["paired_mse"].value == pytest.approx(0.01, rel=0.2)
    assert all(np.isfinite([m.value, m.low, m.high]).all() for m in found.values())
