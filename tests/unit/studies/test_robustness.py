"""The study of robustness: its models are what they say, rows resume from results.csv alone, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpqsearch.models import discover
from mpqsearch.sampling import SamplerSpec, latents, load_model
from studies.robustness import report, study, train
from studies.robustness.models import NETWORKS, SAMPLE_SHAPES, WEIGHTS

TRAINED = sorted(NETWORKS)


def source(name: str) -> str:
    return study.MODELS[name][0]


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_draw_samples_like_their_data(name: str) -> None:
    denoiser = load_model(source(name), sampler=SamplerSpec(steps=10))
    drawn = latents(denoiser, range(16))
    data = train.DATA[name](256, torch.Generator().manual_seed(1))
    assert drawn.shape[1:] == SAMPLE_SHAPES[name]
    assert torch.equal(drawn, latents(denoiser, range(16)))
    assert 0.5 < float(drawn.square().mean().sqrt() / data.square().mean().sqrt()) < 2
    neighbours = (drawn[..., 1:] - drawn[..., :-1]).square().mean() / drawn.square().mean()
    assert neighbours < 1  # of noise it would be 2
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= 2_000_000


@pytest.mark.parametrize("name", TRAINED)
def test_every_layer_is_seen_and_ends_are_found(name: str) -> None:
    table = discover(load_model(source(name)))
    assert [la.name for la in table if la.role == "first"] == ["first"]
    assert [la.name for la in table if la.role == "last"] == ["last"]
    assert not [la.name for la in table if la.role == "unused"]


def test_rescaled_channels_change_weights_and_not_the_function() -> None:
    sampler = SamplerSpec(steps=5, guidance=2.0)
    plain, heavy = load_model("fmnist-dit", sampler=sampler), load_model(source("heavy-dit"), sampler=sampler)
    assert (latents(plain, range(4)) - latents(heavy, range(4))).abs().max() < 1e-4
    before, after = (dict(m.module.named_parameters()) for m in (plain, heavy))
    for layer in ("attn1.to_out.0", "attn1.to_v", "attn1.to_q", "ff.net.2", "norm1.linear"):
        name = f"transformer_blocks.0.{layer}.weight"
        assert kurtosis(after[name]) > 3 * kurtosis(before[name])


def kurtosis(weight: torch.Tensor) -> float:
    centred = weight - weight.mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def test_training_that_was_killed_continues_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(train, "RECIPE", {"steps": 4, "batch": 2, "lr": 1e-3})
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    made = []
    for folder, killed in (("whole", False), ("killed", True)):
        if killed:
            with monkeypatch.context() as patch:
                patch.setattr(train, "average", stop_at(4))
                with pytest.raises(KeyboardInterrupt):
                    train.train("sound-net", tmp_path / folder, 0)
        train.train("sound-net", tmp_path / folder, 0)
        made.append((tmp_path / "weights" / "sound-net.safetensors").read_bytes())
    assert made[0] == made[1]


def stop_at(step: int) -> Any:
    real, n = train.average, 0

    def average(*args: Any) -> None:
        nonlocal n
        n += 1
        if n == step:
            raise KeyboardInterrupt
        real(*args)

    return average


SMALL = study.Scale(
    samples=2, trials=2, calibration={"samples": 2, "probe_inputs": 4, "sampler_seeds": 2, "context_seeds": 2}
)


def test_rows_of_real_maps(tmp_path: Path) -> None:
    bench = study.Bench("colour-unet", 1, SMALL, tmp_path)
    assert bench.config().calibration.first_seed == 1_001_000
    assert list(bench.seeds) == [1000, 1001]
    profile = bench.profile_row()
    assert profile is not None
    assert float(profile["seconds"]) > 0
    assert bench.profile_row() is None
    rows = [bench.row("uniform", 2), bench.row("ilp-channel", 2), bench.row("ilp-channel", 6)]
    assert [r["rounding"] for r in rows] == ["nearest"] * 3
    assert all(0 < float(r["paired_error"]) < 10 for r in rows)
    assert float(rows[2]["paired_error"]) < float(rows[1]["paired_error"])
    assert rows[1]["size_bytes"] <= rows[0]["size_bytes"] < rows[2]["size_bytes"]
    assert rows[0]["tuned_on"] == "false"


def test_rows_that_are_there_are_left_out(tmp_path: Path) -> None:
    path, blank = tmp_path / "results.csv", dict.fromkeys(study.FIELDS, "")
    study.append(path, blank | {"model": "a", "target_bits": "3", "arm": "uniform", "seed": 0})
    study.append(path, blank | {"model": "a", "target_bits": "", "arm": "profile", "seed": 0})
    done = [study.key_of(r) for r in study.read(path)]
    left = list(study.missing(done, ["a", "b"], [3, 4], ["uniform", "omq"], [0]))
    assert left == [
        ("a", 0, [("omq", 3), ("uniform", 4), ("omq", 4)]),
        ("b", 0, [("uniform", 3), ("omq", 3), ("uniform", 4), ("omq", 4)]),
    ]
    assert path.read_text().count("paired_error") == 1


def row(model: str, bits: int, arm: str, error: str, seed: int = 0) -> dict[str, str]:
    values = {"model": model, "target_bits": str(bits), "arm": arm, "seed": str(seed), "paired_error": error}
    return {f: values.get(f, "") for f in study.FIELDS}


def test_tables_compare_ours_with_the_best_simple_arm() -> None:
    rows = [row("sound-net", 3, arm, "0.4") for arm in report.SIMPLE]
    rows += [row("sound-net", 3, "ilp-layer", "0.2"), row("sound-net", 3, "ours", "0.1")]
    rows += [row("heavy-dit", 4, arm, "inf" if arm == "ilp-channel" else "0.5") for arm in report.SIMPLE]
    rows += [row("heavy-dit", 4, "ours", "0.55"), row("sound-net", 3, "profile", "")]
    errors = report.errors_of(rows)
    ours = report.ratios(errors, "ours", report.SIMPLE)
    assert ours == {("sound-net", 3, 0): pytest.approx(0.5), ("heavy-dit", 4, 0): pytest.approx(1.1)}
    text = report.tables(rows)
    assert "1.10 (heavy-dit, 4 bits, seed 0); above 1 in 1 of 2" in text
    assert "| heavy-dit | 4 | **0.5** | 0.5 | 0.5 | 0.5 | inf | 0.5 | 0.55 |" in text


def test_several_seeds_are_shown_with_their_range() -> None:
    rows = [row("sound-net", 2, "uniform", error, seed) for seed, error in enumerate(("0.1", "0.4"))]
    assert "**0.2** (0.1–0.4)" in report.tables(rows)


def test_results_in_the_repository_are_whole() -> None:
    rows = study.read(study.RESULTS)
    keys = [study.key_of(r) for r in rows]
    assert len(set(keys)) == len(keys)
    assert {r["model"] for r in rows} <= set(study.MODELS)
    assert {r["arm"] for r in rows} <= {*study.ARMS, "profile"}
