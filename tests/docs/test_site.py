"""What the site's Markdown makes of the pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BLOCK_SET = re.compile(r"\{\d+(?:, \d+)*\}")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_sets_of_blocks_survive(page):
    """attr_list takes `{9, 10, 11}` at the end of a table's cell for attributes."""
    markdown = pytest.importorskip("markdown", reason="Python-Markdown comes with the extra `docs`")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["markdown_extensions"]
    names = [name if isinstance(name, str) else next(iter(name)) for name in settings]
    html = markdown.markdown(page.read_text(), extensions=[name for name in names if not name.startswith("pymdownx")])
    assert BLOCK_SET.findall(html) == BLOCK_SET.findall(page.read_text())
