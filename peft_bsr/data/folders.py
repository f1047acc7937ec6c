"""Folders of images: by class, in splits by class, or next to a table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from peft_bsr.data.labels import normal, sorted_names
from peft_bsr.data.rows import Rows, divide, merged, read_table, some, split_of
from peft_bsr.errors import DatasetError

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` calls them
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_SYSTEM = "__MACOSX"  # of zip files packed on macOS
_STUBS = {"BUFR", "FITS", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}  # Pillow knows their names, and cannot decode them


def read_folder(folder: Path) -> Rows:
    """Images and labels of a folder.

    By class: `daisy/*.jpg`, `rose/2024/*.jpg`; the class is the first folder. In splits: `train/daisy/*.jpg`,
    `test/daisy/*.jpg`, where every folder of the first level has the name of a split and contains class folders. With
    a table: `metadata.csv` (or `.jsonl`, `.parquet`) with a column `file_name`, at the top or in each split; or
    `train.csv`, `test.csv`, ... if there are no folders of classes.

    Args:
        folder: An existing folder.

    Raises:
        DatasetError: If it has none of these layouts, or if it is ambiguous.
    """
    images, others = list_images(folder)
    tables = [path for path in others if path.name.lower() in _METADATA and len(path.parts) <= 2]
    if tables:
        return _from_metadata(folder, images, tables)
    below: dict[str, list[PurePath]] = {}
    for path in images:
        below.setdefault(path.parts[0] if len(path.parts) > 1 else "", []).append(path)
    loose = below.pop("", [])
    named = {top: split for top in below if (split := split_of(top))}
    by_split = [path for path in others if len(path.parts) == 1 and _table_split(path)]
    if by_split and len(below) < 2:
        return _from_tables(folder, by_split)
    notes = _notes(folder, images, others)
    if named and any(len(path.parts) > 2 for top in named for path in below[top]):
        splits = _splits(folder, below, named)
        return Rows(_labelled(folder, splits, 1), notes=notes)
    if not below or set(below) == set(named):
        raise DatasetError(_no_classes(folder, loose, sorted(named), others))
    everything = [*loose, *(path for paths in below.values() for path in paths)]
    return Rows(_labelled(folder, {"train": sorted(everything)}, 0), notes=notes)


def list_images(folder: Path) -> tuple[list[PurePath], list[PurePath]]:
    """Files that Pillow can read, by their extension, and other files; sorted, relative to the folder.

    Hidden files, `._*` and `__MACOSX` are ignored. Links are followed, each folder once.

    Args:
        folder: An existing folder.

    Raises:
        DatasetError: If the name of an image is not in UTF-8.
    """
    endings = image_endings()
    images: list[PurePath] = []
    others: list[PurePath] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if not _is_hidden(name):
                path = PurePath(os.path.relpath(os.path.join(place, name), folder))
                (images if path.suffix.lower() in endings else others).append(path)
    check_names([str(path) for path in images])
    return sorted(images), sorted(others)


def check_names(files: Sequence[str]) -> None:
    """Check that file names are in UTF-8, as tables, CSV and JSON are; Python holds other bytes as surrogates.

    Raises:
        DatasetError: If they are not.
    """
    if odd := [os.fsencode(name) for name in files if name != name.encode(errors="replace").decode()]:
        raise DatasetError(f"file names that are not in UTF-8: {len(odd)}, such as {odd[0]!r}. Rename them.")


def image_endings() -> set[str]:
    """Extensions of the files that Pillow can decode, such as `.jpg`; plugins such as `pillow_heif` add theirs."""
    PILImage.init()
    known = PILImage.registered_extensions()
    return {ending for ending, kind in known.items() if kind in PILImage.OPEN and kind not in _STUBS}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _SYSTEM


def _splits(folder: Path, below: dict[str, list[PurePath]], named: dict[str, str]) -> dict[str, list[PurePath]]:
    strange = sorted(set(below) - set(named))
    if strange:
        raise DatasetError(
            f"`{folder}`: folders named like splits ({some(sorted(named))}) contain class folders, but these "
            f"next to them would not be read: {some(strange)}. Move folders that are not splits elsewhere; or, if all "
            "are classes, list the images in a metadata.csv with the columns file_name and label."
        )
    twice = [split for split, count in Counter(named.values()).items() if count > 1]
    if twice:
        tops = sorted(top for top, split in named.items() if split == twice[0])
        raise DatasetError(f"`{folder}`: {some(tops)} are both the {twice[0]} split. Keep one of them there.")
    return {named[top]: below[top] for top in below}


def _labelled(folder: Path, splits: Mapping[str, Sequence[PurePath]], depth: int) -> dict[str, Dataset]:
    """Rows whose class is the folder at `depth`; an image above it has no class."""
    labels = {
        split: [normal(path.parts[depth]) if len(path.parts) > depth + 1 else None for path in paths]
        for split, paths in splits.items()
    }
    names = sorted_names({label for of_split in labels.values() for label in of_split if label is not None})
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return {
        split: Dataset.from_dict(
            {"image": [str(folder / path) for path in paths], "label": labels[split]}, features=features
        )
        for split, paths in splits.items()
    }


def _from_metadata(folder: Path, images: list[PurePath], tables: list[PurePath]) -> Rows:
    parts = []
    for table in tables:
        if len(table.parts) == 2:
            split = split_of(table.parts[0])
            if split is None:
                raise DatasetError(
                    f"`{folder / table}` is in a folder that is not a split. Give `{folder / table.parts[0]}`."
                )
            parts.append(read_table(folder / table, split))
        else:
            parts.append(_by_folder(read_table(folder / table)))
    found = merged(parts)
    listed = sum(len(data) for data in found.splits.values())
    if listed < len(images):
        found.notes.append(
            f"{len(images) - listed} of the {len(images)} images are not in {some([str(t) for t in tables])}"
        )
    return found


def _by_folder(rows: Rows) -> Rows:
    """Split by the first folder of the file names, if all of them are names of splits."""
    data = next(iter(rows.splits.values()))
    if len(rows.splits) > 1 or "file_name" not in data.column_names:
        return rows
    splits = [split_of(PurePath(name or ".").parts[0]) if name else None for name in data["file_name"]]
    return divide(rows, splits) if all(splits) else rows


def _table_split(path: PurePath) -> str | None:
    return split_of(path.stem.partition("-")[0]) if path.suffix.lower() in _TABLES else None


def _from_tables(folder: Path, tables: list[PurePath]) -> Rows:
    return merged([read_table(folder / table, _table_split(table)) for table in tables])


def _notes(folder: Path, images: list[PurePath], others: list[PurePath]) -> list[str]:
    notes = []
    if others:
        counts = Counter(path.suffix.lower() or "no extension" for path in others)
        kinds = some([f"{ending} ({count})" for ending, count in counts.most_common()])
        notes.append(f"not read, because their extension is not that of an image: {kinds}")
    full = {parent for path in images for parent in path.parents}
    empty = [str(PurePath(entry.name)) for entry in sorted(os.scandir(folder), key=lambda e: e.name) if entry.is_dir()]
    empty = [name for name in empty if not _is_hidden(name) and PurePath(name) not in full]
    return [*notes, f"folders without images: {some(empty)}"] if empty else notes


def _no_classes(folder: Path, loose: list[PurePath], named: list[str], others: list[PurePath]) -> str:
    tables = [str(folder / path) for path in others if path.suffix.lower() in _TABLES]
    advice = f"Give the table itself: {some(tables)}." if tables else (
        "Put the images into one folder per class, or add a metadata.csv with the columns file_name and label."
    )  # fmt: skip
    if named:
        return f"`{folder}`: there are no class folders in {some(named)}; the images are directly in them. {advice}"
    if loose:
        return f"`{folder}`: there are no class folders; the {len(loose)} images are directly in it. {advice}"
    return f"`{folder}`: it contains no images that Pillow can read. {advice}"


__all__ = ["check_names", "image_endings", "list_images", "read_folder"]
