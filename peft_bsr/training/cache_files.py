"""Rows of tensors in memory-mapped files: append, be interrupted, go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_bsr.errors import FeatureCacheError

_FLUSH_SECONDS = 10.0  # work that an interruption loses at most

Fields = dict[str, tuple[str, list[int]]]  # name -> dtype and shape of a row


class CacheFiles:
    """One file a field in a folder, `cache.json` that says what they are, and `done` with the number of finished rows.

    Args:
        folder: Need not exist.

    Attributes:
        key: What the rows belong to.
        fields: Name -> (dtype, shape of a row).
        num_rows: Rows when complete.
        num_done: Rows there are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key: dict[str, Any] = {}
        self.fields: Fields = {}
        self.num_rows = self.num_done = 0
        self._maps: dict[str, np.memmap[Any, Any]] = {}
        self._flushed = time.monotonic()

    @property
    def exists(self) -> bool:
        """Whether there is a cache in the folder."""
        return (self.folder / "cache.json").is_file()

    def create(self, key: dict[str, Any], fields: Fields, num_rows: int) -> None:
        """Make the files at their full size.

        Raises:
            FeatureCacheError: If the disk has no room for them. Nothing is left behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = num_bytes(fields, num_rows), shutil.disk_usage(self.folder).free
        if needed > free:
            raise FeatureCacheError(
                f"the feature cache needs {needed / 2**30:.2f} GiB for {num_rows} samples, but {str(self.folder)!r} "
                f"has {free / 2**30:.2f} GiB free. Choose another folder, or reduce tokens in an earlier block."
            )
        for name, (dtype, shape) in fields.items():
            with open(self._path(name), "wb") as file:
                file.truncate(num_bytes({name: (dtype, shape)}, num_rows))
        self._write("done", "0")
        self._write("cache.json", json.dumps({"key": key, "fields": fields, "num_rows": num_rows}, indent=2))
        self.open()

    def open(self) -> None:
        """Map the files.

        Raises:
            FeatureCacheError: If there are none, or they are damaged.
        """
        if not self.exists:
            raise FeatureCacheError(f"there is no feature cache in {str(self.folder)!r}. Make one: FeatureCache.build.")
        try:
            about = json.loads((self.folder / "cache.json").read_text())
            self.key, self.num_rows = about["key"], int(about["num_rows"])
            self.fields = {name: (dtype, list(shape)) for name, (dtype, shape) in about["fields"].items()}
            self.num_done = int((self.folder / "done").read_text())
            mode: Any = "r" if self.num_done == self.num_rows else "r+"
            for name, (dtype, shape) in self.fields.items():
                size, expected = self._path(name).stat().st_size, num_bytes({name: (dtype, shape)}, self.num_rows)
                if size != expected:
                    raise ValueError(f"{name}.bin has {size} bytes instead of {expected}")
                self._maps[name] = np.memmap(self._path(name), _numpy_dtype(dtype), mode, shape=(self.num_rows, *shape))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FeatureCacheError(
                f"the feature cache in {str(self.folder)!r} is damaged ({error}). Delete the folder and make it anew."
            ) from error

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Add rows, each field [R, ...]. They count as done when they are on disk."""
        number = len(next(iter(rows.values())))
        begin, end = self.num_done, self.num_done + number
        for name, (dtype, _) in self.fields.items():
            self._maps[name][begin:end] = rows[name].contiguous().view(_view_dtype(dtype)).numpy()
        self.num_done = end
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put everything on disk."""
        for mapped in self._maps.values():
            mapped.flush()
        self._write("done", str(self.num_done))
        self._flushed = time.monotonic()

    def read(self, index: int) -> dict[str, Tensor]:
        """One row."""
        return {
            name: torch.from_numpy(np.array(self._maps[name][index])).view(getattr(torch, dtype))
            for name, (dtype, _) in self.fields.items()
        }

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _write(self, name: str, text: str) -> None:
        """All or nothing."""
        draft = self.folder / f"{name}.new"
        draft.write_text(text)
        os.replace(draft, self.folder / name)

    def __reduce__(self) -> tuple[Any, ...]:  # a memory map would be pickled as all its numbers
        return _reopen, (self.folder,)


def num_bytes(fields: Fields, num_rows: int) -> int:
    """What rows take on disk."""
    return sum(num_rows * int(np.prod(shape)) * getattr(torch, dtype).itemsize for dtype, shape in fields.values())


def _reopen(folder: Path) -> CacheFiles:
    files = CacheFiles(folder)
    files.open()
    return files


def _view_dtype(dtype: str) -> torch.dtype:
    """What NumPy can hold: it has no bfloat16."""
    return torch.int16 if dtype == "bfloat16" else getattr(torch, dtype)


def _numpy_dtype(dtype: str) -> Any:
    return torch.empty(0, dtype=_view_dtype(dtype)).numpy().dtype


__all__ = ["CacheFiles", "Fields", "num_bytes"]
