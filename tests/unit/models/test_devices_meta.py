"""Nothing mixes devices: the tensor code of these rooms on the device ``meta``, which refuses tensors of another."""

from __future__ import annotations

import pytest
import torch

from mpqsearch.models import Denoiser, discover, make_call
from mpqsearch.sampling import SamplerSpec, chain_of, labels_of, noise_of, trajectory
from tests.support.tiny import CLASSES, tiny_dit, tiny_unet


@pytest.fixture(params=["unet", "dit"])
def elsewhere(request: pytest.FixtureRequest) -> Denoiser:
    """A tiny model on another device than the processor."""
    module = (tiny_unet if request.param == "unet" else tiny_dit)().to("meta").eval().requires_grad_(False)
    return Denoiser(name="fake", module=module, sample_shape=(1, 8, 8), n_classes=CLASSES, null_class=CLASSES)


def test_mixed_devices_are_noticed(elsewhere: Denoiser) -> None:
    with pytest.raises(RuntimeError, match="device"):
        elsewhere.module(torch.zeros(1, 1, 8, 8), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.long))


def test_discovery_and_replay_follow_the_device_of_the_model(elsewhere: Denoiser) -> None:
    table = discover(elsewhere)
    call = make_call(elsewhere.module, torch.zeros(1, 1, 8, 8), torch.tensor([3]), class_labels=torch.tensor([1]))
    assert call.replay(elsewhere.module).device.type == "meta"
    assert [la.name for la in discover(elsewhere.with_calls([call]))] == [la.name for la in table]


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_the_sampler_follows_the_device_of_the_model(elsewhere: Denoiser, name: str) -> None:
    spec = SamplerSpec(name=name, steps=3, guidance=2.0)
    x, labels = noise_of([0, 1], elsewhere.sample_shape).to("meta"), labels_of(elsewhere, [0, 1])
    assert isinstance(labels, torch.Tensor)
    with torch.no_grad():
        steps = list(trajectory(elsewhere, x, labels.to("meta"), spec))
    assert {s.after.device.type for s in steps} == {"meta"}
    assert chain_of(elsewhere, [0, 1], spec).final.device.type == "meta"
