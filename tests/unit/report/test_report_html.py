from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpqsearch.core import LayerTable, Policy, SensitivityProfile, StudyRecord, size_bytes, uniform_map
from mpqsearch.report import ReportContent, build_report, layer_losses, sample_grid
from mpqsearch.report.grids import page_scale, save_samples
from mpqsearch.report.hover import map_in_one_line
from mpqsearch.report.html import grid_on_page
from mpqsearch.report.layers import layers_table
from mpqsearch.report.tables import read_pareto_json


@pytest.fixture(scope="session")
def content(
    table: LayerTable, policy: Policy, records: list[StudyRecord], profile: SensitivityProfile
) -> ReportContent:
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 256, (8, 12, 12)).astype(np.uint8) for name in ("full precision", "uniform", "ilp")}
    return ReportContent(
        title="A <study> & more",
        records=records,
        table=table,
        policy=policy,
        maps={"ilp, 3 bits": uniform_map(table, policy, 3)},
        point_maps={r.bit_map_digest: uniform_map(table, policy, 3) for r in records if r.method == "ilp"},
        profile=profile,
        grids=[sample_grid("3 bits", rows, first_seed=7)],
        chosen=next(r for r in records if r.method == "ilp" and r.budget == "uniform:3"),
        chosen_file="allocations/ilp@uniform-3/bitmap.json",
        export_command="mpqsearch export --budget uniform:3",
        correlations=[{"predictor": "gain × error", "spearman": 0.91234, "layers": 26}],
        environment={"mpqsearch": "0.1.0", "cores": 2, "libraries": {"torch": "2.13.0"}},
        config='[model]\nsource = "<script>alert(1)</script>"\n',
        command="mpqsearch run studies/quickstart.toml",
        digests={"model": "ab" * 32},
        seconds={"profile": 12.34},
        notes=["A note."],
    )


@pytest.fixture(scope="session")
def folder(content: ReportContent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report")
    paths = build_report(where, content, {"config": "c" * 64})
    assert sorted(paths) == sorted(p for p in where.rglob("*") if p.is_file()), (
        "every file is named, no temporary one is left"
    )
    return where


@pytest.fixture(scope="session")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


class Outline(html.parser.HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed."""

    void = frozenset({"meta", "img", "br", "source", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]


def test_the_page_is_well_formed_and_needs_nothing_else(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert outline.all("link") == []
    assert all("src" not in a for a in outline.all("script"))
    sources = [a["src"] for a in outline.all("img")] + [a["srcset"] for a in outline.all("source")]
    assert len(sources) > 10
    assert all(str(s).startswith("data:image/") for s in sources)
    assert not re.search(r"https?://", re.sub(r"data:[^\"]*", "", page))
    policy = next(a["content"] for a in outline.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")


def test_every_picture_says_what_it_shows(page: str) -> None:
    texts = [a.get("alt") for a in Outline(page).all("img")]
    assert all(texts)
    assert len(set(texts)) == len(texts)
    assert any("ilp: from" in str(t) for t in texts)


def test_user_text_is_escaped(page: str) -> None:
    assert "<h1>A &lt;study&gt; &amp; more</h1>" in page
    assert "<script>alert" not in page


def test_it_says_what_was_measured_and_what_it_is_not(page: str, records: list[StudyRecord]) -> None:
    text = " ".join(" ".join(Outline(page).text).split())
    for part in (
        "FD[fmnist-cnn@1a2b3c4d]-128 vs FP",
        "2,048",
        "0..2047",
        "searched widths",
        "not comparable with published FID",
        "mpqsearch run studies/quickstart.toml",
        "ab" * 32,
        "2.13.0",
        "A note.",
        "Spearman rank correlation",
        "scales and zero points",
        "channel tags",
        "the difference is not called a win",
        "gain × error",
        "0.912",
    ):
        assert part in text, part
    ilp = next(r for r in records if r.method == "ilp" and r.budget == "uniform:3")
    fd = ilp.metrics["fd_fp"]
    assert f"{fd.value:.3f}" in text
    assert f"{fd.low:.3f} – {fd.high:.3f}" in text
    assert f"{ilp.size_bytes / 1000:,.1f}" in text


def test_it_recommends_a_map_and_says_what_it_is_worth(page: str, content: ReportContent) -> None:
    box = page[page.index("Take this map") : page.index("</section>", page.index("Take this map"))]
    assert content.chosen is not None
    assert content.table is not None
    uniform = next(r for r in content.records if r.method == "uniform" and r.budget == "uniform:3")
    for part in (
        f"{content.chosen.size_bytes / 1000:,.1f} kB",
        f"{content.chosen.size_bytes / (2 * content.table.n_parameters):.0%} of the",
        f"{content.chosen.metrics['fd_fp'].value:.3f} (uniform: {uniform.metrics['fd_fp'].value:.3f})",
        'href="allocations/ilp%40uniform-3/bitmap.json"',
        "mpqsearch export --budget uniform:3",
    ):
        assert part in box, part


def test_the_layers_have_the_bits_bytes_and_losses_of_the_map(page: str, content: ReportContent) -> None:
    assert content.table is not None
    assert content.profile is not None
    table = layers_table(content.table, content.maps, content.profile)
    (bit_map,) = content.maps.values()
    assert [name for name, _ in table.headings][-3:] == [f"{what}, ilp, 3 bits" for what in ("Bits", "kB", "Loss")]
    kept = sum(layer.n_values for layer in content.table.kept) * 2
    total = sum(row[4].sort for row in table.rows) * 1000 + kept
    assert total == pytest.approx(size_bytes(content.table, bit_map), abs=1)
    losses = layer_losses(content.profile, content.table, bit_map.format.name)
    assert table.rows[1][5].sort == pytest.approx(losses.loss[1, content.profile.widths.index(3)])
    assert page.count("<tr>", page.index('<table id="layers"')) > len(content.table)


def test_table_has_a_row_per_record_and_a_heading_per_cell(page: str, records: list[StudyRecord]) -> None:
    body = page[page.index('<table id="points"') : page.index("</table>", page.index('<table id="points"'))]
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    assert len(rows) == len(records) + 1
    n = rows[0].count("<th ")
    assert rows[0].count("<button") == n
    assert {r.count("<td ") for r in rows[1:]} == {n}


def test_samples_are_there_pixel_for_pixel(page: str, content: ReportContent) -> None:
    outline = Outline(page)
    found = next(a["src"] for a in outline.all("img") if a["alt"] == "8 samples, ilp, 3 bits")
    strip = np.array(Image.open(io.BytesIO(base64.b64decode(str(found).split(",")[1]))))
    np.testing.assert_array_equal(strip[:, 14:26], content.grids[0].rows["ilp"][1, :, :, 0])


def test_a_study_of_512_pixels_is_a_page_of_less_than_20_mb_and_has_the_full_size_beside_it(
    tmp_path: Path,
) -> None:
    """The third of the samples that a study of 12 methods at 3 budgets shows of a pipeline for text."""
    rng, waves = np.random.default_rng(0), np.linspace(0, 9, 512)
    smooth = 128 + 90 * np.sin(waves)[:, None] * np.cos(waves)[None, :]
    noisy = np.clip(smooth + rng.normal(0, 12, (5, 3, 512, 512)), 0, 255).astype(np.uint8)
    rows = {f"method {i}": np.roll(noisy, 9 * i, -1) for i in range(13)}
    grid = sample_grid("2 bits", rows, captions=[f"prompt {i}" for i in range(5)], first_seed=0)
    scale = page_scale([grid] * 3)
    shown_rows = grid_on_page(grid, scale)["rows"]
    shown = [row[k] for row in shown_rows for k in ("samples", "difference")]
    assert scale == pytest.approx(0.44, abs=0.01)
    assert 1e6 < 3 * sum(map(len, shown)) < 19e6
    assert shown_rows[12]["file"] == "figures/samples_2-bits/method-12-"
    saved = save_samples(tmp_path, dataclasses.replace(grid, rows={"method 12": grid.rows["method 12"]}))
    assert [p.relative_to(tmp_path).as_posix() for p in saved][4] == "samples_2-bits/method-12-5.jpg"
    assert Image.open(saved[4]).size == (512, 512)


def test_one_heat_map_shows_bits_losses_and_time_with_the_name_of_each_layer(page: str, content: ReportContent) -> None:
    (found,) = (json.loads(str(a["data-heat"])) for a in Outline(page).all("div") if a.get("class") == "heat")
    assert content.table is not None
    assert content.profile is not None
    assert [name for name, _ in found["layers"]] == [la.name for la in content.table]
    bits, losses, *rest = found["maps"]
    assert set(bits["values"][0]) <= {3.0, 8.0, 16.0}
    assert losses["rows"] == [f"{w} bits" for w in content.profile.widths]
    wanted = layer_losses(content.profile, content.table).loss
    given = np.array(losses["values"], dtype=float).T
    np.testing.assert_allclose(given[wanted > 0], wanted[wanted > 0], rtol=1e-3)
    assert ("step_sensitivity" in content.profile.arrays) == bool(rest)


def test_files_beside_it(folder: Path, records: list[StudyRecord]) -> None:
    assert len(read_pareto_json(folder / "pareto.json")) == len(records)
    names = {p.stem for p in (folder / "figures").glob("*.png")}
    assert names == {p.stem for p in (folder / "figures").glob("*.svg")}
    assert {
        "front_fd_fp",
        "front_fd_data",
        "profile_sensitivity",
        "samples_3-bits",
    } <= names


def test_the_same_content_gives_the_same_bytes(folder: Path, content: ReportContent, tmp_path: Path) -> None:
    few = dataclasses.replace(content, records=content.records[:6], maps={}, grids=[], profile=None)
    for where in (tmp_path / "a", tmp_path / "b"):
        build_report(where, few)
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


def test_records_alone_are_enough(tmp_path: Path, records: list[StudyRecord]) -> None:
    build_report(tmp_path, ReportContent(title="few", records=records[:2]))
    page = (tmp_path / "report.html").read_text()
    assert Outline(page).open == []
    assert 'id="samples"' not in page
    assert 'id="predictions"' not in page


def test_nothing_measured_is_said(tmp_path: Path, records: list[StudyRecord]) -> None:
    for only in ([], records[:1]):
        build_report(tmp_path, ReportContent(title="none", records=only))
        assert "there is no front" in (tmp_path / "report.html").read_text()


def test_a_point_of_the_front_shows_its_map(page: str, records: list[StudyRecord]) -> None:
    spots = [a for a in Outline(page).all("button") if str(a.get("class", "")).startswith("spot")]
    measured = [r for r in records if r.method != "full-precision" and "fd_fp" in r.metrics]
    assert len(spots) == len(measured)
    labels = [str(a["aria-label"]) for a in spots]
    ilp = next(r for r in measured if r.method == "ilp" and r.budget == "uniform:3")
    assert any(label.startswith("ilp") and f"{ilp.average_bits:.3f} bits" in label for label in labels)
    assert page.count('class="bits"') == sum(r.method == "ilp" for r in measured), (
        "maps that are known are shown, others are not made up"
    )
    # More bits lie further right, a smaller distance further down.
    left = {
        label: float(str(a["style"]).split("left:")[1].split("%")[0]) for label, a in zip(labels, spots, strict=True)
    }
    bits = {label: float(label.split(", ")[1].split(" ")[0]) for label in labels}
    assert sorted(labels, key=lambda x: left[x]) == sorted(labels, key=lambda x: bits[x]) or len(
        set(bits.values())
    ) < len(bits)


def test_the_map_in_one_line_folds_many_layers(table: LayerTable, policy: Policy) -> None:
    line = map_in_one_line(table, uniform_map(table, policy, 3), columns=5)
    assert len(line) == 5
    assert "▃" in line


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_PROBE = """<script>
addEventListener("error", e => document.body.dataset.error = e.message, true);
addEventListener("load", () => {
  const column = 3, table = document.getElementById("points");
  const values = () => [...table.tBodies[0].rows].map(r => r.cells[column].dataset.v).join(" ");
  const heading = table.tHead.rows[0].cells[column], button = heading.querySelector("button");
  button.click(); document.body.dataset.up = values(); document.body.dataset.sort = heading.getAttribute("aria-sort");
  button.click(); document.body.dataset.down = values();
  button.focus(); document.body.dataset.focus = document.activeElement === button;
  const fd = [...table.tHead.rows[0].cells].findIndex(c => c.innerText.startsWith("FD to full"));
  table.tHead.rows[0].cells[fd].querySelector("button").click();
  document.body.dataset.last = table.tBodies[0].rows[table.tBodies[0].rows.length - 1].cells[0].innerText;
  const tools = document.querySelector('.tools[data-table="points"]'), filter = tools.querySelector("input");
  filter.value = "ILP uniform:3"; filter.dispatchEvent(new Event("input"));
  document.body.dataset.shown = [...table.tBodies[0].rows].filter(r => !r.hidden).length;
  document.execCommand = () => { document.body.dataset.copied = document.querySelector("textarea").value; };
  tools.querySelector("button").click(); document.body.dataset.markdown = document.body.dataset.copied;
  document.getElementById("copy-command").click();
  const strip = document.querySelectorAll(".pick")[1], box = strip.getBoundingClientRect();
  strip.dispatchEvent(new MouseEvent("click", { clientX: box.left + 0.4 * box.width, clientY: box.top + 2 }));
  document.body.dataset.sample = document.querySelector(".compare p").textContent;
  const dialog = document.querySelector("dialog");
  document.body.dataset.large = `${dialog.open}: ${dialog.querySelector("p").textContent}`;
  dialog.querySelector("button").click();
  const heat = document.querySelector(".heat"), canvas = heat.querySelector("canvas");
  const area = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: area.left + area.width - 1, clientY: area.top + 2 }));
  document.body.dataset.cell = heat.querySelector(".here").textContent;
  const choice = heat.querySelector("select");
  choice.selectedIndex = 1; choice.dispatchEvent(new Event("input"));
  document.body.dataset.heat = `${canvas.width} ${canvas.height}`;
  document.body.dataset.over = document.querySelectorAll(".pair div")[1].style.backgroundImage.slice(5, 15);
  const spots = [...document.querySelectorAll(".spot")];
  document.body.dataset.covered = spots.every(spot => {
    const r = spot.getBoundingClientRect();
    const top = document.elementFromPoint((r.left + r.right) / 2, (r.top + r.bottom) / 2)?.closest(".spot");
    return !top || top === spot
      || top.querySelector(".tip").textContent.includes(spot.querySelector("strong").textContent);
  });
  spots[0].focus(); document.body.dataset.tip = getComputedStyle(spots[0].querySelector(".tip")).display;
  const plot = spots[0].parentElement.getBoundingClientRect();
  document.body.dataset.outside = spots.filter(s => { const r = s.getBoundingClientRect();
    const x = (r.left + r.right) / 2, y = (r.top + r.bottom) / 2;
    return x < plot.left || x > plot.right || y < plot.top || y > plot.bottom; }).length;
  document.body.dataset.broken = [...document.images].filter(i => !i.naturalWidth).length;
  document.body.dataset.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_it_sorts_and_shows_every_picture(
    page: str, content: ReportContent, tmp_path: Path, records: list[StudyRecord], width: int
) -> None:
    (tmp_path / "probe.html").write_text(page.replace("</body>", _PROBE))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
    ]
    command = [str(CHROMIUM), *flags, "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path / 'probe.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    body: dict[str, Any] = next(a for t, a in Outline(done.stdout).tags if t == "body")
    assert "data-error" not in body
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    bits = sorted(r.average_bits for r in records)
    assert [float(v) for v in body["data-up"].split()] == pytest.approx(bits)
    assert [float(v) for v in body["data-down"].split()] == pytest.approx(bits[::-1])
    assert (body["data-sort"], body["data-focus"]) == ("ascending", "true")
    assert body["data-last"].startswith("full-precision"), "cells without a value stay at the end"
    assert body["data-shown"] == "1"
    lines = body["data-markdown"].splitlines()
    assert (len(lines), lines[2].startswith("| ilp | uniform:3 |")) == (3, True)
    assert body["data-copied"] == "mpqsearch export --budget uniform:3"
    assert (body["data-sample"], body["data-over"]) == ("Sample 4, seed 10", "data:image")
    assert body["data-large"] == "true: uniform. Sample 4, seed 10"
    layers, profile = content.table, content.profile
    assert layers is not None
    assert profile is not None
    assert body["data-cell"].startswith(f"{layers.layers[-1].name} (")
    assert body["data-heat"] == f"{len(layers)} {len(profile.widths)}"
    assert body["data-covered"] == "true", "a point that another one covers is named by it"
    assert body["data-broken"] == "0"
    assert (body["data-tip"], body["data-outside"]) == ("block", "0")
    assert int(body["data-overflow"]) <= 0, "nothing makes the page wider than the screen"
