"""Every denoiser class of the installed diffusers, from the recording of its calls to an export. New classes are tried
by themselves."""

from __future__ import annotations

import pytest

from tests.support.coverage import cover
from tests.support.denoisers import NOT_COVERED, RECIPES, denoiser_classes, model_classes, reason_against

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(denoiser_classes()))
def test_a_denoiser_goes_all_the_way(name: str) -> None:
    if name in NOT_COVERED:
        pytest.skip(NOT_COVERED[name])
    try:
        found = cover(name)
    except Exception as error:
        if name in RECIPES:
            raise
        pytest.xfail(
            f"no recipe yet, and the one made from its signature does not run: {type(error).__name__}: {error}"
        )
    # Sums of a few hundred float32 products: rounding is below 1e-6, anything wrong in what a layer is multiplied with
    # of order one.
    assert found.power_error < 1e-5
    assert found.roles.get("first") == found.roles.get("last") == 1


def test_at_least_95_percent_of_the_classes_are_covered() -> None:
    names = denoiser_classes()
    covered = [n for n in names if n in RECIPES and n not in NOT_COVERED]
    print(f"{len(covered)} of {len(names)} denoiser classes ({100 * len(covered) / len(names):.1f} %)")
    assert len(names) > 50
    assert len(covered) >= 0.95 * len(names)


def test_models_that_are_left_out_have_a_reason() -> None:
    left = {n: reason_against(c) for n, c in model_classes().items() if n not in denoiser_classes()}
    assert left["AutoencoderKL"].startswith("autoencoder")
    assert left["T2IAdapter"].startswith("takes no time")
    assert not set(left) & set(RECIPES)
    assert not set(NOT_COVERED) - set(RECIPES)
