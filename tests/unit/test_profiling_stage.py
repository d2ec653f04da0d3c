"""The stage that profiles: what an interrupted run may hand to the next one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpqsearch.config import config_from
from mpqsearch.core import SensitivityProfile
from mpqsearch.profile import Arrays, Partial
from mpqsearch.stages import Run, layers, profile
from tests.support.tiny import DDPM, tiny_unet


class _Stops(Exception):  # noqa: N818
    pass


def test_layers_kept_under_a_memory_limit_serve_a_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_unet().save_pretrained(tmp_path / "model", safe_serialization=True)  # type: ignore[operator]
    (tmp_path / "model" / "scheduler_config.json").write_text(json.dumps(DDPM))

    def measured(folder: str, limit: str) -> SensitivityProfile:
        config = config_from(
            {
                "model": {"source": str(tmp_path / "model"), "memory_limit": limit},
                "policy": {"widths": [2, 4]},
                "sampler": {"steps": 2},
                "quantizer": {"n_candidates": 10},
                "calibration": {
                    "samples": 2, "probe_inputs": 2, "probes": 1, "sampler_seeds": 0, "schemes": ["asymmetric"],
                    "final_widths": []
                },
            }
        )  # fmt: skip
        run = Run(config=config, folder=tmp_path / folder)
        layers(run)
        found = profile(run)
        assert found is not None
        return found

    save, kept = Partial.save, []

    def few(self: Partial, part: int | str, arrays: Arrays) -> None:
        if len(kept) == 3:
            raise _Stops
        kept.append(part)
        save(self, part, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "save", few)
        with pytest.raises(_Stops):
            measured("run", "50MB")
    assert kept == [0, 1, 2]
    continued, straight = measured("run", ""), measured("other", "")
    assert continued.arrays.keys() == straight.arrays.keys()
    for key, array in straight.arrays.items():
        np.testing.assert_allclose(
            continued.arrays[key], array, err_msg=key, rtol=1e-4, atol=1e-5 * np.abs(array).max()
        )
