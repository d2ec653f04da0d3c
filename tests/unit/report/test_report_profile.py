from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.core import SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.report import render
from mpqsearch.report.profile import profile_summary
from mpqsearch.report.sensitivity import profile_drawing, sensitivity_over_time
from tests.support import tiny_profile, tiny_table

TABLE = tiny_table()


def profile(**arrays: np.ndarray) -> SensitivityProfile:
    base = tiny_profile(TABLE)
    return replace(base, arrays={**base.arrays, **arrays})


def test_summary_names_the_layers_that_lose_most_and_the_heaviest_channels() -> None:
    totals = np.outer([1.0, 5.0, 2.0, 9.0, 0.1], 4.0 ** -np.arange(8)).astype(np.float32)
    kurtosis = np.full(TABLE.n_channels, 3.0, dtype=np.float32)
    kurtosis[::2] = 3.4
    kurtosis[13] = 60.0  # layer 2 has channels 12..17
    summary = profile_summary(
        profile(
            kurtosis=kurtosis,
            **{f"layer_sampler_error{suffix}/auto": totals for suffix in ("", "_corrected")},
            **{f"layer_sampler_std_error{suffix}/auto": 0.25 * totals for suffix in ("", "_corrected")},
        ),
        TABLE,
        layers=3,
    )
    assert [row.name for row in summary.layers] == [TABLE.layers[i].name for i in (3, 1, 2)]
    assert summary.layers[0].losses == pytest.approx(totals[3])
    assert summary.layers[0].relative_error == pytest.approx(0.25)
    assert "sampler" in summary.label
    assert summary.n_outliers == 1
    assert summary.outliers[0][:2] == (TABLE.layers[2].name, 1)
    assert summary.layers[2].kurtosis == pytest.approx(60.0)
    assert summary.outlier_limit < 60


def test_sensitivity_over_time_is_the_mean_of_the_channels() -> None:
    steps = np.random.default_rng(0).lognormal(size=(TABLE.n_channels, 5)).astype(np.float32)
    steps[:, 2] = 0
    info = sensitivity_over_time(profile(step_sensitivity=steps))
    assert info.edges == (0, 20, 40, 60, 80, 100)
    assert np.isnan(info.sensitivity[:, 2]).all()
    assert info.sensitivity[1, 0] == pytest.approx(float(steps[6:12, 0].mean()), rel=1e-6)
    with pytest.raises(ConfigError, match="step_sensitivity"):
        sensitivity_over_time(profile())


def test_a_profile_of_layers_as_wholes_is_drawn_and_summed_up() -> None:
    table = tiny_table(n_layers=3)
    losses = np.array([[3.0, 1.0], [9.0, 2.0], [1.0, 0.5]], dtype=np.float32)
    profile = SensitivityProfile(
        model_digest=table.digest,
        names=tuple(la.name for la in table),
        channels=tuple(la.n_channels for la in table),
        widths=(2, 4),
        calibration={},
        arrays={"layer_probe_error/auto": losses},
    )
    summary = profile_summary(profile, table)
    np.testing.assert_allclose([row.losses for row in summary.layers], losses[[1, 0, 2]], rtol=1e-9)
    drawing = profile_drawing(profile, table)
    assert drawing.key == "profile_sensitivity"
    assert render(drawing.draw).axes
