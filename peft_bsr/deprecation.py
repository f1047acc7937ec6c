"""Old public names, kept for one release with a `DeprecationWarning`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any


def renamed(module: str, names: dict[str, str], namespace: dict[str, Any]) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds a renamed object by its old name.

    Args:
        module: Name of the module.
        names: Old name -> new name.
        namespace: The module's `globals()`.
    """

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return namespace[names[name]]

    return find


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is now called `new`."""
    warnings.warn(
        f"`{old}` is now called `{new}`; the old name is removed in 0.2.",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


__all__ = ["renamed", "warn_renamed"]
