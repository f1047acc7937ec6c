"""Listing the files of a folder or repository, with one request instead of a download that retries for a minute."""

from __future__ import annotations

import difflib
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache

from peft_bsr.errors import HubError, headline

ADAPTER, MODEL = "adapter_config.json", "config.json"
_TIMEOUT = 5.0  # seconds


def list_files(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> set[str]:
    """Names of the files of a folder or of a repository on the Hub.

    Args:
        name: Folder or Hub id.
        revision: Revision of the repository. Default None: its main branch.
        token: Token for private repositories. Default None: the one of `hf auth login`.

    Returns:
        The names. For a repository in the cache, only `ADAPTER` and `MODEL` if they are cached: no request is sent.

    Raises:
        HubError: If there is no such folder or repository, or if the Hub does not answer within 5 seconds.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return {path.name for path in folder.iterdir()}
    name = str(name)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise HubError(f"there is no folder `{name}`{_close(folder)}. A Hub repository is named `owner/name`.")
    cached = {f for f in (ADAPTER, MODEL) if isinstance(try_to_load_from_cache(name, f, revision=revision), str)}
    if cached:
        return cached
    try:
        info = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT, token=token)
    except Exception as error:  # the Hub's and the HTTP library's own errors
        raise HubError(
            f"`{name}` is not a local folder{_close(folder)}, and cannot be read from the Hub ({headline(error)})."
        ) from error
    return {file.rfilename for file in info.siblings or ()}


def _close(folder: Path) -> str:
    """Folders next to it with similar names."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(folder.name, names)
    return f" (close: {', '.join(f'`{folder.with_name(name)}`' for name in close)})" if close else ""


__all__ = ["ADAPTER", "MODEL", "list_files"]
