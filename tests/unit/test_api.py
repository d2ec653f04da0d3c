"""The front door on a tiny model: each function, and what its results look like."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mpqsearch as mpq
from mpqsearch import api
from mpqsearch._verbs import VERBS
from mpqsearch.config import DistillConfig
from mpqsearch.core import QuantFormat, size_bits
from mpqsearch.errors import ConfigError, ModelError
from mpqsearch.models import Denoiser, save_calls
from mpqsearch.sampling import latents, record, samples
from mpqsearch.specs import CalibrationSpec, SearchSpec
from tests.support import tiny_denoiser
from tests.support.pipelines import PROMPTS, TINY

POLICY = mpq.Policy(widths=(2, 3, 4))
SPEC = CalibrationSpec(samples=2, probe_inputs=2, probes=1, schemes=("auto",), sampler_seeds=0, context_seeds=0)
GPTQ = mpq.Method(name="gptq", allocator="ilp-channel", scheme="auto", bias_correction=True, rounding="gptq")


PLAIN = mpq.Method(name="plain", allocator="ilp-channel", scheme="auto", bias_correction=True)


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return tiny_denoiser(steps=2, batch=4)


@pytest.fixture(scope="module")
def profile(model: Denoiser) -> mpq.Profile:
    return profile_of(model)


def profile_of(model: Denoiser) -> mpq.Profile:
    fmt = QuantFormat(n_candidates=8)
    return mpq.profile(model, policy=POLICY, calibration=SPEC, quantizer=fmt, progress=False)


def test_five_lines_from_a_model_to_a_picture(model: Denoiser, profile: mpq.Profile) -> None:
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    allocation = mpq.allocate(model, profile, "uniform:3")
    small = mpq.quantize(model, allocation, profile)
    figure = mpq.compare(model, small, seeds=range(3))
    assert allocation.within_budget
    assert any("samples of" in note for note in allocation.notes), "what was tried is said"
    assert set(np.concatenate([w.reshape(-1) for w in allocation.bit_map.weights.values()])) <= {2, 3, 4, 8, 16}
    assert "PSNR" in figure.axes[0].get_title(loc="left")
    assert getattr(figure, "_repr_png_")().startswith(b"\x89PNG"), "a notebook shows it"  # noqa: B009 - IPython's protocol
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items()), "the original is left as it is"
    name = next(la.name for la in mpq.discover(model) if POLICY.fixed_width(la) is None)
    rows = dict(small.module.named_modules())[name].weight.flatten(1)
    assert len(rows[0].unique()) <= 16


def test_a_model_is_short_to_look_at(model: Denoiser) -> None:
    assert model.size_bytes == sum(p.numel() * 4 for p in model.module.parameters())
    assert repr(model).startswith(
        f"Denoiser({model.name}: UNet2DModel, {model.size_bytes / 1e6:.2f} MB, ddim, 2 steps, samples (1, "
    )


def test_samples_are_compared_as_the_models_runner_draws_them(model: Denoiser, profile: mpq.Profile) -> None:
    assert api._quantizer(profile) == QuantFormat(n_candidates=8)
    small = mpq.quantize(model, mpq.allocate(model, profile, "uniform:2", method=PLAIN), profile)
    found = mpq.evaluate(model, small, seeds=range(6), extractor="random-conv", progress=False)
    error = (latents(model, range(6)) - latents(small, range(6))).double().square().mean()
    assert found.metrics["paired_mse"].value == pytest.approx(float(error), rel=1e-5)
    assert found.metrics["paired_mse"].n_samples == 6
    full, half = (next(samples(m, range(4))).images for m in (model, small))
    difference = (full.double() - half.double()).square().mean() / 255**2  # type: ignore[union-attr]
    title = mpq.compare(model, small, seeds=range(4)).axes[0].get_title(loc="left")
    assert f"{-10 * np.log10(difference):.1f} dB" in title


CALL = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny text-to-image pipeline."""
    folder = tmp_path_factory.mktemp("sd")
    TINY["StableDiffusionPipeline"]()[0].save_pretrained(folder)
    return folder


def test_five_lines_from_a_pipeline_to_its_pictures(pipeline: Path) -> None:
    model = mpq.load(pipeline, sampler=mpq.Sampler(steps=2, batch=2, call=CALL), prompts=PROMPTS)
    assert model.runner.labels([0, 1]) == PROMPTS[:2]
    profile = profile_of(model)
    small = mpq.quantize(model, mpq.allocate(model, profile, "uniform:3", method=PLAIN), profile)
    figure = mpq.compare(model, small, seeds=range(2))
    assert [len(image.get_array().shape) for axes in figure.axes for image in axes.images], "pictures are drawn"
    found = mpq.evaluate(model, small, seeds=range(3), extractor="random-conv", progress=False)
    assert {"paired_mse", "paired_psnr", "fd_fp"} <= set(found.metrics)


def test_prompts_come_as_a_file_a_list_or_as_they_are(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"{text}\n" for text in PROMPTS))
    listed = mpq.load(pipeline, prompts=list(PROMPTS))
    for given in (tmp_path / "p.txt", str(tmp_path / "p.txt"), listed.runner.prompts):  # type: ignore[attr-defined]
        assert mpq.load(pipeline, prompts=given).runner.identity == listed.runner.identity
    for wrong in ([], ["a cat", " "], [3]):
        with pytest.raises(ConfigError, match="prompts are texts, at least one"):
            mpq.load(pipeline, prompts=wrong)  # type: ignore[arg-type]
    assert len(mpq.discover(mpq.load(pipeline))) == len(mpq.discover(listed)), "layers need no prompts"


def test_recorded_calls_stand_for_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    calls = record(mpq.load(pipeline, sampler=mpq.Sampler(steps=2, call=CALL), prompts=PROMPTS), limit=4)
    save_calls(tmp_path / "c.safetensors", calls)
    model = mpq.load(pipeline, calls=tmp_path / "c.safetensors")
    assert model.runner.identity == mpq.load(pipeline, calls=calls).runner.identity
    profile = profile_of(model)
    small = mpq.quantize(model, mpq.allocate(model, profile, "uniform:3", method=PLAIN), profile)
    with pytest.raises(ModelError, match="4 recorded calls"):
        mpq.compare(model, small)


def test_gptq_is_priced_as_the_stages_price_it(model: Denoiser, profile: mpq.Profile) -> None:
    allocation = mpq.allocate(model, profile, "uniform:2", method=GPTQ)
    plain = mpq.allocate(model, profile, "uniform:2", method=PLAIN)
    assert allocation.predicted_loss < plain.predicted_loss, "less error is left where codes are chosen for the output"
    from mpqsearch.methods import Programs
    from mpqsearch.profile import gptq_profile, input_statistics

    moments = input_statistics(model, mpq.discover(model), api.CALIBRATION_SEEDS)

    fmt = QuantFormat(n_candidates=8)
    table = mpq.discover(model)
    priced = gptq_profile(model, table, profile, moments, QuantFormat(n_candidates=8, scheme="auto"))
    expected = Programs(table=table, profile=priced, policy=POLICY, format=fmt).allocate(
        GPTQ, mpq.Budget.parse("uniform:2")
    )
    assert allocation.bit_map.digest == expected.bit_map.digest
    with pytest.raises(ConfigError, match="runs the model"):
        mpq.allocate(table, profile, "uniform:2", method=GPTQ)


def test_a_trained_model_is_nearer_to_its_teacher(model: Denoiser, profile: mpq.Profile, tmp_path: Path) -> None:
    allocation = mpq.allocate(model, profile, "uniform:2", method=PLAIN)
    settings = DistillConfig(steps=12, batch=4, rank=4)
    trained = mpq.distill(model, allocation, profile, settings=settings, folder=str(tmp_path), progress=False)
    options = {"seeds": range(8), "extractor": "random-conv", "progress": False}
    before = mpq.evaluate(model, mpq.quantize(model, allocation, profile), **options)
    after = mpq.evaluate(model, trained, **options)
    assert after.metrics["paired_mse"].value < before.metrics["paired_mse"].value
    assert list(tmp_path.glob("ckpt-*"))


def test_packed_and_read_back(model: Denoiser, profile: mpq.Profile, tmp_path: Path) -> None:
    allocation = mpq.allocate(model, profile, "uniform:3", method=PLAIN)
    folder = mpq.save(str(tmp_path / "packed"), model, allocation, profile)
    again = mpq.load_quantized(str(folder))
    expected = mpq.quantize(model, allocation, profile).module.state_dict()
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)  # biases are stored in half precision


def test_exported_and_imported(model: Denoiser, profile: mpq.Profile, tmp_path: Path) -> None:
    allocation = mpq.allocate(model, profile, "uniform:3", method=PLAIN)
    exported = mpq.export(model, allocation, "neutral", str(tmp_path / "out"), profile, verify=True)
    assert exported.verification is not None
    assert exported.verification.ok
    assert exported.size_bytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert len(exported.to_frame()) == len(allocation.bit_map.weights)
    assert "neutral" in repr(exported)
    assert len(repr(exported)) < 300
    assert "<table" in exported._repr_html_()
    imported = mpq.import_map(str(tmp_path / "out"), model)
    assert imported.digest == allocation.bit_map.digest


def test_faults_of_a_file_are_said_in_python_too(
    model: Denoiser, profile: mpq.Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allocation = mpq.allocate(model, profile, "uniform:2", method=PLAIN)
    exported = mpq.export(model, allocation, "gguf", tmp_path)
    unread, large = exported.faults
    assert "which ComfyUI-GGUF and stable-diffusion.cpp REFUSE" in unread
    assert "LARGER than the budget uniform:2" in large
    assert [record.getMessage() for record in caplog.records] == [unread, large]
    assert repr(exported).startswith(unread)
    assert mpq.export(model, allocation.bit_map, "packed", tmp_path / "packed").faults == ()


def test_a_search_hands_out_a_map(model: Denoiser, profile: mpq.Profile, tmp_path: Path) -> None:
    settings = SearchSpec(samples=4, chunk=2, final_samples=4)
    found = mpq.search(
        model, profile, "uniform:3", trials=2, settings=settings, extractor="random-conv", folder=str(tmp_path)
    )
    assert set(found.maps) == {"uniform:3"}
    found.maps["uniform:3"].validate(mpq.discover(model))
    assert {"uniform", "search"} <= set(found.to_frame()["arm"])
    assert "uniform:3" in repr(found)
    assert "<table" in found._repr_html_()


@pytest.mark.parametrize("name", api.__all__)
def test_every_function_is_at_the_door_with_signature_and_text(name: str) -> None:
    function = getattr(api, name)
    assert name in mpq.__all__
    assert inspect.signature(getattr(mpq, name)) == inspect.signature(function)
    assert inspect.getdoc(function)
    assert all(p.annotation is not inspect.Parameter.empty for p in inspect.signature(function).parameters.values())


def test_rooms_stay_packages_that_can_be_called() -> None:
    code = (
        "import sys, mpqsearch as mpq\n"
        "assert 'torch' not in sys.modules\n"
        "import mpqsearch.profile.second_moments as moments, mpqsearch.search\n"
        "from mpqsearch.profile import SecondMoments\n"
        "assert callable(mpq.profile) and mpq.profile.SecondMoments is SecondMoments is moments.SecondMoments\n"
        "assert callable(mpq.search) and mpq.search is mpqsearch.search if (mpqsearch := mpq) else False\n"
        "print(mpq.allocate.__signature__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("(model: ")
    assert set(VERBS) < set(api.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(mpq, "profil")
    assert {"load", "profile", "Budget", "Policy", "Method", "BitMap", "Profile", "Sampler"} <= set(dir(mpq))
    assert mpq.Budget.parse("3bit").limit == 3


def test_scales_of_groups_are_priced_chosen_and_packed(model: Denoiser, tmp_path: Path) -> None:
    spec = replace(SPEC, groups=(16,))
    profile = mpq.profile(model, policy=POLICY, calibration=spec, quantizer=QuantFormat(n_candidates=8), progress=False)
    errors = [profile.arrays[f"weight_error/{name}"].sum() for name in ("auto", "auto+g16")]
    assert errors[1] < errors[0], "shorter rows have better scales"
    table = mpq.discover(model)
    allocation = mpq.allocate(model, profile, "uniform:3", method=replace(GPTQ, group=16))
    assert allocation.within_budget
    assert allocation.bit_map.format.group == 16
    alone = replace(allocation.bit_map, format=replace(allocation.bit_map.format, group=0))
    assert size_bits(table, alone) < size_bits(table, allocation.bit_map), "scales are counted"
    small = mpq.quantize(model, allocation, profile)
    mpq.save(tmp_path, model, allocation, profile)
    loaded = mpq.load_quantized(tmp_path).state_dict()
    assert all(torch.equal(loaded[f"{la.name}.weight"], small.module.state_dict()[f"{la.name}.weight"]) for la in table)
