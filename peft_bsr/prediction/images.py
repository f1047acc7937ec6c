"""A model's outputs for images, one after the other. Unreadable images give an error text, not an exception."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from peft_bsr.data import image_name, load_unlabelled, open_image, stored, to_pixels, to_rgb
from peft_bsr.data.pixels import ImageSource
from peft_bsr.errors import DatasetError, one_line
from peft_bsr.prediction.predictor import Predictor

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

Images: TypeAlias = str | Path | Image.Image | Sequence[str | Path | Image.Image] | Dataset
"""See `read_rows`."""


class Rows(Protocol):
    """A sequence of rows, each with an `image`, see `peft_bsr.data.open_image`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, ImageSource]: ...


def read_rows(images: Images, *, image_column: str | None = None, split: str | None = None) -> Rows:
    """Rows with an `image`, without decoding.

    Args:
        images: A file, a folder, a table or a dataset by name, a Pillow image, several of those, or a
            `datasets.Dataset` with a column `image`.
        image_column: See `peft_bsr.data.load_unlabelled`.
        split: See `peft_bsr.data.load_unlabelled`.

    Raises:
        DatasetError: If there are no images.
    """
    if isinstance(images, Dataset):
        return stored(images).select_columns(["image"])
    several: Sequence[str | Path | Image.Image] = (
        [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    )
    if not several:
        raise DatasetError("there are no images: the list is empty.")
    if all(isinstance(one, (str, Path)) for one in several):
        rows = load_unlabelled([str(one) for one in several], image_column=image_column, split=split)
        return stored(rows).select_columns(["image"])
    rows_in_memory: list[dict[str, ImageSource]] = [
        {"image": one if isinstance(one, Image.Image) else str(one)} for one in several
    ]
    return rows_in_memory


def row_name(rows: Rows, index: int) -> str:
    """File name of an image, or `row 3`.

    Args:
        rows: From `read_rows`.
        index: Index of the row.
    """
    return image_name(rows[index]["image"]) or f"row {index}"


def outputs_of(
    predictor: Predictor, rows: Rows, *, batch_size: int = 32, workers: int | None = None, progress: bool = True
) -> Iterator[Tensor | str]:
    """For each row, in order: the model's outputs [C], or why the image could not be read.

    Args:
        predictor: The model.
        rows: From `read_rows`.
        batch_size: Images per forward. A predictor with a fixed batch size uses its own.
        workers: Number of processes that read images. Default None: 0 without a GPU, otherwise at most 4.
        progress: Whether to show a progress bar.
    """
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if torch.accelerator.is_available() else 0
    loader = DataLoader(
        _Pixels(rows, predictor.processor),
        batch_size=predictor.batch_size or batch_size,
        num_workers=workers,
        collate_fn=list,
    )
    with tqdm(total=len(rows), desc="predicting", unit="image", disable=not progress) as bar:
        for batch in loader:
            read = [one for one in batch if not isinstance(one, str)]
            found = iter(_run(predictor, torch.stack(read)) if read else ())
            for one in batch:
                yield one if isinstance(one, str) else next(found)
            bar.update(len(batch))


def _run(predictor: Predictor, pixels: Tensor) -> Tensor:
    """Outputs [B, C]; a batch that is too small is padded with its last image."""
    missing = 0 if predictor.batch_size is None else predictor.batch_size - len(pixels)
    filled = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels
    return predictor.run(filled)[: len(pixels)]


class _Pixels(TorchDataset):
    """Each image as the model's input [3, H, W], or why it cannot be read."""

    def __init__(self, rows: Rows, processor: BaseImageProcessor) -> None:
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor | str:
        source = self.rows[index]["image"]
        try:
            image = to_rgb(open_image(source))
        except DatasetError as error:
            return str(error).removeprefix(f"`{image_name(source)}` ").rstrip(".")
        except Exception as error:  # of Pillow's converters
            return f"cannot be converted to RGB: {one_line(error)}"
        return to_pixels([image], self.processor)[0]


__all__ = ["Images", "Rows", "outputs_of", "read_rows", "row_name"]
