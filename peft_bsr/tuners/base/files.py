"""An adapter's two files: validated when read, and written atomically.

Only safetensors files are read, because a pickled file can run code. safetensors (0.8 or later) replaces files
atomically; here the configuration is written the same way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from peft_bsr.compat.peft_api import config_class
from peft_bsr.errors import AdapterFileError, ConfigError, headline
from peft_bsr.registration import REGISTERED
from peft_bsr.tuners.base.digests import check_settings, check_weights_belong, with_digests
from peft_bsr.tuners.base.source import AGAIN, AdapterSource, missing, read_header

_LARGEST = 2**24  # bytes of adapter_config.json; 21 000 class names take 1 MB
_LONGEST = 1000  # entries of a list other than class names, and characters of a module's name
_PLAIN_NAME = re.compile(r"[\w.\-]+")


class AdapterFiles(PeftConfig):
    """A `PeftConfig` that checks the files before PEFT reads them.

    Attributes:
        fills_weights: Whether it was read from a file and PEFT is about to load the weights that belong to it.
        source: Where it was read, or None.
    """

    fills_weights = False
    source: AdapterSource | None = None
    digests: dict[str, str] | None

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Check the files, then read the configuration.

        Args:
            pretrained_model_name_or_path: Folder or repository.
            subfolder: Folder within it. Default None.
            **kwargs: For `PeftConfig.from_pretrained`.

        Raises:
            AdapterFileError: If a file of a local folder is damaged, or weights are pickled.
            ConfigError: If the configuration has invalid values.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            read_config(folder)
            if (folder / SAFETENSORS_WEIGHTS_NAME).exists() or (folder / WEIGHTS_NAME).exists():
                check_weights(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        options = cls._split_kwargs(kwargs)[0]
        config.source = AdapterSource(str(pretrained_model_name_or_path), subfolder, options)
        config.fills_weights = True
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: object) -> dict[str, Any]:
        """Read and check the file. PEFT calls this for downloaded files, too.

        Args:
            path_json_file: The file.
            **kwargs: Not used.

        Raises:
            AdapterFileError: See `read_config`.
            ConfigError: If it contains a regular expression, which is not accepted from a file.
        """
        values = _read_values(Path(path_json_file))
        values.pop("runtime_config", None)  # as in PEFT: it describes a run, not an adapter
        if problems := _without_patterns(values):
            raise ConfigError.from_problems(cls.__name__, problems)
        return values

    def sizes(self) -> dict[str, tuple[int | None, ...]]:
        """Sizes that tensors must have with these settings: end of the name -> length of each axis, None for any.

        A file is checked against them before memory is allocated.
        """
        return {}

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """Save the configuration atomically: an interrupted save leaves the earlier file.

        Args:
            save_directory: The folder.
            **kwargs: For `PeftConfig.save_pretrained`.

        Raises:
            AdapterFileError: If it cannot be written. The earlier file is unchanged.
        """
        folder = Path(save_directory)
        draft = folder / f".saving-{socket.gethostname()}-{os.getpid()}"
        try:
            super().save_pretrained(str(draft), **kwargs)
            values = json.loads((draft / CONFIG_NAME).read_bytes())
            values = with_digests(values, folder / SAFETENSORS_WEIGHTS_NAME)
            (draft / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
            os.replace(draft / CONFIG_NAME, folder / CONFIG_NAME)
            self.digests = values["digests"]
        except OSError as error:
            raise AdapterFileError(
                f"{str(folder / CONFIG_NAME)!r} was not written ({error}); an earlier file is unchanged. "
                "Free disk space, or save to another folder."
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            _remove_drafts(folder)


def check_adapter(folder: str | Path) -> None:
    """Check both files of an adapter without loading it.

    PEFT reads a configuration before it knows the adapter's type, so a damaged file raises errors of `json`, or a
    `KeyError`. Call this first for files from others. It executes nothing from the files and allocates no memory for
    their tensors.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterFileError: If a file is missing or damaged, weights are pickled, or the files do not match.
        ConfigError: If the configuration has invalid values.

    Examples:
        >>> check_adapter("my-adapter")  # doctest: +SKIP
    """
    folder = Path(folder)
    config = config_class(read_config(folder)["peft_type"]).from_pretrained(str(folder))
    check_weights(folder)
    check_file(config)


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of `adapter_config.json`.

    Raises:
        AdapterFileError: If it is missing, not a JSON object, of an unknown method, or was changed after saving.
    """
    return _read_values(folder / CONFIG_NAME)


def check_weights(folder: Path) -> dict[str, Tensor]:
    """Read the header of `adapter_model.safetensors`, which shows whether the file is complete.

    Returns:
        Name -> tensor on the meta device.

    Raises:
        AdapterFileError: If it is missing or damaged, or there is a pickled file instead.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise AdapterFileError(missing(path, pickled=(folder / WEIGHTS_NAME).exists()))
    return read_header(path)


def check_file(config: AdapterFiles) -> None:
    """Check the file that PEFT is about to load against the settings. Reads the header only, not the tensors.

    Args:
        config: Configuration from `from_pretrained`.

    Raises:
        AdapterFileError: If tensors have other sizes than the settings require, or were not saved with them.
    """
    path = None if config.source is None else config.source.weights
    if path is None:
        return
    found = read_header(path)
    problems = []
    for ending, expected in config.sizes().items():
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items() if f".{name}".endswith(f".{ending}")}
        wanted = ", ".join("any" if length is None else str(length) for length in expected)
        if not shapes:
            problems.append(f"the settings ask for `{ending}` [{wanted}, ...], which the file does not have.")
        problems += [
            f"`{name}` has the shape {list(shape)}, the settings ask for [{wanted}, ...]."
            for name, shape in shapes.items()
            if len(shape) < len(expected) or any(e not in (None, s) for e, s in zip(expected, shape, strict=False))
        ][:1]
    if problems:
        problems[-1] += f" {AGAIN}."
        raise AdapterFileError.from_problems(f"{str(path)!r} does not match its adapter_config.json", problems)
    check_weights_belong(config.digests, path)


def _read_values(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        values: Any = json.loads(path.read_bytes()) if size <= _LARGEST else None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{str(path)!r} cannot be read ({headline(error)}). {AGAIN}.") from error
    if size > _LARGEST:
        raise AdapterFileError(
            f"{str(path)!r} cannot be read: it has {size} bytes, at most {_LARGEST} are allowed. {AGAIN}."
        )
    peft_type = values.get("peft_type") if isinstance(values, dict) else None
    if not isinstance(peft_type, str) or peft_type not in REGISTERED:
        raise AdapterFileError(
            f"{str(path)!r} is not the configuration of a peft_bsr adapter: its `peft_type` is {peft_type!r}, not "
            f"one of {', '.join(map(repr, sorted(REGISTERED)))}. {AGAIN}, or load it with PEFT."
        )
    known = {setting.name for setting in fields(config_class(peft_type))}
    check_settings(values, known, path)
    return values


def _without_patterns(values: dict[str, object]) -> list[str]:
    """Remove regular expressions if `layout` names what trains. Returns problems: other patterns, too long lists."""
    lists = {name: given for name, given in values.items() if isinstance(given, list) and name != "labels"}
    problems = [
        f"`{name}` has {len(given)} entries; at most {_LONGEST} are allowed."
        for name, given in lists.items()
        if len(given) > _LONGEST
    ]
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        given = values.get(name)
        if isinstance(given, str) and values.get("layout") and name != "modules_to_save":
            values[name] = None
        elif isinstance(given, str):
            problems.append(
                f"`{name}` is a regular expression, which is not accepted from a file. Use a list of names."
            )
        elif isinstance(given, list):
            texts = [text for text in given if isinstance(text, str)]
            odd = [text for text in texts if len(text) > _LONGEST or not _PLAIN_NAME.fullmatch(text)]
            problems += [f"`{name}` has {text[:80]!r}, which is not a module's name." for text in odd[:1]]
    return problems


def _remove_drafts(folder: Path) -> None:
    """Remove the drafts of processes of this machine that were killed during a save."""
    for draft in folder.glob(".saving-*"):
        host, _, number = draft.name.removeprefix(".saving-").rpartition("-")
        if host in ("", socket.gethostname()) and number.isdecimal() and not _is_running(int(number)):
            shutil.rmtree(draft, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # on Windows signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or not a process id
        return True
    return True


__all__ = ["AdapterFiles", "check_adapter", "check_file", "check_weights", "read_config"]
