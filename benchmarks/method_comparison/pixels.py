"""Images of protocols with `decoded`: decoded once, into a file that all runs share, and kept on the device."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from data import Protocol, with_pixels
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from peft_bsr.data import collate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_AT_ONCE = 256


class Decoded(Dataset[dict[str, Tensor]]):
    """Pixel values [images, channels, height, width] and labels [images]. A list of indices gives a whole batch."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {name: column[place] for name, column in self.columns.items()}

    def __getitems__(self, places: list[int]) -> dict[str, Tensor]:
        at = torch.tensor(places, device=self.columns["labels"].device)
        return {name: column.index_select(0, at) for name, column in self.columns.items()}


def as_batch(batch: Any) -> Any:
    """The collator of `Decoded`, whose rows are a batch already."""
    return batch


def decode(images: datasets.Dataset, source: str, protocol: Protocol) -> Path:
    """The file of the decoded images, in the protocol's precision; written now if there is none.

    Args:
        images: See `data.load_task`.
        source: Hub id or folder of the model.
        protocol: The protocol.
    """
    key = f"{images._fingerprint} {source} {protocol.precision}"
    path = Path(tempfile.gettempdir()) / "method_comparison" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        rows = with_pixels(images, source)
        parts = [
            collate([rows[i] for i in range(k, min(k + _AT_ONCE, len(rows)))]) for k in range(0, len(rows), _AT_ONCE)
        ]
        columns = {
            "pixel_values": torch.cat([part["pixel_values"].to(DTYPES[protocol.precision]) for part in parts]),
            "labels": torch.cat([part["labels"] for part in parts]),
        }
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as unfinished:
            save_file(columns, unfinished.name)
        Path(unfinished.name).replace(path)
    return path


def on_device(path: Path) -> Decoded:
    """The images of `decode`, on the GPU if there is one."""
    return Decoded(load_file(path, device="cuda" if torch.cuda.is_available() else "cpu"))


__all__ = ["Decoded", "as_batch", "decode", "on_device"]
