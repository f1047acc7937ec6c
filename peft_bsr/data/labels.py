"""Labels as class indices: encoded from strings and integers, or matched by name with a model's classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Value

from peft_bsr.data.columns import kind_name
from peft_bsr.data.rows import some
from peft_bsr.data.targets import cells_of, number_of
from peft_bsr.errors import DatasetError


def encode(
    splits: dict[str, Dataset], column: str, known: Sequence[str] | None = None
) -> tuple[dict[str, Dataset], list[str], list[str]]:
    """The rows that have a label, with a column `label` of `ClassLabel`.

    Args:
        splits: Name -> rows.
        column: Column of `ClassLabel`, strings, integers or booleans. None, NaN, empty strings and, among numbers, -1
            are missing labels.
        known: Names of a model's classes. Default None: those of the rows.

    Returns:
        The splits that have rows left; the names of the classes by index, sorted, integers by value; notes on skipped
        rows.

    Raises:
        DatasetError: If the column holds something else, or if rows have unknown classes.
    """
    texts = {split: _texts(rows, column) for split, rows in splits.items()}
    found = sorted_names({text for values in texts.values() for text in values if text is not None})
    features = [rows.features[column] for rows in splits.values()]
    names = found
    notes: list[str] = []
    if all(isinstance(f, ClassLabel) and f.names == features[0].names for f in features):
        names = [normal(name) for name in features[0].names]
    if known is not None:
        names, notes = match_names(names, found, [normal(name) for name in known])
    index = {name: number for number, name in enumerate(names)}
    encoded = {}
    for split, rows in splits.items():
        numbers = np.array([-1 if text is None else index[text] for text in texts[split]], dtype=np.int64)
        kept = np.flatnonzero(numbers >= 0)
        if len(kept) < len(numbers):
            notes.append(f"{split}: {len(numbers) - len(kept)} of {len(numbers)} rows have no label and are skipped")
        if len(kept):
            labelled = rows.remove_columns(list({column, "label"} & set(rows.column_names)))
            labelled = labelled.add_column("label", numbers, feature=ClassLabel(names=names))
            encoded[split] = labelled if len(kept) == len(numbers) else labelled.select(kept)
    if not encoded:
        raise DatasetError(f"none of the {sum(map(len, texts.values()))} rows has a label in the column `{column}`.")
    return encoded, names, notes


def sorted_names(names: set[str]) -> list[str]:
    """Sort names of classes; by value if all of them are integers.

    Args:
        names: Names of classes.

    Examples:
        >>> sorted_names({"10", "9"}), sorted_names({"b", "10", "9"})
        (['9', '10'], ['10', '9', 'b'])
    """
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def match_names(names: list[str], found: list[str], known: list[str]) -> tuple[list[str], list[str]]:
    """The class names of the data by the model's indices, and notes on how they were matched.

    Args:
        names: Class names of the data, by index.
        found: Class names that have images.
        known: Class names of the model.

    Raises:
        DatasetError: If the model does not know one of `found`.
    """
    if known == [f"LABEL_{number}" for number in range(len(known))] and not set(found) <= set(known):
        if len(names) != len(known):
            raise DatasetError(
                f"the model's classes have no names (LABEL_0, ...), and there are {len(known)} of them; the data have "
                f"{len(names)}: {some(names)}. Classes can only be matched by index if their numbers are equal."
            )
        return names, [f"the model's classes have no names: they are matched by index, 0 is `{names[0]}`"]
    strange = [name for name in found if name not in known]
    absent = [name for name in known if name not in found]
    if strange:
        raise DatasetError(
            f"the model does not know {len(strange)} of the {len(found)} classes: {', '.join(strange)}. "
            + (
                f"Of its own {len(known)} classes there are no images of: {', '.join(absent)}."
                if absent
                else "It knows all others."
            )
        )
    if absent:
        return known, [
            f"{len(found)} of the model's {len(known)} classes are scored; there are no images of: {', '.join(absent)}"
        ]
    return known, []


def _texts(rows: Dataset, column: str) -> list[str | None]:
    """The name of each row's class, or None."""
    feature = rows.features[column]
    if not isinstance(feature, (ClassLabel, Value)) or (
        isinstance(feature, Value) and feature.dtype.startswith(("binary", "timestamp", "date"))
    ):
        raise DatasetError(
            f"the column `{column}` holds {kind_name(feature)}: a class is a string or an integer, one per row."
        )
    texts = [normal(text) if text else None for text in cells_of(rows, column)]
    numbers = [number_of(text) for text in texts if text is not None]
    if isinstance(feature, Value) and numbers and all(number is not None for number in numbers):
        if any(number % 1 for number in numbers if number is not None):
            raise DatasetError(
                f"the column `{column}` holds numbers with fractions: a class is a string or an integer. If they "
                "are values, add `--task regression`."
            )
        texts = [None if text is None or number_of(text) == -1 else _whole(text) for text in texts]
    return texts


def normal(name: str) -> str:
    """A name in Unicode NFC: each accented letter is one character (two in file names on macOS).

    Args:
        name: Name of a class.
    """
    return unicodedata.normalize("NFC", name)


def _whole(text: str) -> str:
    """`1.0` as `1`; `007` as it is."""
    return str(int(float(text))) if "." in text else text


__all__ = ["encode", "match_names", "normal", "sorted_names"]
