"""Every denoiser class of the installed diffusers, from the recording of its calls to an export.

A normal run takes the classes of `SAMPLE` and those that diffusers brought since the recipes were written; with
``MPQSEARCH_TEST_ALL=1`` (``make test-all``) all classes run.
"""

from __future__ import annotations

import pytest

from tests.support.coverage import cover
from tests.support.denoisers import KNOWN_REFUSALS, RECIPES, denoiser_classes, model_classes, reason_against
from tests.support.everything import ALL

SAMPLE = (
    "UNet2DConditionModel",
    "UNetMotionModel",
    "ControlNetModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",  # keeps some layers in float32
    "StableCascadeUNet",
    "MultiControlNetModel",
    "UNet1DModel",  # says that its samples are 65,536 long
)
"""One class of each kind: U-Net, video, control net, transformers of three ages, several models in one, sound."""


def chosen() -> list[str]:
    """The classes of this run."""
    names = sorted(denoiser_classes())
    return [n for n in names if ALL or n in SAMPLE or n not in RECIPES]


@pytest.mark.parametrize("name", chosen())
def test_a_denoiser_goes_all_the_way(name: str) -> None:
    if name in KNOWN_REFUSALS:
        pytest.skip(KNOWN_REFUSALS[name])
    covered = cover(name)
    # Sums of a few hundred float32 products: rounding is below 1e-6, anything wrong in what a layer is multiplied with
    # of order one.
    assert covered.power_error < 1e-5
    assert covered.roles.get("first") == covered.roles.get("last") == 1


def test_at_least_95_percent_of_the_classes_are_covered() -> None:
    names = denoiser_classes()
    covered = [n for n in names if n in RECIPES and n not in KNOWN_REFUSALS]
    print(f"{len(covered)} of {len(names)} denoiser classes ({100 * len(covered) / len(names):.1f} %)")
    assert len(names) > 50
    assert len(covered) >= 0.95 * len(names)
    assert set(SAMPLE) <= set(covered)


def test_models_that_are_left_out_have_a_reason() -> None:
    left = {n: reason_against(c) for n, c in model_classes().items() if n not in denoiser_classes()}
    assert left["AutoencoderKL"].startswith("autoencoder")
    assert left["T2IAdapter"].startswith("takes no time")
    assert not set(left) & set(RECIPES)
    assert not set(KNOWN_REFUSALS) - set(RECIPES)
