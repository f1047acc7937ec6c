"""Fonts that have the letters of class names: matplotlib's own lacks most scripts, and would draw boxes."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font


def families_for(texts: Iterable[str]) -> tuple[list[str], bool]:
    """Font families to draw texts with, and whether they have all letters.

    The default family, and with it one of this machine that has what it lacks, if there is one.

    Args:
        texts: To be drawn.
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
