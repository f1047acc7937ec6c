"""Confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from peft_bsr.errors import InputError
from peft_bsr.viz.files import save_figure
from peft_bsr.viz.fonts import families_for

MOST_CLASSES = 50  # with more, names cannot be read
_NUMBERED, _LONGEST = 20, 24  # maximum number of classes with counts in the cells; maximum length of a name


def draw_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], path: str | Path) -> Path:
    """Draw the confusion matrix: a row for each class, coloured by the share of its images in each column.

    Classes without images and predictions are not shown. If no installed font has the characters of a name, classes are
    shown by index.

    Args:
        counts: [C, C], number of images of the row's class that were predicted as the column's class.
        names: Names of the C classes.
        path: File to write; its extension sets the format (`.png`, `.svg`, ...).

    Returns:
        `path`.

    Raises:
        InputError: If there are more than 50 classes: their names could not be read.
    """
    matrix = np.array(counts)
    there = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    if len(there) > MOST_CLASSES:
        raise InputError(f"{len(there)} classes are too many to draw; at most {MOST_CLASSES} are supported.")
    matrix, shown = matrix[np.ix_(there, there)], [_short(names[index]) for index in there.tolist()]
    families, is_complete = families_for(shown)
    labels = shown if is_complete else [str(index) for index in there]
    size = 2.5 + 0.3 * len(there)
    figure = Figure(figsize=(size, size), layout="constrained")  # not pyplot: no global state, no window
    axis = figure.subplots()
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    text: dict[str, Any] = {"fontfamily": families, "parse_math": False}  # a class may be called "$"
    axis.set_xticks(range(len(there)), labels=labels, rotation=90, **text)
    axis.set_yticks(range(len(there)), labels=labels, **text)
    axis.set_xlabel("answer")
    axis.set_ylabel("class")
    if len(there) <= _NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return save_figure(figure, path, dpi=120)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


__all__ = ["MOST_CLASSES", "draw_confusion"]
