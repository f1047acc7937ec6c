"""Fonts for class names: matplotlib's default font lacks most scripts and would draw boxes."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font


def families_for(texts: Iterable[str]) -> tuple[list[str], bool]:
    """Font families for some texts, and whether they have all characters.

    They are the default family and, if needed, an installed one that has the missing characters.

    Args:
        texts: Texts to draw.
    """
    default = FontProperties().get_family()
    missing = {ord(letter) for text in texts for letter in text} - _letters(findfont(FontProperties()))
    if not missing:
        return default, True
    real = (font for font in fontManager.ttflist if "Last Resort" not in font.name)  # whose every letter is a box
    found = next((font.name for font in real if missing <= _letters(font.fname)), None)
    return (default, False) if found is None else ([*default, found], True)


def _letters(path: str) -> set[int]:
    return set(get_font(path).get_charmap())


__all__ = ["families_for"]
