"""An adapter's two files: read with suspicion, written all or nothing.

Weights are safetensors, nothing else: a pickled file would run code. PEFT has safetensors write them, which since its
version 0.8 replaces a file in one go; the configuration is written so here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peft_bsr.compat.peft_api import config_class
from peft_bsr.errors import AdapterFileError, ConfigError, headline
from peft_bsr.registration import REGISTERED

_AGAIN = "Take another checkpoint, or save or download it again"


class AdapterFiles:
    """Mixin in front of `PeftConfig`: checks the files of a local folder before PEFT reads them.

    Attributes:
        fills_weights: Read from a file, and PEFT is about to load the weights that belong to it.
    """

    fills_weights = False

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[misc]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """PEFT's, for a folder that was checked, or a repository of the Hub.

        Args:
            pretrained_model_name_or_path: Folder or repository.
            subfolder: In it.
            **kwargs: For PEFT.

        Raises:
            AdapterFileError: If a file of a local folder is damaged, or weights are pickled.
            ConfigError: If the configuration holds what cannot be.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            read_config(folder)
            if (folder / SAFETENSORS_WEIGHTS_NAME).exists() or (folder / WEIGHTS_NAME).exists():
                check_weights(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)  # type: ignore[misc]
        config.fills_weights = True
        return config

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """PEFT's, but the file is replaced in one go: who is interrupted leaves the earlier one.

        Args:
            save_directory: Folder.
            **kwargs: For PEFT.

        Raises:
            AdapterFileError: If it cannot be written. The earlier file is left as it was.
        """
        draft = Path(save_directory) / f".saving-{os.getpid()}"
        try:
            super().save_pretrained(str(draft), **kwargs)  # type: ignore[misc]
            os.replace(draft / CONFIG_NAME, Path(save_directory) / CONFIG_NAME)
        except OSError as error:
            raise AdapterFileError(
                f"{str(Path(save_directory) / CONFIG_NAME)!r} was not written ({error}); an earlier one is as it was. "
                "Make room, or save to another folder."
            ) from error
        finally:
            (draft / CONFIG_NAME).unlink(missing_ok=True)
            if draft.is_dir():
                draft.rmdir()


def check_adapter(folder: str | Path) -> None:
    """Read both files of an adapter without loading it: is it whole, and one of ours?

    PEFT reads a configuration before it knows that the adapter is ours, and damage there gives its own errors (of
    `json`, or a `KeyError`). Where files come from outside, call this first. Nothing of them is executed.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterFileError: If a file is missing or damaged, or weights are pickled.
        ConfigError: If the configuration holds what cannot be.

    Examples:
        >>> check_adapter("my-adapter")  # doctest: +SKIP
    """
    peft_type = read_config(Path(folder))["peft_type"]
    config_class(peft_type).from_pretrained(str(folder))
    check_weights(Path(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` holds.

    Raises:
        AdapterFileError: If it is missing, no JSON object, or of another method.
    """
    path = folder / CONFIG_NAME
    try:
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{str(path)!r} cannot be read ({headline(error)}). {_AGAIN}.") from error
    peft_type = values.get("peft_type") if isinstance(values, dict) else None
    if peft_type not in REGISTERED:
        raise AdapterFileError(
            f"{str(path)!r} is not of an adapter of peft_bsr: its `peft_type` is {peft_type!r}, not one of "
            f"{', '.join(map(repr, sorted(REGISTERED)))}. {_AGAIN}, or load it as what it is."
        )
    return values


def check_weights(folder: Path) -> None:
    """Read the header of `adapter_model.safetensors`, which says whether the file is whole.

    Raises:
        AdapterFileError: If it is missing or damaged, or there is a pickled file instead.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        pickled = folder / WEIGHTS_NAME
        found = (
            f"there is {WEIGHTS_NAME!r}, but pickled files can run code and are not read" if pickled.exists() else ""
        )
        raise AdapterFileError(f"{str(path)!r} is missing{'; ' * bool(found)}{found}. {_AGAIN}, as safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (OSError, SafetensorError, ValueError) as error:
        why = headline(error)
        raise AdapterFileError(f"{str(path)!r} is no whole safetensors file ({why}). {_AGAIN}.") from error


__all__ = ["AdapterFiles", "check_adapter", "check_weights", "read_config"]
