import pytest
import torch

from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.models import resolve_device
from mpqsearch.sampling import load_model


@pytest.fixture(params=[0, 2])
def cards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with so many CUDA devices, and no MPS."""
    n = int(request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return n


def test_auto_takes_the_graphics_card_if_there_is_one(cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("auto") == resolve_device() == torch.device("cuda" if cards else "cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda" if cards else "mps")
    assert resolve_device("mps") == torch.device("mps")


def test_what_is_asked_for_is_there_or_refused_in_one_line(cards: int) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    if cards:
        assert resolve_device("cuda:1") == torch.device("cuda", 1)
    for name in ("mps", *([] if cards else ["cuda"]), "cuda:7"):
        with pytest.raises(ConfigError, match=f"device '{name}'") as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:1", "CUDA"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="device"):
        resolve_device(name)


def test_a_model_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device 'cuda'"):
        load_model("no-such-model", device="cuda")
