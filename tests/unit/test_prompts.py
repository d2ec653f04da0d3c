"""Prompts: files as people have them, the field's prompt sets, splits that share nothing, and mistakes named."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mpqsearch.config import Config, config_from, load_config
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.prompts import BANDS, Prompt, Prompts, read_prompts
from mpqsearch.prompts.reading import name_seed, read_file
from mpqsearch.prompts.splits import split_of
from mpqsearch.specs import PromptsSpec

FITTED = [split for split in BANDS if split != "report"]


def write(folder: Path, name: str, content: str | bytes | Any) -> str:
    path = folder / name
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def prompts_of(file: str, **settings: Any) -> Prompts:
    prompts = read_prompts(PromptsSpec(file=file, **settings))
    assert prompts is not None
    return prompts


def lines(n: int) -> str:
    return "".join(f"picture {i}\n" for i in range(n))


ROWS = [
    Prompt(text='a "red" shoe, left', negative="blurry", label=3),
    Prompt(text="ein Stiefel für Zoë 🥾", negative="", label=None),
]
CELLS = '"a ""red"" shoe, left",blurry,3\nein Stiefel für Zoë 🥾,,\n'
OBJECTS = [
    {"prompt": ROWS[0].text, "negative": "blurry", "label": 3},
    {"prompt": ROWS[1].text, "negative": None, "label": None},
]


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", "prompt,negative,label\n" + CELLS, {}),
        ("bom.csv", b"\xef\xbb\xbf" + ("Caption,Negative_Prompt,class\n" + CELLS).replace("\n", "\r\n").encode(), {}),
        ("named.csv", "p,n,c\n" + CELLS, {"prompt": "p", "negative": "n", "label": "c"}),
        (
            "a.tsv",
            "prompt\tnegative\tlabel\n" + CELLS.replace(",b", "\tb").replace(",3", "\t3").replace(",,", "\t\t"),
            {},
        ),
        ("a.jsonl", "\n".join(map(json.dumps, OBJECTS)) + "\n\n", {}),
        ("a.json", OBJECTS, {}),
    ],
)
def test_every_format_gives_the_same_prompts(
    tmp_path: Path, name: str, content: Any, columns: Mapping[str, str]
) -> None:
    assert read_file(Path(write(tmp_path, name, content)), columns) == ROWS


def test_text_files_and_tables_by_name(tmp_path: Path) -> None:
    text = read_file(Path(write(tmp_path, "a.txt", b"\xef\xbb\xbfa cat, asleep\r\n# no comment\r\n\r\n")), {})
    assert text == [Prompt(text="a cat, asleep"), Prompt(text="# no comment")]
    named = [Prompt(text="yes", name="0001"), Prompt(text="a: dog", name="0002")]
    assert read_file(Path(write(tmp_path, "a.yaml", "'0001': yes\n0002: 'a: dog'\n")), {}) == named
    assert read_file(Path(write(tmp_path, "a.json", {"0001": "yes", "0002": {"prompt": "a: dog"}})), {}) == named


def test_an_empty_column_name_leaves_the_column_out(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", "prompt,class,image\na cat,animals,real/1.png\n")
    assert read_file(Path(file), {"label": ""}) == [Prompt(text="a cat")]
    with pytest.raises(ConfigError, match=r"line 2: a label .*'animals'.*label = \"\""):
        read_file(Path(file), {})


@pytest.mark.parametrize(
    ("n", "sizes"), [(10, [5, 1, 2, 1, 1]), (11, [6, 1, 2, 1, 1]), (1000, [500, 150, 150, 100, 100])]
)
def test_splits_share_no_prompt_and_hold_them_all(tmp_path: Path, n: int, sizes: list[int]) -> None:
    prompts = prompts_of(write(tmp_path, "a.txt", lines(n) + lines(n)))  # each twice
    assert [len(listed) for listed in prompts.splits.values()] == sizes
    texts = [p.text for listed in prompts.splits.values() for p in listed]
    assert sorted(texts) == sorted(lines(n).split("\n")[:-1])
    for split, first in BANDS.items():
        size = len(prompts.splits[split])
        of_band = [prompts.of(first + i) for i in range(size + 1)]
        assert [p.text for p in of_band] == [p.text for p in (*prompts.splits[split], prompts.splits[split][0])]
        assert [p.noise_seed for p in of_band] == list(range(first, first + size + 1))


def test_splits_are_not_runs_of_a_sorted_file(tmp_path: Path) -> None:
    prompts = prompts_of(write(tmp_path, "a.txt", lines(1000)))
    for listed in prompts.splits.values():
        early = sum(int(p.text.split()[1]) < 500 for p in listed) / len(listed)
        assert 0.35 < early < 0.65


def test_bands() -> None:
    assert [split_of(s) for s in (0, 999_999, 1_000_000, 2_000_000, 3_999_999, 4_000_000, 9_000_000)] == [
        *("report", "report", "calibration", "training", "development", "search", "search")
    ]
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        split_of(-1)


@pytest.mark.parametrize("n", [1, 9])
def test_few_prompts_serve_all_splits_with_a_warning(tmp_path: Path, n: int, caplog: pytest.LogCaptureFixture) -> None:
    prompts = prompts_of(write(tmp_path, "a.txt", lines(n)))
    for first in BANDS.values():
        assert [prompts.of(first + i).text for i in range(n)] == [f"picture {i}" for i in range(n)]
    assert "too few to keep apart (10 are needed)" in caplog.text


def test_a_calibration_file_leaves_the_whole_file_to_the_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, "a.txt", lines(20))
    other = write(tmp_path, "c.txt", lines(3) + "".join(f"other {i}\n" for i in range(128)))
    prompts = prompts_of(file, calibration_file=other)
    assert sorted(p.text for p in prompts.splits["report"]) == sorted(lines(20).split("\n")[:-1])
    fitted = [p.text for split in FITTED for p in prompts.splits[split]]
    assert sorted(fitted) == sorted(f"other {i}" for i in range(128)), "what the report shows is left out"
    assert not caplog.text
    table = write(tmp_path, "a.csv", "Caption\n" + lines(20))
    assert prompts_of(table, columns={"prompt": "Caption"}, calibration_file=other).digest == prompts.digest
    few = prompts_of(file, calibration_file=write(tmp_path, "f.txt", "one\ntwo\n"))
    assert {few.splits[split] for split in FITTED} == {few.splits["calibration"]}
    assert "the same 2 prompts" in caplog.text
    with pytest.raises(ConfigError, match="every prompt of .*a.txt is in .*a.txt"):
        prompts_of(file, calibration_file=file)


def field_rule(names: list[str], n: int) -> list[str]:
    """Which images the field reports on, as it does it: shuffled with seed 0, the first n, sorted."""
    names = list(names)
    random.Random(0).shuffle(names)
    return sorted(names[:n])


def test_mjhq_follows_the_rule_of_the_field(tmp_path: Path) -> None:
    meta = {f"{i:040x}": {"category": "food", "prompt": f"dish {i % 400}"} for i in range(500)}
    prompts = prompts_of(write(tmp_path, "meta_data.json", meta), preset="mjhq", report=200)
    for n in (50, 200):
        shown = [prompts.of(seed) for seed in range(n)]
        assert sorted(p.name for p in shown) == field_rule(list(meta), n)
        assert all(p.text == meta[p.name]["prompt"] for p in shown)
        assert all(
            p.noise_seed == sum(ord(c) * 31 ** (39 - i) for i, c in enumerate(p.name)) % (10**9 + 7) for p in shown
        )
    assert prompts.of(1_000_000).noise_seed == 1_000_000
    texts = {split: {p.text for p in listed} for split, listed in prompts.splits.items()}
    assert all(not texts[a] & texts[b] for a in BANDS for b in BANDS if a < b)
    with pytest.raises(ConfigError, match="200 prompts, seed 200 is past them"):
        prompts.of(200)


def test_coco_shows_one_caption_an_image(tmp_path: Path) -> None:
    names = [f"COCO_val2014_{i:012d}" for i in range(40)]
    captions = {name: [f"{name} caption {j}" for j in range(5)] for name in names}
    karpathy = [
        {"filename": f"{n}.jpg", "split": "val", "sentences": [{"raw": c} for c in captions[n]]} for n in names
    ] + [{"filename": "t.jpg", "split": "train", "sentences": [{"raw": "no"}]}]
    official = {
        "images": [{"id": i, "file_name": f"{n}.jpg"} for i, n in enumerate(names)],
        "annotations": [
            {"image_id": i, "id": j, "caption": captions[n][j]} for j in range(5) for i, n in enumerate(names)
        ],
    }
    files = [write(tmp_path, "dataset_coco.json", {"images": karpathy}), write(tmp_path, "captions.json", official)]
    read = [prompts_of(file, preset="coco", report=30) for file in files]
    assert read[0].digest == read[1].digest
    shown = [read[0].of(seed) for seed in range(30)]
    assert sorted(p.name for p in shown) == field_rule(names, 30)
    assert all(p.text == captions[p.name][name_seed(p.name) % 5] for p in shown)
    instances = {"images": [], "annotations": [{"image_id": 3, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(ConfigError, match=r"without captions .*captions_val2014.json"):
        read_file(Path(write(tmp_path, "instances.json", instances)), {})


def test_a_preset_needs_names_and_prompts_to_spare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seeds noise by the names of images"):
        prompts_of(write(tmp_path, "a.txt", lines(20)), preset="mjhq")
    file = write(tmp_path, "sDCI.json", {str(i): f"p {i}" for i in range(300)})
    with pytest.raises(ConfigError, match=r"300 prompts, and 300 for the report leave 0 .*calibration_file"):
        prompts_of(file, preset="sdci")
    with pytest.raises(ConfigError, match=r"prompts.report is 301, .* has 300"):
        prompts_of(file, report=301)
    other = write(tmp_path, "c.txt", lines(128))
    assert len(prompts_of(file, preset="sdci", calibration_file=other).splits["report"]) == 300
    twice = write(tmp_path, "a.csv", "name,prompt\nx.jpg,one\nx.png,two\n")
    with pytest.raises(ConfigError, match="the image 'x' twice"):
        prompts_of(twice, preset="coco")


def test_classes_come_in_turn_in_every_split() -> None:
    prompts = read_prompts(PromptsSpec(classes=(207, 360, 0)))
    assert prompts is not None
    assert [prompts.of(s).label for s in (0, 1, 2, 3, 3_000_000)] == [207, 360, 0, 207, 207]
    assert repr(prompts) == "Prompts(3 classes)"
    prompts.check(n_classes=361)
    with pytest.raises(ConfigError, match=r"class 360 does not exist: .* 0\.\.359"):
        prompts.check(n_classes=360)
    assert read_prompts(PromptsSpec()) is None


def test_labels_of_a_file_are_checked(tmp_path: Path) -> None:
    prompts = prompts_of(write(tmp_path, "a.csv", "label\n" + "".join(f"{i}\n" for i in range(12))))
    assert sorted(prompts.of(s).label or 0 for s in range(6)) == sorted(p.label or 0 for p in prompts.splits["report"])
    assert not prompts.has_text
    prompts.check(n_classes=12)
    with pytest.raises(ConfigError, match="class 11 does not exist"):
        prompts.check(n_classes=11)
    with pytest.raises(ConfigError, match="a column 'label'"):
        prompts_of(write(tmp_path, "a.txt", lines(12))).check(n_classes=11)


def test_the_digest_is_of_content(tmp_path: Path) -> None:
    first = prompts_of(write(tmp_path, "a.txt", lines(20)))
    rows = [{"prompt": line} for line in lines(20).split("\n")[:-1]]
    same = prompts_of(write(tmp_path, "b.jsonl", "\n".join(map(json.dumps, rows))))
    assert first.digest == same.digest
    assert repr(first) == "Prompts(report 10, calibration 3, training 3, development 2, search 2)"
    others = [lines(21), lines(20).replace("picture 3\n", "picture three\n")]
    assert len({first.digest, *(prompts_of(write(tmp_path, "c.txt", text)).digest for text in others)}) == 3
    assert prompts_of(str(tmp_path / "a.txt"), report=12).digest != first.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no prompts"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.txt", "one\n\nthree\n", "line 2 is empty"),
        ("a.txt", "one\ntwo\x07\n", r"line 2: .*control character '\\x07'"),
        ("a.txt", "one\ttab\nb\x00\n", r"line 2: .*control character '\\x00'"),
        ("a.txt", "one\ntwo".encode("utf-16"), "is UTF-16. Save it as UTF-8: iconv"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "is UTF-16"),
        ("a.txt", "one\nZoë\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xeb\).*Latin-1.*iconv"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.csv", "title,n\nx,1\n", "line 2: no prompt in prompt or caption or text. Columns: title, n"),
        ("a.csv", "prompt\na cat, asleep\n", r"line 2 has 2 values, the header 1 \(prompt\).*double quotes"),
        ("a.csv", 'prompt\n"open\n', "no valid CSV"),
        ("a.csv", "prompt,label\nx,-1\n", "line 2: a label is the number of a class, from 0, got '-1'"),
        ("a.csv", "prompt,negative\nx,\x1b[31m\n", "line 2: the negative holds the control character"),
        ("a.jsonl", '"one"\n{"prompt": \n', "line 2 is damaged or no valid JSON"),
        ("a.jsonl", '"one"\n\n{"prompt": 5}\n', "line 3: the prompt should be text, got 5"),
        ("a.jsonl", '"one"\n[1]\n', r"line 2 should be a prompt or a table of columns, got \[1\]"),
        ("a.jsonl", '{"prompt": "x", "label": 1.5}', "line 1: a label"),
        ("a.jsonl", '{"prompt": "x", "label": true}', "line 1: a label"),
        ("a.jsonl", '"\\ud800"', "surrogates not allowed"),
        ("a.json", '"one"\n"two"\n', "no valid JSON"),
        ("a.json", "5", "should hold a list of prompts or a table by name, not 5"),
        ("a.json", "[" * 200_000, "nested deeper than"),
        ("a.yaml", "a: [", "no valid YAML"),
        ("a.yaml", "[" * 20_000, "nested too deeply|no valid YAML"),
        ("a.yaml", "- a\n- [b]\n", "entry 2 should be a prompt"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_file(Path(write(tmp_path, name, content)), {})
    assert str(tmp_path / name) in str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"none.txt does not exist"):
        read_file(tmp_path / "none.txt", {})
    with pytest.raises(UnknownNameError, match=r"'.xlsx'.*Known: .csv"):
        read_file(tmp_path / "a.xlsx", {})
    with pytest.raises(ConfigError, match=r"line 2: no column 'Prompt'.*Columns: prompt"):
        read_file(Path(write(tmp_path, "a.csv", "prompt\nx\n")), {"prompt": "Prompt"})
    monkeypatch.setattr("mpqsearch.prompts.reading.LIMIT_BYTES", 5)
    with pytest.raises(ConfigError, match="of at most 5 is needed"):
        read_file(tmp_path / "a.csv", {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"preset": "mjhq"}, "prompts.preset needs prompts.file, a local file"),
        ({"preset": "mjqh", "file": "a"}, "did you mean 'mjhq'"),
        ({"calibration_file": "a.txt"}, "needs prompts.file"),
        ({"file": "a.txt", "columns": {"promt": "x"}}, "did you mean 'prompt'"),
        ({"file": "a.txt", "classes": [1]}, "exclude each other"),
        ({"classes": [-1]}, "at least 0"),
        ({"classes": ["cat"]}, r"prompts.classes\[0\] should be int"),
    ],
)
def test_settings_are_checked(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from({"prompts": data})


def test_settings_write_back(tmp_path: Path) -> None:
    assert Config().prompts == PromptsSpec()
    for prompts in (
        {"file": "a.csv", "preset": "coco", "report": 9, "columns": {"prompt": "x"}},
        {"classes": [207, 360]},
    ):
        config = config_from({"prompts": prompts})
        (tmp_path / "again.toml").write_text(config.to_toml())
        assert load_config(tmp_path / "again.toml") == config
