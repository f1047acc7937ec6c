"""Types of examples, batches and datasets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Example = dict[str, Any]
"""One example: `pixel_values`, `labels` and others."""

Batch = dict[str, Any]
"""Keyword arguments of a model: mostly tensors, images or examples first."""

Collate = Callable[[list[Any]], Batch]
"""Makes a batch from examples."""


class MapStyleDataset(Protocol):
    """A dataset that is read by index: of torch, of `datasets`, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


__all__ = ["Batch", "Collate", "Example", "MapStyleDataset"]
