"""The drawing of the whole trade-off."""

from __future__ import annotations

import numpy as np
import pytest

from mpqsearch.errors import ConfigError
from mpqsearch.report import PathSeries, plot_path
from mpqsearch.report.paths import DRAWN_VERTICES


def series(name: str, count: int) -> PathSeries:
    cost = np.cumsum(np.random.default_rng(0).exponential(size=count))
    return PathSeries(
        name=name,
        cost=cost,
        loss=np.append(2.0 ** -np.arange(count - 1, dtype=float).clip(0, 60), 0.0),
        asked_cost=cost[[1]],
        asked_loss=np.array([0.5]),
    )


def test_every_method_has_a_line_and_a_marker_for_every_budget() -> None:
    axes = plot_path([series("ilp-layer", 12), series("ilp-channel", 20)])
    lines = axes.get_lines()
    assert len(lines) == 4
    np.testing.assert_array_equal(lines[0].get_xdata(), series("ilp-layer", 12).cost)
    np.testing.assert_array_equal(lines[1].get_ydata(), [0.5])
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ilp-layer", "ilp-channel"]
    assert axes.get_ylim()[0] > 0, "a last loss of zero must not open the axis without end"


def test_long_paths_are_thinned_along_the_cost_and_keep_their_ends() -> None:
    whole = series("ilp-channel", 50_000)
    cost, loss = plot_path([whole]).get_lines()[0].get_data()
    assert len(cost) <= DRAWN_VERTICES + 2
    assert (cost[0], cost[-1]) == (whole.cost[0], whole.cost[-1])
    assert np.diff(cost).max() < 3 * (whole.cost[-1] - whole.cost[0]) / DRAWN_VERTICES
    assert np.isin(loss, whole.loss).all()


def test_no_loss_at_all_is_drawn_on_a_plain_axis() -> None:
    flat = PathSeries(
        name="a",
        cost=np.ones(1),
        loss=np.zeros(1),
        asked_cost=np.ones(1),
        asked_loss=np.zeros(1),
    )
    assert plot_path([flat]).get_yscale() == "linear"


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="no path"):
        plot_path([])
