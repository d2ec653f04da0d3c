"""Tables that break no word, values that a shell completes, and how extras are installed."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from rich import console as rich_console

from mpqsearch.cli import app
from mpqsearch.cli.printing import print_table
from mpqsearch.errors import install

ROOT = Path(__file__).parents[2]
ROWS = [
    {"layer": f"down_blocks.{i}.attentions.0.transformer_blocks.0.ff.net.0.proj", "role": "feed-forward"}
    | {f"{bits} bit": f"{1.234e-05 * bits:.3g}" for bits in range(1, 9)}
    for i in range(3)
]


@pytest.mark.parametrize("columns", [70, 80, 120, 200])
def test_a_table_fits_the_terminal_and_breaks_no_word_and_no_number(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rich_console.Console, "is_terminal", True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    print_table("losses", ROWS)
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= columns
    assert "net.0.proj" in text
    assert "feed-forward" in text
    shown = [name for name in ROWS[0] if name in text.split("Not shown")[0]]
    assert len(shown) >= 3
    assert all(ROWS[2][name] in text for name in shown if name != "layer")
    assert ("Not shown, for want of room" in text) == (len(shown) < len(ROWS[0]))
    assert (columns == 200) == ("Not shown" not in text and "…" not in text)
    print_table("scorer", [{"name": "lpips", "note": f"heads: {'/site-packages' * 7}/alex.pth"}])
    assert "alex.pth" in capsys.readouterr().out, "a long path in a sentence is shortened, and its column stays"


@pytest.mark.parametrize(
    ("written", "offered"),
    [
        ("export --target gg", {"gguf"}),
        ("import x.json --from comf", {"comfyui"}),
        ("profile --model fmnist-d", {"fmnist-dit"}),
        (f"export -c {ROOT}/studies/flow.toml --method ilp", {"ilp-layer", "ilp-channel"}),
        ("allocate --method u", {"uniform"}),
        ("run a.toml --set evaluate.sc", {"evaluate.scorers="}),
        ("search --sampler t", {"tpe"}),
        ("profile --device cu", {"cuda"}),
    ],
)
def test_a_shell_completes_values(
    written: str, offered: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_MPQSEARCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"mpqsearch {written}")
    monkeypatch.setenv("COMP_CWORD", str(len(written.split())))
    with pytest.raises(SystemExit):
        app(prog_name="mpqsearch")
    assert set(capsys.readouterr().out.split()) == offered


def test_an_extra_is_installed_from_where_the_package_came(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        told: str | None = None

        def read_text(self, _name: str) -> str | None:
            return self.told

    monkeypatch.setattr(metadata, "distribution", lambda _: Distribution())
    assert install("fid") == "pip install 'mpqsearch[fid]'"
    Distribution.told = json.dumps({"url": "file:///home/me/mpqsearch", "dir_info": {"editable": True}})
    assert install("fid") == "pip install '/home/me/mpqsearch[fid]'"
