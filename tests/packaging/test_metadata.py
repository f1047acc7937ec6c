from __future__ import annotations

import re
from pathlib import Path

import peft_bsr

ROOT = Path(__file__).parents[2]


def test_one_version_everywhere():
    found = {
        name: re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)[1]
        for name, pattern in {
            "pyproject.toml": r'^version = "(.+)"$',
            "CITATION.cff": r"^version: (.+)$",
            "CHANGELOG.md": r"^## (\S+)",
        }.items()
    }
    assert set(found.values()) == {peft_bsr.__version__}, found
