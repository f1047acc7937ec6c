"""Where an adapter is read from. Its weights are checked there before PEFT loads them into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_bsr.errors import AdapterFileError, headline

AGAIN = "Use another checkpoint, or save or download it again"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


@dataclass(frozen=True)
class AdapterSource:
    """A folder, or a repository on the Hub.

    Attributes:
        name: Folder or Hub id.
        subfolder: Folder within it, or None.
        options: Arguments of `hf_hub_download`, such as `revision` and `token`.
    """

    name: str
    subfolder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Path | None:
        """The file with the weights, downloaded if necessary and cached, or None if there is none.

        Raises:
            AdapterFileError: If there is a pickled file instead.
        """
        folder = Path(self.name, self.subfolder or "")
        if folder.is_dir():
            path = folder / SAFETENSORS_WEIGHTS_NAME
            if not path.is_file() and (folder / WEIGHTS_NAME).exists():
                raise AdapterFileError(missing(path, pickled=True))
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, SAFETENSORS_WEIGHTS_NAME, subfolder=self.subfolder, **self.options))
        except LocalEntryNotFoundError:  # offline, and never downloaded: PEFT reports it
            return None
        except EntryNotFoundError as error:
            pickled = "/".join(filter(None, (self.subfolder, WEIGHTS_NAME)))
            known = {n: self.options[n] for n in ("repo_type", "revision", "token") if n in self.options}
            if HfApi().file_exists(self.name, pickled, **known):
                raise AdapterFileError(missing(Path(self.name, SAFETENSORS_WEIGHTS_NAME), pickled=True)) from error
            return None


def read_header(path: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a file's tensors, on the meta device. Reads the header only.

    Raises:
        AdapterFileError: If it is not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return {
                name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.bool), device="meta")
                for name, part in slices.items()
            }
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise AdapterFileError(
            f"{str(path)!r} is not a complete safetensors file ({headline(error)}). {AGAIN}."
        ) from error


def missing(path: Path, *, pickled: bool) -> str:
    """The message for a missing file of weights.

    Args:
        path: The expected file.
        pickled: Whether a pickled file is there instead.
    """
    found = f"; there is {WEIGHTS_NAME!r}, but pickled files can run code and are not read" if pickled else ""
    return f"{str(path)!r} is missing{found}. {AGAIN}, as safetensors."


__all__ = ["AGAIN", "AdapterSource", "missing", "read_header"]
