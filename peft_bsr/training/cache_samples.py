"""The samples of a feature cache: read in batches, identified by digests, checked for random augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from peft_bsr.errors import FeatureCacheError
from peft_bsr.training.types import Batch, Collate, MapStyleDataset

_READ_AGAIN, _TIMES = 8, 4  # number of samples that are checked for random augmentation, and how often each is read


@dataclass(frozen=True)
class Samples:
    """A dataset, and how it is read.

    Attributes:
        dataset: Samples by index.
        collate: Makes a batch from samples.
        name: Key of the images in a batch.
        batch_size: Samples per batch.
        num_workers: Number of processes that load samples.
        progress: Whether to show a progress bar.
    """

    dataset: MapStyleDataset
    collate: Collate
    name: str
    batch_size: int
    num_workers: int
    progress: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, indices: Sequence[int]) -> Batch:
        """One batch, read as a DataLoader reads it."""
        return self.collate(self._subset(indices).__getitems__([*range(len(indices))]))

    def batches(self, indices: Sequence[int], title: str) -> Iterator[Batch]:
        """Batches of these samples, in order.

        Args:
            indices: Indices of the samples.
            title: Title of the progress bar.
        """
        subset = self._subset(indices)
        loader = DataLoader(subset, self.batch_size, collate_fn=self.collate, num_workers=self.num_workers)
        start = indices[0] if len(indices) else 0
        with tqdm(
            total=start + len(indices), initial=start, unit="image", desc=title, disable=not self.progress
        ) as bar:
            for batch in loader if len(indices) else ():
                yield batch
                bar.update(len(batch[self.name]))

    def _subset(self, indices: Sequence[int]) -> Subset:
        return Subset(cast(Dataset, self.dataset), indices)

    def spread(self, number: int, among: int | None = None) -> list[int]:
        """At most `number` indices, evenly spread over the first `among` samples, including the first and the last."""
        last = (len(self) if among is None else among) - 1
        return sorted({round(last * i / max(1, number - 1)) for i in range(number)}) if last >= 0 else []

    def check_steady(self) -> None:
        """Read some samples several times.

        Raises:
            FeatureCacheError: If one of them differs.
        """
        picked = self.spread(_READ_AGAIN)
        if len({tuple(self.digests(self.take(picked))) for _ in range(_TIMES)}) > 1:
            raise FeatureCacheError(
                "a sample was different when it was read again: random augmentation, or no fixed order. A cache would "
                "freeze it. Turn it off, or train without a cache."
            )

    def digests(self, batch: Batch) -> list[int]:
        """One digest of the tensors of each sample, [B]."""
        tensors = sorted((n, value.detach().cpu()) for n, value in batch.items() if isinstance(value, Tensor))
        found = []
        for index in range(len(batch[self.name])):
            digest = hashlib.blake2b(digest_size=8)
            for name, tensor in tensors:
                row = tensor[index].contiguous()
                digest.update(f"{name} {row.dtype} {tuple(row.shape)}".encode())
                digest.update(row.view(-1).view(torch.uint8).numpy().data)
            found.append(int.from_bytes(digest.digest(), "little", signed=True))
        return found


__all__ = ["Samples"]
