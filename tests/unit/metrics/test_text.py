from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from torch import Tensor

from mpqsearch.errors import ModelError
from mpqsearch.metrics import clip_scorer
from mpqsearch.metrics.text import model_files
from mpqsearch.models.runner import Label
from mpqsearch.sampling import SamplerSpec, load_model, samples
from tests.support.pipelines.parts import clip_tokenizer

PROMPTS: list[Label] = ["a red bag", "a blue boot on a dark floor", "x" * 40, "", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, as transformers saves it."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 514,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {"max_position_embeddings": 16, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 24, "patch_size": 8}
    path = tmp_path_factory.mktemp("clip")
    t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(path)
    clip_tokenizer(16).save_pretrained(path)
    t.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(path)
    return path


def pictures(n: int, height: int, width: int) -> Tensor:
    """Smooth random pictures: resizing rules differ most at hard edges, which few pictures have."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (255 * smooth).round().to(torch.uint8)


def expected(folder: Path, images: Tensor, prompts: list[Any]) -> Tensor:
    """Cosines of what transformers' own processor and model make, picture by picture."""
    processor = t.CLIPImageProcessor.from_pretrained(folder)
    model, tokenizer = t.CLIPModel.from_pretrained(folder).eval(), t.AutoTokenizer.from_pretrained(folder)
    values = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = processor(np.asarray(image.permute(1, 2, 0)), return_tensors="pt").pixel_values
        ids = tokenizer([prompt], truncation=True, return_tensors="pt")
        with torch.no_grad():
            values.append(model(pixel_values=pixels, **ids).logits_per_image[0, 0] / model.logit_scale.exp())
    return torch.stack(values)


@pytest.mark.parametrize("size", [(24, 24), (48, 48), (40, 60)])
def test_the_score_is_the_cosine_that_transformers_gives(folder: Path, size: tuple[int, int]) -> None:
    images = pictures(len(PROMPTS), *size)
    found = clip_scorer(folder).score(images, PROMPTS, None)
    cosines = expected(folder, images, list(PROMPTS))
    assert cosines.abs().min() > 1e-3, "cosines near 0 would hide a wrong scale"
    torch.testing.assert_close(found, 100 * cosines.clamp_min(0), rtol=0, atol=1e-3)


def test_grey_pictures_and_pictures_of_which_nothing_was_asked(folder: Path) -> None:
    scorer, images = clip_scorer(folder), pictures(3, 24, 24)
    grey = images[:, :1]
    prompts: list[Label] = ["a red bag", None, 3]
    found = scorer.score(grey, prompts, None)
    torch.testing.assert_close(found[0], scorer.score(grey.expand(-1, 3, -1, -1), prompts, None)[0])
    assert found[1:].isnan().all()
    assert scorer.score(images, [None] * 3, None).isnan().all()


def test_a_folder_that_is_no_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json: give a local folder"):
        clip_scorer(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text('{"model_type": "siglip"}')
    with pytest.raises(ModelError, match="of the type 'siglip'"):
        clip_scorer(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(model_files(folder))


def test_the_embedded_clip_knows_which_caption_is_of_which_picture() -> None:
    """Pictures of `fmnist-t2i`, drawn with their prompts: the own caption scores above that of the next picture."""
    denoiser = load_model("fmnist-t2i", sampler=SamplerSpec(steps=5, batch=8))
    (batch,) = samples(denoiser, range(8))
    assert batch.images is not None
    scorer = clip_scorer("fmnist-clip")
    own = scorer.score(batch.images, batch.labels, None)
    other = scorer.score(batch.images, [*batch.labels[1:], batch.labels[0]], None)
    assert float(own.mean()) > float(other.mean()) + 20
    assert bool((own > other).all())
