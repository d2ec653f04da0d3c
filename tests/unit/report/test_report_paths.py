"""The drawing of the whole trade-off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpqsearch.errors import ConfigError
from mpqsearch.report import plot_path


def path_of(name: str, losses: list[float], unit: str = "bits stored") -> dict[str, Any]:
    points = [{"cost": 100 * (i + 1), "loss": loss, "rate": 0.0} for i, loss in enumerate(losses)]
    asked = [{"budget": "1bit", "limit": 150, **points[0]}, {"budget": "9bit", "limit": 1, "smallest": 100}]
    return {"method": {"name": name}, "unit": unit, "n_parameters": 50, "points": points, "budgets": asked}


def test_every_method_has_a_line_and_a_marker_for_every_budget() -> None:
    axes = plot_path([path_of("ilp-layer", [4.0, 2.0, 1.0]), path_of("ilp-channel", [3.0, 1e-9, 0.0])])
    lines = axes.get_lines()
    assert len(lines) == 4
    np.testing.assert_array_equal(lines[0].get_xdata(), [2, 4, 6])
    np.testing.assert_array_equal(lines[1].get_ydata(), [4.0])
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ilp-layer", "ilp-channel"]
    assert axes.get_ylim()[0] == pytest.approx(4e-6), "a last loss of nearly nothing must not open the axis"


def test_other_quantities_are_drawn_as_they_are_and_no_loss_at_all_on_a_plain_axis() -> None:
    axes = plot_path([path_of("a", [0.0, 0.0], "BOPs")])
    assert axes.get_yscale() == "linear"
    assert axes.get_xlabel() == "BOPs of one forward pass"
    np.testing.assert_array_equal(axes.get_lines()[0].get_xdata(), [100, 200])


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="no path"):
        plot_path([])
