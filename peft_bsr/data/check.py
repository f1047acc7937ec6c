"""Checks a dataset before training: every image is decoded once, in threads."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage
from tqdm import tqdm

from peft_bsr.data.images import LabelledImages, labels_of
from peft_bsr.data.pixels import ImageSource, StoredImage, image_name, open_image, stored, to_rgb
from peft_bsr.data.rows import some
from peft_bsr.errors import DatasetError, one_line
from peft_bsr.problem_type import REGRESSION

FEW = 5  # images of a class
_AT_ONCE = 64  # encoded images in memory
_PLAIN = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be decoded.

    Attributes:
        split: Name of its split.
        name: File name, or row.
        reason: Pillow's error.
    """

    split: str
    name: str
    reason: str


@dataclass(frozen=True)
class DataReport:
    """What is in a dataset.

    Attributes:
        name: Name that was passed to `load_images`.
        problem_type: As in transformers' configurations.
        images: Split -> number of images that can be decoded.
        counts: Split -> class -> number of its images. Empty for a regression.
        values: Split -> name -> smallest, median and largest value, mean and standard deviation, for a regression.
        modes: Pillow mode -> number of images.
        widths: Smallest, median and largest width in pixels, after rotating images upright.
        heights: Smallest, median and largest height.
        bad: All images that cannot be decoded.
        duplicates: Images with the same bytes in several splits, one list of `split: name` each.
        few: Class -> number of images in all splits, for classes with less than 5.
        unseen: Classes with images in other splits and none in train.
        notes: Decisions and skipped rows while reading.
    """

    name: str
    problem_type: str
    images: dict[str, int]
    counts: dict[str, dict[str, int]]
    values: dict[str, dict[str, dict[str, float]]]
    modes: dict[str, int]
    widths: tuple[int, int, int]
    heights: tuple[int, int, int]
    bad: list[BadImage]
    duplicates: list[list[str]]
    few: dict[str, int]
    unseen: list[str]
    notes: list[str]

    def findings(self) -> list[str]:
        """One sentence for each finding that needs attention."""
        said = []
        if self.bad:
            said.append(
                f"cannot be decoded: {len(self.bad)} images\n" + "\n".join(f"  {b.name}: {b.reason}" for b in self.bad)
            )
        if self.duplicates:
            shown = [" = ".join(names) for names in self.duplicates]
            said.append(
                f"the same image in several splits: {len(shown)}\n" + "\n".join(f"  {one}" for one in shown[:10])
            )
        if self.unseen:
            said.append(f"classes without a training image: {some(self.unseen)}")
        if self.few:
            said.append(f"classes with fewer than {FEW} images: {some([f'{n} ({c})' for n, c in self.few.items()])}")
        strange = [mode for mode in self.modes if mode not in _PLAIN]
        if strange:
            said.append(f"modes other than 8 bits: {', '.join(strange)}; they are converted to RGB by their range")
        return said

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def check_images(
    data: LabelledImages, *, workers: int | None = None, progress: bool = True
) -> tuple[DataReport, LabelledImages]:
    """Decode every image once, and report what is in the data.

    Args:
        data: From `load_images` or `put_aside`.
        workers: Number of threads. Default None: one per core, at most 8.
        progress: Whether to show a progress bar.

    Returns:
        The report, and the data without rows that have no image and without images that cannot be decoded.
    """
    total = sum(len(rows) for rows in data.splits.values())
    seen: _Looks = {}
    with (
        ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=total, desc="checking images", unit="image", disable=not progress) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
        for split, rows in data.splits.items():
            seen[split] = []
            for values in _batches(rows):
                seen[split] += pool.map(_look, values)
                bar.update(len(values))
    good = {split: [i for i, s in enumerate(found) if isinstance(s, _Seen)] for split, found in seen.items()}
    kept = {
        s: rows if len(good[s]) == len(rows) else rows.select(good[s]) for s, rows in data.splits.items() if good[s]
    }
    bad = [
        BadImage(split, _called(data, split, i), _reason(found, stored(data.splits[split])[i]["image"]))
        for split, all_found in seen.items()
        for i, found in enumerate(all_found)
        if isinstance(found, DatasetError)
    ]
    notes = list(data.notes)
    for split, found in seen.items():
        if missing := sum(one is None for one in found):
            notes.append(f"{split}: {missing} of {len(found)} rows have no image and are skipped")
    clean = replace(data, splits=kept, notes=notes)
    return _report(data, clean, seen, bad), clean


def refuse_bad(report: DataReport, skip: bool) -> None:
    """Raise if there are images that cannot be decoded.

    Args:
        report: From `check_images`.
        skip: Whether to continue without them.

    Raises:
        DatasetError: If there are any; the message names all of them.
    """
    if report.bad and not skip:
        names = "; ".join(f"{bad.name} ({bad.reason})" for bad in report.bad)
        raise DatasetError(
            f"`{report.name}`: {len(report.bad)} images cannot be decoded: {names}. Repair or remove them, or "
            "continue without them with `--skip-bad`."
        )


@dataclass(frozen=True)
class _Seen:
    mode: str
    width: int
    height: int
    digest: bytes


_Looks = dict[str, list[_Seen | DatasetError | None]]  # split -> what each of its rows holds


def _look(source: StoredImage | None) -> _Seen | DatasetError | None:
    """Properties of an image, None if there is none, or the error if it cannot be decoded."""
    if source is None or (source["bytes"] is None and not source["path"]):
        return None
    try:
        encoded = Path(str(source["path"])).read_bytes() if source["bytes"] is None else source["bytes"]
        with PILImage.open(BytesIO(encoded)) as image:
            mode, (width, height) = image.mode, image.size
            if image.getexif().get(_ORIENTATION) in _LYING:
                width, height = height, width
            image.draft(None, (1, 1))  # JPEG: all of it is read, an eighth of it is computed
            image.load()
            if mode not in _PLAIN:
                to_rgb(image)
        return _Seen(mode, width, height, hashlib.blake2b(encoded, digest_size=16).digest())
    except Exception:  # raised again by `open_image`, with its message
        try:
            to_rgb(open_image(source))
        except DatasetError as error:
            return error
        except Exception as error:
            return DatasetError(f"`{image_name(source) or 'an image'}` cannot be converted to RGB: {one_line(error)}")
        return _Seen(mode, width, height, hashlib.blake2b(encoded, digest_size=16).digest())


def _reason(error: DatasetError, source: ImageSource) -> str:
    """The message without the name of the image, which is printed next to it."""
    name = f"`{image_name(source) or 'an image'}`"
    return str(error).replace(f"{name} ", "").replace(f" {name}", "").rstrip(".")


def _batches(rows: Dataset) -> Iterator[list[StoredImage | None]]:
    images = stored(rows.select_columns(["image"]))
    for start in range(0, len(images), _AT_ONCE):
        yield images[start : start + _AT_ONCE]["image"]


def _report(data: LabelledImages, clean: LabelledImages, seen: _Looks, bad: list[BadImage]) -> DataReport:
    looked = [one for found in seen.values() for one in found if isinstance(one, _Seen)]
    counts = {split: clean.counts(split) for split in clean.splits}
    classes = [] if clean.problem_type == REGRESSION else clean.labels
    total = {label: sum(of_split[label] for of_split in counts.values()) for label in classes}
    trained = counts.get("train")
    return DataReport(
        name=data.name,
        problem_type=clean.problem_type,
        images={split: len(rows) for split, rows in clean.splits.items()},
        counts=counts,
        values={split: _values(clean, split) for split in clean.splits if not classes},
        modes=dict(Counter(one.mode for one in looked).most_common()),
        widths=_spread([one.width for one in looked]),
        heights=_spread([one.height for one in looked]),
        bad=bad,
        duplicates=_duplicates(data, seen),
        few={label: count for label, count in total.items() if count < FEW},
        unseen=[label for label in classes if total[label] and not trained[label]] if trained else [],
        notes=clean.notes,
    )


def _values(data: LabelledImages, split: str) -> dict[str, dict[str, float]]:
    """Name -> statistics of the values of a regression."""
    labels = labels_of(data.splits[split]).astype(np.float64)
    figures = {"least": labels.min(0), "median": np.median(labels, axis=0), "largest": labels.max(0)}
    figures |= {"mean": labels.mean(0), "deviation": labels.std(0)}
    return {name: {key: float(of_all[i]) for key, of_all in figures.items()} for i, name in enumerate(data.labels)}


def _spread(values: list[int]) -> tuple[int, int, int]:
    return (min(values), int(np.median(values)), max(values)) if values else (0, 0, 0)


def _duplicates(data: LabelledImages, seen: _Looks) -> list[list[str]]:
    places: dict[bytes, list[tuple[str, int]]] = {}
    for split, found in seen.items():
        for index, one in enumerate(found):
            if isinstance(one, _Seen):
                places.setdefault(one.digest, []).append((split, index))
    several = [where for where in places.values() if len({split for split, _ in where}) > 1]
    return [[f"{split}: {_called(data, split, index)}" for split, index in where] for where in several]


def _called(data: LabelledImages, split: str, index: int) -> str:
    """The file name, or the row index for bytes in a row."""
    source = stored(data.splits[split].select([index]).select_columns(["image"]))[0]["image"]
    name = image_name(source)
    return name if name and source["bytes"] is None else f"row {index} of {split}" + (f" ({name})" if name else "")


__all__ = ["FEW", "BadImage", "DataReport", "check_images", "refuse_bad"]
