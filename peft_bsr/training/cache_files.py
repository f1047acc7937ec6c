"""Rows of tensors in files. Appending can be interrupted and continued; each row is checked when it is read."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from peft_bsr.errors import FeatureCacheError

_FLUSH_SECONDS = 10.0  # maximum work lost by an interruption
_CHECKSUMS = "row_crc32"
_ABOUT, _DONE, _LOCK = "cache.json", "done", ".lock"

Fields = dict[str, tuple[str, list[int]]]  # name -> dtype and shape of a row
Key = dict[str, Any]  # what the rows depend on, as JSON


class CacheFiles:
    """A folder with one file per field, `cache.json` that describes them, and `done` with the number of finished rows.

    Each row has a checksum of its numbers, its index and `cache.json`.

    Args:
        folder: The folder. It need not exist.

    Attributes:
        key: What the rows depend on: model, weights, samples.
        fields: Name -> (dtype, shape of a row).
        num_rows: Number of rows when complete.
        num_done: Number of finished rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key: Key = {}
        self.fields: Fields = {}
        self.num_rows = self.num_done = 0
        self._seed = 0
        self._maps: dict[str, np.memmap] = {}
        self._flushed = time.monotonic()

    @property
    def exists(self) -> bool:
        """Whether there is a cache in the folder."""
        return (self.folder / _ABOUT).is_file()

    def is_complete(self) -> bool:
        """Whether there is a complete cache in the folder. If so, it is opened.

        Raises:
            FeatureCacheError: If it is damaged.
        """
        if self.exists:
            self.open()
        return 0 < self.num_rows == self.num_done

    @contextmanager
    def locked(self, wait: Callable[[], None]) -> Iterator[None]:
        """Lock the folder against writes of other processes. The lock of a killed process is released.

        Args:
            wait: Function that is called before waiting for another process.

        Raises:
            FeatureCacheError: If the folder cannot be written.
        """
        lock = FileLock(self.folder / _LOCK)
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                wait()
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def create(self, key: Key, fields: Fields, num_rows: int) -> None:
        """Create the files at their full size, which reserves the disk space.

        Raises:
            FeatureCacheError: If there is too little disk space, or other files have their names. No file is left.
        """
        fields = {**fields, _CHECKSUMS: ("int64", [])}
        draft = self.folder / f"{_ABOUT}.new"  # exists as long as the files are not complete
        _remove_unfinished(draft)
        if taken := [path.name for path in _paths(self.folder, fields) if path.exists()]:
            raise FeatureCacheError(
                f"{str(self.folder)!r} holds {', '.join(taken)}, but no cache.json: that is not a feature cache, and "
                "would be overwritten. Choose another folder."
            )
        needed, free = num_bytes(fields, num_rows), shutil.disk_usage(self.folder).free
        if needed > free:
            raise FeatureCacheError(
                f"the feature cache needs {needed / 2**30:.2f} GiB for {num_rows} samples, but {str(self.folder)!r} "
                f"has {free / 2**30:.2f} GiB free. Choose another folder, or reduce tokens in an earlier block."
            )
        try:
            with self._writing():
                draft.write_text(json.dumps({"key": key, "fields": fields, "num_rows": num_rows}, indent=2))
                for name, field in fields.items():
                    _allocate(self._path(name), num_bytes({name: field}, num_rows))
                self._write(_DONE, "0")
        except FeatureCacheError:
            _remove_unfinished(draft)
            raise
        os.replace(draft, self.folder / _ABOUT)

    def open(self) -> None:
        """Map the files for reading.

        Raises:
            FeatureCacheError: If there is no cache, or it is damaged.
        """
        if not self.exists:
            raise FeatureCacheError(f"there is no feature cache in {str(self.folder)!r}. Use FeatureCache.build.")
        try:
            text = (self.folder / _ABOUT).read_bytes()
            self.key, self.fields, self.num_rows = _parsed(text)
            self._seed = zlib.crc32(text)
            self.num_done = int((self.folder / _DONE).read_text())
            if not 0 <= self.num_done <= self.num_rows:
                raise ValueError(f"{self.num_done} of {self.num_rows} rows are done")
            for name, (dtype, shape) in self.fields.items():
                size, expected = self._path(name).stat().st_size, num_bytes({name: (dtype, shape)}, self.num_rows)
                if size != expected:
                    raise ValueError(f"{name}.bin has {size} bytes instead of {expected}")
                self._maps[name] = np.memmap(self._path(name), _numpy_dtype(dtype), "r", shape=(self.num_rows, *shape))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FeatureCacheError(
                f"the feature cache in {str(self.folder)!r} is damaged ({error}). Delete the folder and build it again."
            ) from error

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Add rows, each field [R, ...]. They count as finished when they are on disk.

        Raises:
            FeatureCacheError: If their dtypes or shapes differ from those of the first rows, or they cannot be written.
        """
        own = {name: field for name, field in self.fields.items() if name != _CHECKSUMS}
        found = {name: (str(row.dtype).removeprefix("torch."), list(row.shape[1:])) for name, row in rows.items()}
        if found != own:
            name = next(n for n in (*own, *found) if found.get(n) != own.get(n))
            raise FeatureCacheError(
                f"sample {self.num_done} or one after it has `{name}` {_told(found.get(name))}, the first samples have "
                f"{_told(own.get(name))}. All samples need the same tensors."
            )
        begin, number = self.num_done, len(next(iter(rows.values())))
        arrays = {n: rows[n].contiguous().view(_view_dtype(dtype)).numpy() for n, (dtype, _) in own.items()}
        sums = [self._checksum(begin + i, {n: array[i : i + 1] for n, array in arrays.items()}) for i in range(number)]
        arrays[_CHECKSUMS] = np.array(sums, np.int64)
        with self._writing():
            for name, array in arrays.items():
                with open(self._path(name), "r+b") as file:
                    file.seek(num_bytes({name: self.fields[name]}, begin))
                    file.write(array.data)
        self.num_done = begin + number
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write everything to disk."""
        with self._writing():
            for name in self.fields:
                with open(self._path(name), "r+b") as file:
                    os.fsync(file.fileno())
            self._write(_DONE, str(self.num_done))
        self._flushed = time.monotonic()

    def read(self, index: int) -> dict[str, Tensor]:
        """One row.

        Raises:
            FeatureCacheError: If its checksum is wrong.
        """
        index = range(self.num_rows)[index]
        rows = {name: np.array(mapped[index : index + 1]) for name, mapped in self._maps.items()}
        if self._checksum(index, rows) != int(rows.pop(_CHECKSUMS)[0]):
            raise FeatureCacheError(
                f"the feature cache in {str(self.folder)!r} is damaged (row {index} has another checksum). Delete "
                "the folder and build it again."
            )
        return {name: torch.from_numpy(row)[0].view(getattr(torch, self.fields[name][0])) for name, row in rows.items()}

    def spec(self, name: str) -> list[object]:
        """One field of all finished rows, without checking them."""
        values: list[object] = self._maps[name][: self.num_done].tolist()
        return values

    def _checksum(self, index: int, row: Mapping[str, np.ndarray]) -> int:
        value = zlib.crc32(index.to_bytes(8, "little"), self._seed)
        for name in self.fields:
            value = value if name == _CHECKSUMS else zlib.crc32(row[name].data, value)
        return value

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _write(self, name: str, text: str) -> None:
        """Write a file atomically."""
        draft = self.folder / f"{name}.new"
        draft.write_text(text)
        os.replace(draft, self.folder / name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FeatureCacheError(
                f"the feature cache in {str(self.folder)!r} cannot be written ({error.strerror or error}). Free "
                "disk space, or choose another folder. Finished rows are kept."
            ) from error

    def __reduce__(self) -> tuple[Callable[[Path], CacheFiles], tuple[Path]]:
        return _reopen, (self.folder,)  # a memory map would be pickled with all of its numbers


def num_bytes(fields: Fields, num_rows: int) -> int:
    """Size of rows on disk, in bytes."""
    return sum(num_rows * math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in fields.values())


def _parsed(text: bytes) -> tuple[Key, Fields, int]:
    """Key, fields and number of rows of a `cache.json`."""
    about = json.loads(text)
    key, fields, num_rows = about["key"], about["fields"], about["num_rows"]
    if type(num_rows) is not int or num_rows < 1 or not isinstance(key, dict) or _CHECKSUMS not in fields:
        raise ValueError(f"{_ABOUT} has an unknown format")
    for name, (dtype, shape) in fields.items():
        if Path(name).name != name or not isinstance(getattr(torch, dtype), torch.dtype):
            raise ValueError(f"{_ABOUT} names {name!r} of {dtype!r}")
        if any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"{_ABOUT} names a shape {shape!r}")
    return key, {name: (dtype, list(shape)) for name, (dtype, shape) in fields.items()}, num_rows


def _paths(folder: Path, fields: Fields) -> list[Path]:
    return [*(folder / f"{name}.bin" for name in fields), folder / _DONE]


def _remove_unfinished(draft: Path) -> None:
    """Remove the files of a process that was killed in `create`."""
    if not draft.exists():
        return
    try:
        fields = _parsed(draft.read_bytes())[1]
    except (ValueError, KeyError, TypeError, AttributeError):  # ended before there was any other file
        fields = {}
    for path in (*(_paths(draft.parent, fields) if fields else ()), draft):
        path.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> None:
    """Create a file of that size and reserve its disk space, so that a full disk raises here."""
    with open(path, "wb") as file:
        file.truncate(size)
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def _reopen(folder: Path) -> CacheFiles:
    files = CacheFiles(folder)
    files.open()
    return files


def _told(field: tuple[str, list[int]] | None) -> str:
    return "not at all" if field is None else f"{field[0]} {field[1]}"


def _view_dtype(dtype: str) -> torch.dtype:
    """A dtype that NumPy has: it lacks bfloat16."""
    return torch.int16 if dtype == "bfloat16" else getattr(torch, dtype)


def _numpy_dtype(dtype: str) -> np.dtype:
    return torch.empty(0, dtype=_view_dtype(dtype)).numpy().dtype


__all__ = ["CacheFiles", "Fields", "Key", "num_bytes"]
