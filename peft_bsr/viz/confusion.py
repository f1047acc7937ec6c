"""Which classes a model takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from peft_bsr.errors import InputError
from peft_bsr.viz.fonts import families_for

MOST_CLASSES = 50  # of which names can be read
_NUMBERED, _LONGEST = 20, 24  # classes up to which counts stand in the cells; letters of a name


def draw_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], path: str | Path) -> Path:
    """Draw the confusion matrix: a row for each class, coloured by the share of its images in each column.

    Classes that no image has and that no image was taken for are left out. Where no font here has the letters of a
    name, classes are called by their numbers.

    Args:
        counts: C rows of C, images of the class of the row that were taken for the class of the column.
        names: Of the C classes.
        path: File to write; its ending picks the format (`.png`, `.svg`, ...).

    Returns:
        `path`.

    Raises:
        InputError: If more than 50 classes are left: nobody could read the names.
    """
    matrix = np.array(counts)
    there = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    if len(there) > MOST_CLASSES:
        raise InputError(
            f"{len(there)} classes are too many to be read in a picture, {MOST_CLASSES} at most are drawn."
        )
    matrix, shown = matrix[np.ix_(there, there)], [_short(names[index]) for index in there.tolist()]
    families, is_complete = families_for(shown)
    labels = shown if is_complete else [str(index) for index in there]
    size = 2.5 + 0.3 * len(there)
    figure = Figure(figsize=(size, size), layout="constrained")  # not pyplot: no global state, no window
    axis = figure.subplots()
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    text: Any = {"fontfamily": families, "parse_math": False}  # a class may be called "$"
    axis.set_xticks(range(len(there)), labels=labels, rotation=90, **text)
    axis.set_yticks(range(len(there)), labels=labels, **text)
    axis.set_xlabel("answer")
    axis.set_ylabel("class")
    if len(there) <= _NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=120)
    return Path(path)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


__all__ = ["MOST_CLASSES", "draw_confusion"]
