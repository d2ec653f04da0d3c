from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpqsearch.core import SensitivityProfile
from mpqsearch.errors import ConfigError
from mpqsearch.report import (
    gain_info,
    kurtosis_info,
    plot_gain,
    plot_kurtosis,
    profile_summary,
    sensitivity_info,
    write_profile_figures,
)
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
    found = profile_summary(
        profile(
            kurtosis=kurtosis,
            **{f"layer_sampler_error{suffix}/auto": totals for suffix in ("", "_corrected")},
            **{f"layer_sampler_std_error{suffix}/auto": 0.25 * totals for suffix in ("", "_corrected")},
        ),
        TABLE,
        layers=3,
    )
    assert [row.name for row in found.layers] == [TABLE.layers[i].name for i in (3, 1, 2)]
    assert found.layers[0].losses == pytest.approx(totals[3])
    assert found.layers[0].relative_error == pytest.approx(0.25)
    assert "sampler" in found.label
    assert found.n_outliers == 1
    assert found.outliers[0][:2] == (TABLE.layers[2].name, 1)
    assert found.layers[2].kurtosis == pytest.approx(60.0)
    assert found.outlier_limit < 60


def test_kurtosis_and_gain_show_what_the_profile_holds() -> None:
    rng = np.random.default_rng(0)
    steps = rng.lognormal(size=(TABLE.n_channels, 5)).astype(np.float32)
    steps[:, 2] = 0
    measured = profile(step_sensitivity=steps)
    info = gain_info(measured)
    assert info.edges == (0, 200, 400, 600, 800, 1000)
    assert np.isnan(info.gain[:, 2]).all()
    assert info.gain[1, 0] == pytest.approx(float(steps[6:12, 0].mean()), rel=1e-6)
    image = plot_gain(info).images[0].get_array()
    assert image.shape == (5, len(TABLE))
    scatter = kurtosis_info(measured, bits=4, variant="auto")
    expected = measured.arrays["output_error/auto"][:, 3] / measured.arrays["output_power"]
    np.testing.assert_allclose(scatter.error, expected, rtol=1e-6)
    line = plot_kurtosis(scatter).lines[0]
    assert len(line.get_xdata()) == TABLE.n_channels
    with pytest.raises(ConfigError, match="9"):
        kurtosis_info(measured, bits=9)
    with pytest.raises(ConfigError, match="step_sensitivity"):
        gain_info(profile())


def test_pictures_of_a_profile_and_the_measured_curves(tmp_path: Path) -> None:
    final = np.full((len(TABLE), 8), np.nan, dtype=np.float32)
    final[:, 2] = [5, 4, 3, 2, 1]
    measured = profile(**{"layer_final_error/auto": final})
    info = sensitivity_info(measured, "measured")
    assert info.worst[0] == 0
    assert "auto" in info.label
    names = {p.name for p in write_profile_figures(tmp_path, measured)}
    assert names == {f"profile_{k}.{e}" for k in ("sensitivity", "kurtosis", "measured") for e in ("png", "svg")}
    assert all((tmp_path / n).stat().st_size > 1000 for n in names)


def test_a_profile_of_layers_as_wholes_is_drawn_and_summed_up(tmp_path: Path) -> None:
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
    assert [row.losses for row in summary.layers] == [(9.0, 2.0), (3.0, 1.0), (1.0, 0.5)]
    assert {p.stem for p in write_profile_figures(tmp_path, profile)} == {"profile_sensitivity"}
