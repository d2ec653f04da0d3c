"""Pipelines from folders, hub names and functions: what loads, and what is refused with the way out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpqsearch.errors import ConfigError, ModelError, UnknownNameError
from mpqsearch.models import Parts, capture, discover, discover_streamed, load_calls, open_streamed, save_calls
from mpqsearch.prompts import Prompts, prompts_of
from mpqsearch.sampling import SamplerSpec, latents, load_model, record, samples
from mpqsearch.sources import model_files
from tests.support.pipelines import PROMPTS, TINY

ASKED = prompts_of([f"{text} {n}" for text in PROMPTS for n in range(10)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny pipelines: ``sd``, ``wan`` (two denoisers), ``dit``."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name, kind in {"sd": "StableDiffusionPipeline", "wan": "WanPipeline:2.2", "dit": "DiTPipeline"}.items():
        TINY[kind]()[0].save_pretrained(folder / name)
    return folder


def loaded(folder: Path, prompts: Prompts | None = ASKED, **more: Any) -> Any:
    call = {"height": 16, "width": 16} | ({"num_frames": 9} if "wan" in folder.name else {})
    return load_model(str(folder), sampler=SamplerSpec(steps=2, batch=2, call=call), prompts=prompts, **more)


def changed(source: Path, folder: Path, **components: Any) -> Path:
    """A copy of a pipeline folder with other entries in its index."""
    shutil.copytree(source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | components))
    return folder


def test_a_hub_name_loads_as_its_folder_does(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache of the hub, as it looks after a download."""
    import huggingface_hub.constants as hub

    repository, commit = tmp_path / "models--someone--tiny", "0" * 40
    shutil.copytree(saved / "sd", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_OFFLINE", True, raising=False)
    named, folder = loaded(Path("someone/tiny")), loaded(saved / "sd")
    assert named.name == "tiny"
    assert named.digest == folder.digest
    assert named.runner.identity == folder.runner.identity
    assert torch.equal(latents(named, [0]), latents(folder, [0]))
    with pytest.raises(ModelError, match=r"cannot load the pipeline 'someone/else'.*only folders work"):
        load_model("someone/else")


def test_a_folder_of_half_precision_variants_loads(saved: Path, tmp_path: Path) -> None:
    pipe, _ = TINY["StableDiffusionPipeline"]()
    pipe.to(torch.float16).save_pretrained(tmp_path / "sd", variant="fp16", max_shard_size="100KB")
    assert list((tmp_path / "sd" / "unet").glob("*.fp16-00001-of-*.safetensors"))
    assert not list((tmp_path / "sd" / "vae").glob("diffusion_pytorch_model.safetensors"))
    half, full = loaded(tmp_path / "sd"), loaded(saved / "sd")
    assert next(half.module.parameters()).dtype == torch.float32
    (a,), (b,) = samples(half, [0, 1]), samples(full, [0, 1])
    assert 0 < float((a.latents - b.latents).norm() / b.latents.norm()) < 0.01  # weights were rounded to 11 bits
    assert next(loaded(tmp_path / "sd", dtype="stored").module.parameters()).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
def test_two_denoisers_that_keep_some_weights_in_single_precision_load_and_are_streamed(
    dtype: str, saved: Path
) -> None:
    denoiser = loaded(saved / "wan", dtype=dtype)
    assert isinstance(denoiser.module, Parts)
    weights = dict(denoiser.module.named_parameters())
    asked = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert weights["transformer_2.blocks.0.attn1.to_q.weight"].dtype == asked
    assert weights["transformer.condition_embedder.time_embedder.linear_1.weight"].dtype == torch.float32
    if dtype == "float32":
        streamed = open_streamed(str(saved / "wan"))
        table = discover_streamed(streamed)
        assert table.digest == denoiser.digest
        assert {la.name for la in table} == {la.name for la in discover(denoiser)}
        assert torch.equal(streamed.read("transformer_2.proj_out.weight"), weights["transformer_2.proj_out.weight"])
        assert discover_streamed(open_streamed(str(saved / "wan"), component="transformer_2")).digest != table.digest


def test_all_files_of_a_pipeline_count(saved: Path) -> None:
    files = set(model_files(str(saved / "sd")) or {})
    assert files >= {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    }
    assert any(name.startswith("tokenizer/") for name in files)


def test_what_is_not_installed_is_refused_before_weights_are_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpqsearch.models.loader._load", lambda *_: pytest.fail("weights were read"))
    folder = changed(saved / "sd", tmp_path / "class", _class_name="NextYearsPipeline")
    with pytest.raises(ModelError, match=r"its class 'NextYearsPipeline' is no pipeline of diffusers \d"):
        load_model(str(folder))
    folder = changed(saved / "sd", tmp_path / "scheduler", scheduler=["diffusers", "NextYearsScheduler"])
    with pytest.raises(ModelError, match=r"'NextYearsScheduler' is no model or scheduler of diffusers \d"):
        load_model(str(folder))
    folder = changed(saved / "sd", tmp_path / "code", text_encoder=["my_encoder", "MyTextModel"])
    (folder / "my_encoder.py").write_text("raise AssertionError('code of a model folder was run')")
    with pytest.raises(ModelError, match=r"its text_encoder is a MyTextModel of 'my_encoder'.*is not run here"):
        load_model(str(folder))
    with pytest.raises(UnknownNameError, match="component of the pipeline"):
        load_model(str(saved / "sd"), component="prior")


def test_a_pipeline_whose_library_is_missing_names_the_line_that_installs_it() -> None:
    # In a process of its own: diffusers decides at its import which pipelines there are.
    code = "import sys; sys.modules['transformers'] = None; import mpqsearch as mpq; mpq.load('fmnist-t2i')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    expected = r"text_encoder needs transformers, which is not installed: pip install '.*\[pipelines\]'"
    assert re.search(expected, done.stderr)


def test_recorded_calls_stand_for_a_pipeline_that_is_not_installed(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved / "sd", tmp_path / "p", _class_name="NextYearsPipeline")
    calls = record(loaded(saved / "sd"), limit=4)
    denoiser = load_model(str(folder), calls=calls)
    assert len(discover(denoiser)) == len(discover(loaded(saved / "sd")))


def test_a_component_without_weights_is_named_when_the_pipeline_is_opened(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved / "sd", tmp_path / "p")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot load the pipeline .*vae.*must hold every component") as caught:
        latents(loaded(folder), [0])
    assert "\n" not in str(caught.value)


def test_a_safety_checker_is_switched_off_and_said(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    folder = changed(saved / "sd", tmp_path / "p", **checker, feature_extractor=["transformers", "CLIPImageProcessor"])
    assert torch.equal(latents(loaded(folder), [0]), latents(loaded(saved / "sd"), [0]))
    assert "its safety checker is switched off" in caplog.text


def test_what_a_pipeline_was_called_with_is_recorded(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser = loaded(saved / "sd")
    calls = record(denoiser, limit=6)
    per_run = denoiser.runner.calls_per_run(denoiser.module)
    assert (len(calls), calls.seen, calls.model) == (6, 4 * per_run, "UNet2DConditionModel")  # four prompts
    assert len({c.timestep for c in calls}) == 2
    assert {c.batch for c in calls} == {2}, "both halves of classifier-free guidance are rows"
    texts = {c.kwargs["encoder_hidden_states"].numpy().tobytes() for c in calls}
    assert len(texts) > 2, "several prompts"
    save_calls(tmp_path / "c.safetensors", calls)
    again = loaded(saved / "sd", calls=load_calls(tmp_path / "c.safetensors"))
    assert [(la.name, la.role) for la in discover(again)] == [(la.name, la.role) for la in discover(denoiser)]
    with torch.no_grad(), capture(denoiser.module) as seen:
        denoiser.runner.run(denoiser.module, [1_000_000], decode=False)
    expected = {round(float(c.sample.sum()), 3) for c in seen}
    assert expected & {round(float(c.sample.sum()), 3) for c in calls}, "the prompts are those of calibration"
    with pytest.raises(ModelError, match="a record of calls was asked for"):
        record(again)
    with pytest.raises(ConfigError, match="at least 1 call"):
        record(denoiser, limit=0)
    assert "fits" not in caplog.text
    record(loaded(saved / "sd", prompts_of(PROMPTS[:2])), limit=1)
    assert "the calls are of 2 prompts alone" in caplog.text


def test_calls_of_one_denoiser_do_not_stand_for_two(saved: Path) -> None:
    both = record(loaded(saved / "wan"), limit=8)
    assert {c.part for c in both} == {"transformer", "transformer_2"}
    denoiser = loaded(saved / "wan", calls=both)
    assert [la.role for la in discover(denoiser)].count("first") == 2
    assert both[0].replay(denoiser.module).shape == both[0].sample.shape
    with torch.no_grad(), capture(denoiser.module["transformer"]) as alone:
        next(call for call in both if call.part == "transformer").outputs(denoiser.module)
    with pytest.raises(ModelError, match=r"transformer, transformer_2 are needed, and those of a single denoiser"):
        loaded(saved / "wan", calls=alone)
    with pytest.raises(ModelError, match="a single denoiser are needed, and those of transformer, transformer_2"):
        loaded(saved / "wan", calls=both, component="transformer")


MINE = """
import torch
from mpqsearch.models import Denoiser
from mpqsearch.sampling import PlainRunner, SamplerSpec

SCHEDULER = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.1, "beta_schedule": "linear"}


class Net(torch.nn.Module):
    sample_shape, scheduler, data_range, n_classes = (1, 6, 6), SCHEDULER, (0.0, 12.0), 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def denoise(self, x, t, cond):
        return self.layer(x) + cond.view(-1, 1, 1, 1)


def denoiser():
    runner = PlainRunner((1, 6, 6), spec=SamplerSpec(steps=7), scheduler=SCHEDULER, n_classes=3)
    return Denoiser(name="whatever", module=Net(), runner=runner)


def number():
    return 3


constant = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the folder of work."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))  # restores the path afterwards
    return name


def test_a_module_from_a_function_says_what_its_samples_are(mine: str) -> None:
    denoiser = load_model(f"{mine}:Net", sampler=SamplerSpec(steps=5))
    assert denoiser.name == "Net"
    (drawn,) = samples(denoiser, [4, 5])
    assert drawn.labels == (1, 2)
    assert denoiser.runner.calls_per_run(denoiser.module) == 5
    expected = (drawn.latents.clamp(0, 12) * (255 / 12)).round().to(torch.uint8)
    assert torch.equal(drawn.images, expected)  # type: ignore[arg-type]
    asked = load_model(f"{mine}:Net", prompts=Prompts(classes=(2,)))
    assert asked.runner.labels([0, 1]) == (2, 2)


def test_a_denoiser_from_a_function_keeps_its_sampler(mine: str) -> None:
    denoiser = load_model(f"{mine}:denoiser")
    assert (denoiser.name, denoiser.source) == ("denoiser", f"{mine}:denoiser")
    assert denoiser.digest == load_model(f"{mine}:Net").digest
    assert denoiser.runner.calls_per_run(denoiser.module) == 7
    assert next(samples(denoiser, [0])).images is None
    for given in ({"sampler": SamplerSpec(steps=3)}, {"prompts": Prompts(classes=(2,))}):
        with pytest.raises(ConfigError, match="a sampler of its own"):
            load_model(f"{mine}:denoiser", **given)  # type: ignore[arg-type]


def test_functions_that_give_no_model_are_refused(mine: str) -> None:
    with pytest.raises(ModelError, match="number returned a int; a Denoiser"):
        load_model(f"{mine}:number")
    with pytest.raises(ModelError, match="is a int and no function"):
        load_model(f"{mine}:constant")
    with pytest.raises(ModelError, match="has no attribute 'nothing'"):
        load_model(f"{mine}:nothing")
    with pytest.raises(ModelError, match="No module named 'not_there'"):
        load_model("not_there:model")
    with pytest.raises(ModelError, match="is no folder: weights are streamed from the disk"):
        open_streamed(f"{mine}:Net")
    assert model_files(f"{mine}:Net") is None


def test_prompts_that_a_model_does_not_take_are_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"draws prompts: name a file of them"):
        latents(loaded(saved / "sd", prompts=None), [0])
    with pytest.raises(ConfigError, match="the class 1000 does not exist: the model has the classes"):
        latents(load_model(str(saved / "dit"), prompts=Prompts(classes=(1000,))), [0])


def test_text_is_encoded_once_for_all_seeds(saved: Path, tmp_path: Path) -> None:
    denoiser = loaded(saved / "sd", encoded=tmp_path / "encoded")
    first: Tensor = latents(denoiser, range(3))
    assert not isinstance(denoiser.runner._pipe.text_encoder, torch.nn.Module), "the text encoder is let go"
    assert torch.equal(latents(loaded(saved / "sd", encoded=tmp_path / "encoded"), range(3)), first)
