"""The description of the package for an index, where the README's relative links and pictures lead nowhere.

All other metadata is in pyproject.toml. With ``Source`` in its ``[project.urls]`` links and pictures become absolute;
without it links become plain text, and pictures go with their captions.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINK = r"\[([^\]]*)\]\((?!https?:|#)([^)]+)\)"
CAPTION = r"(\n\n\*[^*]+\*(?=\n\n))?"


def described(text: str, source: str = "") -> str:
    """Markdown whose relative links are absolute under ``source``, or plain text where there is no such address."""
    if source:
        text = re.sub("!" + LINK, rf"![\1]({source}/raw/main/\2)", text)
        return re.sub(LINK, rf"[\1]({source}/blob/main/\2)", text)
    return re.sub(LINK, r"\1", re.sub("!" + LINK + CAPTION, "", text))


project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
setup(
    long_description=described(
        (HERE / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Source", "")
    ),
    long_description_content_type="text/markdown",
)
