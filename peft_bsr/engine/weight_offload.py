"""Moves weights that are not needed for now out of memory, off the accelerator, to a memory-mapped file.

A trained copy of a block would double that block's weights. The base weights are needed again only to switch the
adapter off, to merge or to attach another. Until then they are in the file, and code that reads them on the CPU gets
the same values through the mapping.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile

import torch
from torch import Tensor, nn

from peft_bsr.compat.torch_api import version_of

logger = logging.getLogger(__name__)

_SMALLEST = 2**16  # bytes; for smaller parameters (biases), pages would cost more than they save


class WeightOffload:
    """Offloads the parameters of one module.

    Examples:
        >>> layer, weight_offload = torch.nn.Linear(256, 256), WeightOffload()
        >>> before = layer.weight.detach().clone()
        >>> weight_offload.offload(layer)
        >>> torch.equal(layer.weight, before)
        True
    """

    def __init__(self) -> None:
        self._mapped: dict[str, Tensor] = {}
        self._fetched: dict[str, tuple[int, int]] = {}  # address and version of what `onload` made

    @torch.inference_mode(False)  # a parameter with data of inference mode could not be used in training
    def offload(self, module: nn.Module) -> None:
        """Move the parameters to a mapped file; values do not change. If it cannot be written, they stay, logged.

        Args:
            module: The module. Its parameters of 64 KiB and more are moved; their device becomes the CPU.
        """
        for name, parameter in module.named_parameters():
            data = parameter.data
            if not _is_worth_it(data) or type(data) is not Tensor or data.is_meta or self._is_offloaded(name, data):
                continue
            is_known = name in self._mapped and self._fetched.get(name) == (data.data_ptr(), version_of(parameter))
            try:
                parameter.data = self._mapped[name] if is_known else _map_to_file(data)
            except OSError as error:
                logger.warning("base weights stay in memory, writing to %s failed: %s", tempfile.gettempdir(), error)
                return
            self._mapped[name] = parameter.data

    @staticmethod
    def takes(module: nn.Module) -> list[Tensor]:
        """The parameters that `offload` would move."""
        return [parameter for parameter in module.parameters() if _is_worth_it(parameter)]

    @torch.inference_mode(False)
    def onload(self, module: nn.Module, device: torch.device) -> None:
        """Copy offloaded parameters to `device`. On the CPU nothing is copied: they are read from the file."""
        for name, parameter in module.named_parameters():
            if self._is_offloaded(name, parameter.data) and device.type not in ("cpu", "meta"):
                parameter.data = parameter.data.to(device)
                self._fetched[name] = (parameter.data_ptr(), version_of(parameter))

    @torch.inference_mode(False)
    def clear(self, module: nn.Module, device: torch.device) -> None:
        """Copy offloaded parameters back into memory on `device` and release the files."""
        for name, parameter in module.named_parameters():
            if self._is_offloaded(name, parameter.data):
                parameter.data = parameter.data.to(device, copy=True)
        self._mapped, self._fetched = {}, {}

    def _is_offloaded(self, name: str, data: Tensor) -> bool:
        return name in self._mapped and self._mapped[name].data_ptr() == data.data_ptr()

    def __deepcopy__(self, memo: object) -> WeightOffload:
        return WeightOffload()  # a copied parameter is in memory

    def __reduce__(self) -> tuple[type[WeightOffload], tuple[()]]:
        return WeightOffload, ()


def _is_worth_it(data: Tensor) -> bool:
    return data.nbytes >= _SMALLEST


def _map_to_file(data: Tensor) -> Tensor:
    """A copy of the tensor, backed by a mapped file that is already unlinked."""
    dense = data.detach().contiguous().cpu()
    handle, path = tempfile.mkstemp(prefix="peft_bsr_")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(dense.view(torch.uint8).numpy().data)
        storage = torch.UntypedStorage.from_file(path, shared=False, nbytes=dense.nbytes)
    finally:
        with contextlib.suppress(OSError):  # Windows cannot unlink a mapped file; it clears the folder later
            os.unlink(path)
    return torch.empty(0, dtype=dense.dtype).set_(storage, 0, dense.shape, dense.stride())  # type: ignore[arg-type]


__all__ = ["WeightOffload"]
