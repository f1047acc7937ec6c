"""Reading rows without interpreting them: tables, datasets on the Hub, digits."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from PIL import Image as PILImage

from peft_bsr.errors import DatasetError, headline

DIGITS = "digits"
SPLITS = ("train", "validation", "test")
_SPLIT_OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLIT_OF |= dict.fromkeys(("validation", "val", "valid", "dev", "eval"), "validation")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Rows:
    """Rows with all of their columns.

    Attributes:
        splits: `"train"`, `"validation"`, `"test"` -> rows. Without splits, all rows are `"train"`.
        root: Folder that file names in the rows are relative to. Default None: the working directory.
        notes: Messages about how they were read.
    """

    splits: dict[str, Dataset]
    root: Path | None = None
    notes: list[str] = field(default_factory=list)


def split_of(name: str) -> str | None:
    """`"train"`, `"validation"` or `"test"`, or None if the name is not that of a split.

    Args:
        name: Exactly train, training, val, valid, validation, dev, eval, test or testing, in any case.
    """
    return _SPLIT_OF.get(name.lower())


def read_rows(name: str) -> Rows:
    """Rows of a dataset.

    Args:
        name: `"digits"`, a folder, a table (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`), or a Hub id.

    Raises:
        DatasetError: If it cannot be read.
    """
    from peft_bsr.data.folders import read_folder

    if name == DIGITS:
        return Rows({"train": _digits()})
    path = Path(name).expanduser()
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return _of_datasets(load_from_disk(str(path)))
    if path.is_dir():
        return read_folder(path)
    if path.suffix.lower() in TABLES and path.is_file():
        return read_table(path)
    if path.is_file():
        raise DatasetError(f"`{name}` is not a table. Give a folder, or a table: {', '.join(TABLES)}.")
    advice = f'Give "{DIGITS}", a folder of images by class, a table ({", ".join(TABLES)}) or a Hub id.'
    if path.suffix.lower() in TABLES or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DatasetError(f"`{name}` cannot be read: there is no such file or folder. {advice}")
    try:
        return _of_datasets(load_dataset(name))
    except DatasetError:
        raise
    except Exception as error:  # datasets', the Hub's and the HTTP library's own errors
        raise DatasetError(f"`{name}` cannot be read ({headline(error)}). {advice}") from error


def read_table(path: Path, split: str | None = None) -> Rows:
    """Rows of a table. A column `split` that holds only names of splits divides them; with others, a note says so.

    Args:
        path: A `.csv` (commas or semicolons), `.tsv`, `.jsonl`, `.json` or `.parquet` file. In text files every cell is
            read as a string, so that the label `007` stays `007` and `NA` stays `NA`.
        split: Split of all rows, instead of the column. Default None.

    Raises:
        DatasetError: If it cannot be read, or has no rows.
    """
    try:
        data = _read(path)
    except DatasetError:
        raise
    except Exception as error:  # of the parsers
        raise DatasetError(f"`{path}` cannot be read ({headline(error)}).") from error
    if len(data) == 0:
        raise DatasetError(f"`{path}` has no rows.")
    rows = Rows({split or "train": data}, path.parent)
    if split is None and "split" in data.column_names:
        splits = [split_of(str(value)) for value in data["split"]]
        if all(splits):
            return divide(rows, splits, "split by the column `split`")
        if any(splits):
            others = sorted({f"`{value}`" for value, found in zip(data["split"], splits, strict=True) if not found})
            rows.notes.append(f"not split by the column `split`, because it also holds {some(others)}")
    return rows


def divide(rows: Rows, splits: Sequence[str | None], note: str | None = None) -> Rows:
    """Divide the rows of one split into several.

    Args:
        rows: Rows with one split.
        splits: Name of the split of each row.
        note: A message to add to the notes.
    """
    (data,) = rows.splits.values()
    names = np.array(splits)
    parts = {name: data.select(np.flatnonzero(names == name)) for name in SPLITS if (names == name).any()}
    return Rows(parts, rows.root, [*rows.notes, *([note] if note else [])])


def merged(parts: Sequence[Rows]) -> Rows:
    """The rows of several tables; rows of the same split are concatenated.

    Args:
        parts: Rows with the same columns. If they come from several folders, `file_name` is made absolute.
    """
    roots = {part.root for part in parts}
    splits: dict[str, list[Dataset]] = {}
    for part in parts:
        for name, data in part.splits.items():
            splits.setdefault(name, []).append(_absolute(data, part.root) if len(roots) > 1 else data)
    joined = {name: concatenate_datasets(splits[name]) for name in SPLITS if name in splits}
    return Rows(joined, roots.pop() if len(roots) == 1 else None, [note for part in parts for note in part.notes])


def some(names: Sequence[str], limit: int = 10) -> str:
    """`a, b, c`; for more than `limit` names the first ones and the total."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def _absolute(data: Dataset, root: Path | None) -> Dataset:
    if root is None or "file_name" not in data.column_names:
        return data
    paths = [str(root / name) if name else None for name in data["file_name"]]
    return data.remove_columns("file_name").add_column("file_name", paths)


def _read(path: Path) -> Dataset:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split="train")
    if suffix in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8-sig")
        lines = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(s) for s in text.splitlines() if s.strip()]
        )
        return Dataset.from_list(lines)
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=head.count)
        names, *lines = (line for line in csv.reader(file, delimiter=delimiter) if line)
    if uneven := [number for number, line in enumerate(lines, 1) if len(line) != len(names)]:
        raise DatasetError(
            f"`{path}`: row {uneven[0]} has {len(lines[uneven[0] - 1])} cells, the header has {len(names)}."
        )
    return Dataset.from_dict({name.strip(): [line[column] for line in lines] for column, name in enumerate(names)})


def _of_datasets(data: Dataset | DatasetDict) -> Rows:
    """Splits by their names; others are skipped, with a note."""
    if isinstance(data, Dataset):
        return Rows({"train": data})
    assert isinstance(data, DatasetDict)
    if len(data) == 1:
        name = next(iter(data))
        return Rows({split_of(name) or "train": data[name]})
    names = {name: split for name in data if (split := split_of(name))}
    if not names or len(set(names.values())) < len(names):
        raise DatasetError(
            f"the splits are {some(list(data))}: they need to be train, validation and test, one of each."
        )
    left = [name for name in data if name not in names]
    notes = [f"splits that are not read: {some(left)}"] if left else []
    ordered = sorted(names.items(), key=lambda pair: SPLITS.index(pair[1]))
    return Rows({split: data[name] for name, split in ordered}, notes=notes)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PILImage.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in digits.target_names])})
    return Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


__all__ = ["DIGITS", "SPLITS", "TABLES", "Rows", "divide", "merged", "read_rows", "read_table", "some", "split_of"]
