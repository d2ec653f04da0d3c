from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.fuzz import READERS, run


@pytest.mark.parametrize("name", [name for name in READERS if name != "storage"])
def test_every_reader_reads_what_is_right(name: str, tmp_path: Path) -> None:
    READERS[name].write(tmp_path)
    if name == "pipeline":
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text("{}")
    assert READERS[name].read(tmp_path) is not None


def test_three_hundred_malformed_inputs_end_in_a_result_or_in_one_message() -> None:
    assert run(range(300)) == []
