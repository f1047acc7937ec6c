"""Finding the labels of a table: one class per image, several labels, or values; in one or several columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from datasets import ClassLabel, Dataset, Value

from peft_bsr.data.columns import asked_column, may_be_images, one_column, values_of
from peft_bsr.data.rows import some
from peft_bsr.errors import DatasetError
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from datasets.features.features import FeatureType

LABEL_NAMES = ("label", "labels", "fine_label")
_OPTION = "--label-column"
_MISSING = ("nan", "NaN")
_WHAT = {None: "labels", SINGLE_LABEL: "class labels", MULTI_LABEL: "labels", REGRESSION: "values"}
_WORDS = {SINGLE_LABEL: "one class per image", MULTI_LABEL: "several labels per image", REGRESSION: "regression"}


@dataclass(frozen=True)
class Target:
    """The labels to train or evaluate on.

    Attributes:
        columns: One column, or several columns of 0 and 1 (one per label) or of values.
        problem_type: As in transformers' configurations.
        notes: How they were found, one sentence each.
    """

    columns: list[str]
    problem_type: ProblemType
    notes: list[str] = field(default_factory=list)


def find_target(
    rows: Dataset,
    images: str,
    wanted: str | Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
    known: Sequence[str] | None = None,
) -> Target:
    """The columns of labels, and their kind.

    Args:
        rows: Rows of one split.
        images: Name of the column of images.
        wanted: `--label-column`: a name, several, or `"a,b,c"`. Default None: the columns with the names of the model's
            outputs, or else the only candidate, or the only one of `LABEL_NAMES`.
        problem_type: Default None: several labels if cells are lists or strings with a `|`, or if several columns hold
            0 and 1; a regression if numbers have fractions; otherwise one class per image.
        known: Names of a model's outputs.

    Raises:
        DatasetError: If there is no such column, or if there are several candidates.
    """
    if wanted is None and known and problem_type in (MULTI_LABEL, REGRESSION) and set(known) <= set(rows.column_names):
        columns = f"columns {some(known)}" if len(known) > 1 else f"column `{known[0]}`"
        return Target(list(known), problem_type, [f"{_WHAT[problem_type]} are the {columns}"])
    names, note = _columns(rows, images, wanted, problem_type)
    notes = [note] if note else []
    if problem_type is not None:
        return Target(names, problem_type, notes)
    found, why = _kind_of_several(rows, names) if len(names) > 1 else _kind(rows, names[0]) or (SINGLE_LABEL, "")
    if why:
        notes.append(f"{_WORDS[found]}, because {why} (change it with `--task`)")
    return Target(names, found, notes)


def list_item(feature: FeatureType) -> FeatureType | None:
    """Feature of the items in a column of lists, or None for other columns.

    Args:
        feature: Feature of `datasets`.
    """
    if isinstance(feature, list):  # as older versions write it
        return feature[0]
    return None if isinstance(feature, dict) else getattr(feature, "feature", None)


def cells_of(rows: Dataset, column: str) -> list[str | None]:
    """Cells as strings, classes by name; None for missing values (None, NaN). An empty string is not missing.

    Args:
        rows: The rows.
        column: Column of strings, numbers, booleans or `ClassLabel`.
    """
    feature, values = rows.features[column], values_of(rows, column)
    if isinstance(feature, ClassLabel):
        count = len(feature.names)
        return [feature.names[v] if v is not None and 0 <= v < count else None for v in values]
    texts = [None if value is None else str(value).strip() for value in values]
    return [None if text in _MISSING else text for text in texts]


def number_of(text: str | None) -> float | None:
    """Parse a finite number, or return None.

    Args:
        text: A string such as `1.5` or `2e3`, but not `1_000`.
    """
    try:
        return float(text) if text and "_" not in text and isfinite(float(text)) else None
    except ValueError:
        return None


def bit_of(text: str) -> float | None:
    """Parse 0 or 1, or return None.

    Args:
        text: 0, 1, 0.0, 1.0, true or false, in any case.
    """
    value = {"true": 1.0, "false": 0.0}.get(text.lower(), number_of(text))
    return value if value in (0.0, 1.0) else None


def _columns(
    rows: Dataset, images: str, wanted: str | Sequence[str] | None, problem_type: ProblemType | None
) -> tuple[list[str], str | None]:
    if wanted is None:
        names = [name for name in rows.column_names if name not in (images, "split")]
        found = [name for name in names if _may_be(rows, name, problem_type)]
        others = "" if problem_type == SINGLE_LABEL else f", or several that hold 0 and 1, or values: `{_OPTION} a,b`"
        name, note = one_column(rows, found, LABEL_NAMES, _WHAT[problem_type], _OPTION, others)
        return [name], note
    if isinstance(wanted, str):
        wanted = [wanted] if wanted in rows.column_names else [part.strip() for part in wanted.split(",")]
    names = [asked_column(rows, name, _OPTION) for name in wanted]
    if len(set(names)) < len(names):
        raise DatasetError(f"`{_OPTION} {','.join(names)}` names a column twice.")
    if len(names) > 1 and problem_type == SINGLE_LABEL:
        raise DatasetError(f"`{_OPTION} {','.join(names)}`: with one class per image there is one column.")
    return names, None


def _may_be(rows: Dataset, name: str, problem_type: ProblemType | None) -> bool:
    """Whether a column may hold labels of that type, or of any type for None."""
    kind, _ = _kind(rows, name) or (None, "")
    if problem_type == REGRESSION:
        return isinstance(rows.features[name], (Value, ClassLabel)) and _numbers(rows, name) is not None
    if problem_type == SINGLE_LABEL:
        return kind == SINGLE_LABEL or (kind == MULTI_LABEL and list_item(rows.features[name]) is None)
    return kind is not None and not (problem_type == MULTI_LABEL and kind == REGRESSION)


def _kind(rows: Dataset, name: str) -> tuple[ProblemType, str] | None:
    """The kind of labels in a column, and why; None if they are not labels, such as file names."""
    feature = rows.features[name]
    if isinstance(feature, ClassLabel):
        return SINGLE_LABEL, ""
    if list_item(feature) is not None:
        is_labels = isinstance(list_item(feature), (Value, ClassLabel))
        return (MULTI_LABEL, f"the column `{name}` holds lists") if is_labels else None
    if not isinstance(feature, Value) or may_be_images(rows, name):
        return None
    if feature.dtype not in ("bool", "string", "large_string") and not feature.dtype.startswith(("int", "uint", "fl")):
        return None
    numbers = _numbers(rows, name)
    if numbers is not None and any(number % 1 for number in numbers):
        return REGRESSION, f"the column `{name}` holds numbers with fractions"
    if feature.dtype.startswith("float"):
        return SINGLE_LABEL, ""
    texts = cells_of(rows, name)
    if "string" in feature.dtype and any("|" in text for text in texts if text):
        return MULTI_LABEL, f"strings in the column `{name}` contain `|`"
    is_repeated = len(set(texts)) < len(texts)  # as many values as rows: an id, a file name
    return (SINGLE_LABEL, "") if is_repeated or name in LABEL_NAMES else None


def _kind_of_several(rows: Dataset, names: Sequence[str]) -> tuple[ProblemType, str]:
    texts = [(name, text) for name in names for text in cells_of(rows, name) if text]
    if all(bit_of(text) is not None for _, text in texts):
        return MULTI_LABEL, f"the columns {some(names)} hold 0 and 1"
    columns = [_numbers(rows, name) for name in names]
    if all(columns) and any(number % 1 for numbers in columns for number in numbers or ()):
        return REGRESSION, f"the columns {some(names)} hold numbers with fractions"
    name, text = next((name, text) for name, text in texts if bit_of(text) is None)
    raise DatasetError(
        f"`{_OPTION} {','.join(names)}`: several columns must hold 0 and 1, one column per label; `{name}` holds "
        f"`{text}`. If they are values, add `--task regression`."
    )


def _numbers(rows: Dataset, name: str) -> list[float] | None:
    """The numbers of a column, or None if a cell is not a number."""
    numbers = [number_of(text) for text in cells_of(rows, name) if text]
    found = [number for number in numbers if number is not None]
    return found if found and len(found) == len(numbers) else None


__all__ = ["LABEL_NAMES", "Target", "bit_of", "cells_of", "find_target", "list_item", "number_of"]
