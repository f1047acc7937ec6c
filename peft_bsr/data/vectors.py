"""Labels as vectors of numbers: 0 and 1 for each of several labels, or the values of a regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Value
from datasets import Sequence as ListOf

from peft_bsr.data.columns import kind_name, values_of
from peft_bsr.data.labels import match_names, normal, sorted_names
from peft_bsr.data.rows import some
from peft_bsr.data.targets import Target, bit_of, cells_of, list_item, number_of
from peft_bsr.errors import DatasetError
from peft_bsr.problem_type import REGRESSION

_SEPARATORS = "|;,"  # of labels in a text; the first that occurs


def encode_vectors(
    splits: dict[str, Dataset], target: Target, known: Sequence[str] | None = None
) -> tuple[dict[str, Dataset], list[str], list[str]]:
    """The rows that have labels, with a column `label` of vectors [C] of float32.

    Args:
        splits: Name -> rows.
        target: Several labels per image, or a regression. One column of several labels holds lists, or strings
            separated by `|`, or, if no cell has one, by `;` or `,`; an empty cell is an image without labels. Several
            columns hold 0 and 1. None, NaN and an empty cell of numbers are missing labels.
        known: Names of a model's outputs. Default None: those of the rows.

    Returns:
        The splits that have rows left; the names of labels or values by index; notes on decisions and skipped rows.

    Raises:
        DatasetError: If a cell holds something else, or if the names are not those of the model.
    """
    if target.problem_type == REGRESSION or len(target.columns) > 1:
        read = _value if target.problem_type == REGRESSION else _bit
        names, order, notes = _match_columns(target.columns, known)
        vectors = {split: _of_columns(rows, order, read) for split, rows in splits.items()}
    else:
        vectors, names, notes = _of_sets(splits, target.columns[0], known)
    encoded = {}
    for split, rows in splits.items():
        has_labels = ~np.isnan(vectors[split]).any(axis=1)
        if left := int((~has_labels).sum()):
            notes.append(f"{split}: {left} of {len(rows)} rows have no label and are skipped")
        if has_labels.any():
            kept = np.flatnonzero(has_labels)
            others = [name for name in rows.column_names if name in {*target.columns, "label"} - {"image"}]
            labelled = rows.remove_columns(others).select(kept)
            feature = ListOf(Value("float32"))
            encoded[split] = labelled.add_column("label", vectors[split][kept].tolist(), feature=feature)
    if not encoded:
        count = sum(map(len, vectors.values()))
        raise DatasetError(f"none of the {count} rows has a label in {some(target.columns)}.")
    return encoded, names, notes


def _match_columns(columns: list[str], known: Sequence[str] | None) -> tuple[list[str], list[str], list[str]]:
    """Names by index, the columns in the same order, and notes on how they were matched."""
    if known is None or list(known) == columns:
        return columns, columns, []
    has_names = list(known) != [f"LABEL_{number}" for number in range(len(known))]
    if sorted(known) == sorted(columns):
        return list(known), list(known), []
    if len(known) == len(columns) and (len(known) == 1 or not has_names):
        return list(known), columns, [f"{some(columns)} are scored as the model's {some(list(known))}"]
    raise DatasetError(
        f"the model gives {some(list(known))}, but the columns are {some(columns)}. Choose one for each, in this "
        "order, with `--label-column a,b,c`."
    )


def _of_columns(rows: Dataset, columns: Sequence[str], read: Callable[[str, str], float]) -> np.ndarray:
    """[N, C], NaN where a cell is empty."""
    cells = [[read(text, name) if text else np.nan for text in cells_of(rows, name)] for name in columns]
    return np.array(cells, dtype=np.float32).T


def _bit(text: str, column: str) -> float:
    if (bit := bit_of(text)) is None:
        raise DatasetError(f"the column `{column}` holds `{text}`: several label columns must hold 0 and 1.")
    return bit


def _value(text: str, column: str) -> float:
    value = number_of(text)
    if value is None or abs(value) > float(np.finfo(np.float32).max):
        raise DatasetError(f"the column `{column}` holds `{text}`: a value must be a number, such as 2.5.")
    return value


def _of_sets(
    splits: dict[str, Dataset], column: str, known: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    features = [rows.features[column] for rows in splits.values()]
    separator = None
    if list_item(features[0]) is None:
        separator = _separator(column, [text for rows in splits.values() for text in cells_of(rows, column) if text])
    sets = {split: _sets(rows, column, separator) for split, rows in splits.items()}
    found = sorted_names({name for of_split in sets.values() for one in of_split if one for name in one})
    notes = [f"labels in the column `{column}` are separated by `{separator}`"] if separator else []
    if not found:
        raise DatasetError(f"there are no labels in the column `{column}`.")
    names = found
    items = [list_item(feature) or feature for feature in features]
    if separator is None and all(isinstance(i, ClassLabel) and i.names == items[0].names for i in items):
        names = [normal(name) for name in items[0].names]
    if known is not None:
        names, more = match_names(names, found, [normal(name) for name in known])
        notes += more
    index = {name: number for number, name in enumerate(names)}
    vectors = {split: np.zeros((len(of_split), len(names)), np.float32) for split, of_split in sets.items()}
    for split, of_split in sets.items():
        for vector, one in zip(vectors[split], of_split, strict=True):
            vector[[index[name] for name in one or ()]] = 1
            if one is None:
                vector[:] = np.nan
        if empty := sum(one is not None and not one for one in of_split):
            notes.append(f"{split}: {empty} of {len(of_split)} images have none of the labels")
    return vectors, names, notes


def _separator(column: str, texts: Sequence[str]) -> str | None:
    """The separator of labels, or None if every string is one label."""
    found = [one for one in _SEPARATORS if any(one in text for text in texts)]
    if found == [";", ","]:
        raise DatasetError(f"strings in the column `{column}` contain `;` and `,`: separate labels with `|`.")
    return found[0] if found else None


def _sets(rows: Dataset, column: str, separator: str | None) -> list[set[str] | None]:
    """The labels of each row, or None if they are missing."""
    item = list_item(rows.features[column])
    if item is None:
        parts = [None if t is None else t.split(separator) if separator else [t] for t in cells_of(rows, column)]
        return [None if one is None else {normal(part.strip()) for part in one if part.strip()} for one in parts]
    if not isinstance(item, (Value, ClassLabel)) or (isinstance(item, Value) and item.dtype.startswith("float")):
        raise DatasetError(
            f"the column `{column}` holds lists of {kind_name(item)}: a label is a string or an integer. Values "
            "need one column each."
        )
    names: Callable[[object], str] = (lambda v: item.names[v]) if isinstance(item, ClassLabel) else str
    cells = values_of(rows, column)
    for row, cell in enumerate(cells):
        if cell and len(set(cell)) < len(cell):
            raise DatasetError(
                f"the column `{column}`: row {row} has a label twice, {cell[:10]}. Lists contain the labels of an "
                "image; 0 and 1 need one column per label."
            )
    return [None if cell is None else {normal(names(v).strip()) for v in cell if v is not None} for cell in cells]


__all__ = ["encode_vectors"]
