"""Digests of an adapter's settings and weights, which show whether its two files were saved together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft_bsr.errors import AdapterFileError

_NOT_COUNTED = {"auto_mapping", "base_model_name_or_path", "digests", "inference_mode", "peft_version", "revision"}
_CHUNK = 2**20


def settings_digest(values: Mapping[str, object]) -> str:
    """Digest of `adapter_config.json`, without the path of the base model and what PEFT itself writes.

    Args:
        values: Contents of the file.
    """
    counted = {name: value for name, value in values.items() if name not in _NOT_COUNTED}
    return hashlib.blake2b(json.dumps(counted, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def with_digests(values: Mapping[str, object], weights: Path) -> dict[str, Any]:
    """Add the digests of the settings, and of the weights if the file exists.

    Args:
        values: Contents of `adapter_config.json`.
        weights: The file with the weights.
    """
    digests = {"settings": settings_digest(values)}
    if weights.is_file():
        digests["weights"] = file_digest(weights)
    return {**values, "digests": digests}


def check_settings(values: Mapping[str, object], known: Collection[str], path: Path) -> None:
    """Raise if the settings differ from those that were saved. Files of earlier versions have no digest.

    Args:
        values: Contents of the file.
        known: Names of the settings in this version; others are ignored.
        path: The file.

    Raises:
        AdapterFileError: If they differ.
    """
    digests = values.get("digests")
    if digests is None:
        return
    read = {name: value for name, value in values.items() if name in known}
    found = {settings_digest(values), settings_digest(read)}
    if not isinstance(digests, dict) or digests.get("settings") not in found:
        raise AdapterFileError(
            f"{str(path)!r} was changed after it was saved: its settings do not match `digests`. The file is damaged; "
            "use another checkpoint, or download it again. If you changed it yourself, remove `digests`."
        )


def check_weights_belong(digests: Mapping[str, str] | None, path: Path) -> None:
    """Raise if the weights were not saved together with the settings.

    Args:
        digests: `digests` of the settings, or None.
        path: The file with the weights.

    Raises:
        AdapterFileError: If they differ.
    """
    expected = (digests or {}).get("weights")
    if expected is not None and file_digest(path) != expected:
        raise AdapterFileError(
            f"{str(path)!r} was not saved together with the adapter_config.json next to it: a save was interrupted, "
            "two processes saved to one folder, or the file is damaged. Use another checkpoint, or save or download it "
            "again. If you changed it yourself, remove `digests` from adapter_config.json."
        )


__all__ = ["check_settings", "check_weights_belong", "file_digest", "settings_digest", "with_digests"]
