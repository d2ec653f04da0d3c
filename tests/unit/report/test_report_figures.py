from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mpqsearch.core import LayerTable, Policy, SensitivityProfile, StudyRecord
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.methods import best_loss, channel_losses
from mpqsearch.pareto import FULL_PRECISION_METHOD, ParetoFront
from mpqsearch.ranks import spearman
from mpqsearch.report import layer_losses, plot_samples, plot_sensitivity, render, sample_grid, save_figure
from mpqsearch.report.front import front_info, plot_front
from mpqsearch.report.grids import difference, page_scale, sample_strip, strip_picture
from mpqsearch.report.prediction import prediction_note
from mpqsearch.report.style import COLOURS, DARK, darkened, series_styles, widen_x

Maps = Callable[..., Any]


def every_plot(
    table: LayerTable, policy: Policy, records: list[StudyRecord], profile: SensitivityProfile
) -> list[tuple[Any, Any]]:
    grid = sample_grid("3 bits", {"full precision": images(0), "ilp": images(1)})
    return [
        (plot_front, front_info(records)),
        (plot_front, front_info(records, "paired_psnr")),
        (plot_sensitivity, layer_losses(profile, table)),
        (plot_samples, grid),
    ]


def images(seed: int, shape: tuple[int, ...] = (10, 6, 5)) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_every_plot_draws_where_it_is_told_and_changes_nothing_global(
    table: LayerTable, policy: Policy, records: list[StudyRecord], profile: SensitivityProfile
) -> None:
    before = dict(mpl.rcParams)
    for plot, info in every_plot(table, policy, records, profile):
        figure = Figure()
        left, right = figure.subplots(1, 2)
        assert plot(info, ax=right) is right
        assert not left.has_data()
        assert right.has_data()
        fresh = plot(info)
        assert isinstance(fresh, Axes)
        assert fresh.figure is not figure
    assert dict(mpl.rcParams) == before


def test_files_are_the_same_when_drawn_again(tmp_path: Path, records: list[StudyRecord]) -> None:
    def draw() -> Axes:
        return plot_front(front_info(records))

    first = save_figure(render(draw), tmp_path / "a.b")
    second = save_figure(render(draw), tmp_path / "other")
    assert [p.name for p in first] == ["a.b.png", "a.b.svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert first[0].read_bytes().startswith(b"\x89PNG")


def test_a_dark_figure_has_no_light_colour_left(tmp_path: Path, records: list[StudyRecord]) -> None:
    light = save_figure(render(lambda: plot_front(front_info(records))), tmp_path / "x")[1].read_bytes()
    dark = darkened(light)
    for colour in (c.lower().encode() for c in DARK):
        assert colour in light
        assert colour not in dark
    assert b"#15181c" in dark
    assert COLOURS[0].lower().encode() in dark


def test_front_has_every_point_of_every_method(records: list[StudyRecord]) -> None:
    info = front_info(records)
    assert [s.name for s in info.series] == ["uniform", "random", "omq", "ilp", "exact-channel"]
    assert info.scale == "log"
    assert info.full_precision is None
    pareto = ParetoFront.from_records(records)
    for series in info.series:
        mine = sorted((r.average_bits, r.metrics["fd_fp"].value) for r in records if r.method == series.name)
        np.testing.assert_array_equal(np.stack([series.bits, series.value], axis=1), np.array(mine))
        assert series.hypervolume == pareto.hypervolume(series.name)
    assert len(info.front) == pareto.on_front.sum()


def test_front_draws_lines_marks_spread_and_full_precision(records: list[StudyRecord]) -> None:
    info = front_info(records, "fd_data")
    ax = plot_front(info)
    assert ax.get_yscale() == "log"
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts == [*(s.legend for s in info.series), "full precision"]
    lines = {line.get_label(): line for line in ax.lines}
    ilp = next(s for s in info.series if s.name == "ilp")
    np.testing.assert_array_equal(lines[ilp.legend].get_ydata(), ilp.value)
    np.testing.assert_array_equal(np.unique(lines["full precision"].get_ydata()), [3.1])
    ends = sorted((s[0][1], s[1][1]) for c in ax.collections if len(c.get_paths()) == 5 for s in c.get_segments())
    assert ends == sorted((v.low, v.high) for v in (r.metrics["fd_data"] for r in records[1:]))


def test_a_metric_that_nobody_measured(records: list[StudyRecord]) -> None:
    with pytest.raises(UnknownNameError, match="paired_mse"):
        front_info(records, "paired_mse")


def test_kernel_distances_are_spread_out_though_they_may_be_negative(records: list[StudyRecord]) -> None:
    assert plot_front(front_info(records, "kid_data")).get_yscale() == "symlog"


def test_unknown_spread_draws_the_point_alone(records: list[StudyRecord]) -> None:
    bare = dataclasses.replace(records[1].metrics["fd_fp"], low=float("nan"), high=float("nan"))
    ax = plot_front(front_info([dataclasses.replace(records[1], metrics={"fd_fp": bare})]))
    assert all(len(c.get_paths()) == 0 for c in ax.collections)


def test_no_two_methods_look_the_same() -> None:
    names = ["uniform", "random", *(f"m{i}" for i in range(10))]
    looks = {(s.colour, s.marker) for s in series_styles(names).values()}
    assert len(looks) == len(names)
    assert series_styles(["uniform (layer)"])["uniform (layer)"] == series_styles(["uniform"])["uniform"]


def test_sensitivity_is_the_loss_that_chooses_widths(table: LayerTable, profile: SensitivityProfile) -> None:
    losses = layer_losses(profile, table, "asymmetric")
    expected = channel_losses(profile, table, "asymmetric", best_loss(profile), bias_correction=True)
    np.testing.assert_allclose(losses.loss, profile.layer_sum(expected))
    assert losses.worst(3) == np.argsort(-losses.loss.max(axis=1))[:3].tolist()
    assert losses.name in losses.label
    legend = plot_sensitivity(losses, worst=2).get_legend().get_texts()
    assert [t.get_text() for t in legend] == [losses.layers[i] for i in losses.worst(2)]
    with pytest.raises(UnknownNameError, match="asymmetric"):
        layer_losses(profile, table, "afine")


def test_prediction_leaves_out_what_was_not_predicted(records: list[StudyRecord]) -> None:
    of = [r for r in records if r.method != FULL_PRECISION_METHOD and np.isfinite(r.predicted_loss)]
    assert len(of) == len(records) - 2  # full precision, and one NaN
    predicted, measured = (
        [key(r) for r in of] for key in (lambda r: r.predicted_loss, lambda r: r.metrics["fd_fp"].value)
    )
    each = [
        spearman(*zip(*((p, m) for r, p, m in zip(of, predicted, measured, strict=True) if r.budget == b), strict=True))
        for b in dict.fromkeys(r.budget for r in of)
    ]
    within = np.mean([value for value in each if np.isfinite(value)])
    note = prediction_note(records)
    assert f"correlation of {spearman(predicted, measured):.2f} (" in note
    assert f"over {len(of)} points" in note
    assert f"within one budget it is {within:.2f} on average" in note
    decibels = [dataclasses.replace(r, metrics={k: v for k, v in r.metrics.items() if k == "paired_psnr"}) for r in of]
    higher = float(re.findall(r"correlation of (\S+) ", prediction_note(decibels))[0])
    assert higher > 0.8, "more decibels are better, so the sign is turned"
    assert prediction_note(of[:2]) == ""


def test_grid_takes_grey_and_colour_and_first_columns() -> None:
    grey = sample_grid("g", {"fp": images(0), "q": images(1)}, columns=4)
    assert grey.reference.shape == (4, 6, 5, 1)
    colour = sample_grid("c", {"fp": images(0, (3, 3, 6, 5))})
    np.testing.assert_array_equal(colour.reference[1, :, :, 2], images(0, (3, 3, 6, 5))[1, 2])
    strip = sample_strip(grey.reference)
    assert strip.shape == (6, 4 * 5 + 3 * 2, 1)
    np.testing.assert_array_equal(strip[:, 7:12, 0], images(0)[1])


def test_captions_stand_below_their_samples() -> None:
    texts = [f"a bag number {i} beside a boot" for i in range(10)]
    grid = sample_grid("c", {"fp": images(0), "q": images(1)}, columns=3, captions=texts)
    assert grid.captions == tuple(texts[:3])
    ax = plot_samples(grid)
    assert [" ".join(label.get_text().split()) for label in ax.get_xticklabels()] == texts[:3]
    assert list(ax.get_xticks()) == [2.5, 9.5, 16.5]  # the middles of tiles five pixels wide, two apart
    with pytest.raises(ConfigError, match="2 captions for 10 samples"):
        sample_grid("c", {"fp": images(0)}, columns=10, captions=texts[:2])


def test_a_video_is_shown_by_its_first_and_its_middle_frame() -> None:
    video = images(0, (2, 5, 3, 6, 4))
    shown = sample_grid("v", {"fp": video}).reference
    assert shown.shape == (2, 12, 4, 3)
    np.testing.assert_array_equal(shown[1, :6], video[1, 0].transpose(1, 2, 0))
    np.testing.assert_array_equal(shown[1, 6:], video[1, 2].transpose(1, 2, 0))


def test_difference_is_absolute_brightened_and_clipped() -> None:
    grid = sample_grid("g", {"fp": np.array([[[10, 200]]], np.uint8), "q": np.array([[[13, 100]]], np.uint8)})
    assert difference(grid, "q").ravel().tolist() == [12, 255]
    assert difference(grid, "fp").ravel().tolist() == [0, 0]


@pytest.mark.parametrize(("size", "n", "scale"), [(28, 10, 1), (512, 1, 0.5), (256, 100, 0.874), (128, 60, 0.999)])
def test_samples_are_reduced_by_their_size_and_number(size: int, n: int, scale: float) -> None:
    grid = sample_grid("3 bits", {"fp": np.zeros((n, size, size), dtype=np.uint8)}, columns=n)
    many = [grid] * (1 if size > 256 else 2)
    assert page_scale(many) == pytest.approx(scale, abs=1e-3)
    picture = Image.open(io.BytesIO(strip_picture(grid.reference, page_scale(many))[0]))
    assert picture.height == round(size * scale)
    assert picture.format == ("PNG" if scale == 1 else "JPEG")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "at least one row"),
        ({"fp": images(0).astype(np.float32)}, "uint8"),
        ({"fp": images(0, (2, 2, 6, 5))}, "1 or 3"),
        ({"fp": images(0), "q": images(0, (9, 6, 5))[:3]}, "same samples"),
        ({"fp": images(0, (0, 6, 5))}, "not empty"),
    ],
)
def test_grids_that_cannot_be_drawn(rows: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample_grid("g", rows)


def test_sizes_equal_but_for_bytes_look_equal() -> None:
    ax = Figure().subplots()
    ax.plot([3.16201, 3.16202], [1, 2])
    widen_x(ax)
    low, high = ax.get_xlim()
    assert high - low == pytest.approx(0.05 * 3.162, rel=1e-3)
    ax.plot([2.0, 8.0], [1, 2])
    ax.set_xlim(2, 8)
    widen_x(ax)
    assert ax.get_xlim() == (2, 8)


def test_the_chosen_point_gets_a_ring_where_it_lies(records: list[StudyRecord]) -> None:
    chosen = next(r for r in records if r.method == "ilp")
    ax = plot_front(front_info(records, chosen=chosen))
    ring = next(line for line in ax.lines if line.get_label() == "chosen")
    assert ring.get_xydata().tolist() == [[chosen.average_bits, chosen.metrics["fd_fp"].value]]
