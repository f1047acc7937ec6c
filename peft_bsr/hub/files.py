"""Files of a folder or repository, listed with one request instead of a download that retries for a minute."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from peft_bsr.errors import HubError, headline

ADAPTER, MODEL, PROCESSOR = "adapter_config.json", "config.json", "preprocessor_config.json"
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
    return cached or _request_files(name, revision, token)


def folder_read(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> str:
    """The folder from which an adapter was read, with its image processor if it has one.

    Args:
        name: Folder or Hub id of an adapter that was just loaded.
        revision: See `list_files`.
        token: See `list_files`.

    Returns:
        The folder itself, or the repository's snapshot in the cache, to which `PROCESSOR` of the same commit is
        downloaded. Without a network it stays as it is.
    """
    folder = Path(name).expanduser()
    read = None if folder.is_dir() else try_to_load_from_cache(str(name), ADAPTER, revision=revision)
    if not isinstance(read, str):
        return str(folder)
    name, snapshot = str(name), Path(read).parent
    if try_to_load_from_cache(name, PROCESSOR, revision=snapshot.name) is None:  # neither there nor known to be missing
        with suppress(HubError, OSError):  # no network, or a cache that cannot be written
            if PROCESSOR in _request_files(name, snapshot.name, token):
                hf_hub_download(name, PROCESSOR, revision=snapshot.name, token=token)
    return str(snapshot)


def place_of(name: str | Path) -> str:
    """A folder with its `~` resolved, or the id.

    Args:
        name: Folder or Hub id.
    """
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else str(name)


def _request_files(name: str, revision: str | None, token: str | bool | None) -> set[str]:
    try:
        info = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT, token=token)
    except Exception as error:  # the Hub's and the HTTP library's own errors
        raise HubError(
            f"`{name}` is not a local folder{_close(Path(name))}, and cannot be read from the Hub ({headline(error)})."
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


__all__ = ["ADAPTER", "MODEL", "PROCESSOR", "folder_read", "list_files", "place_of"]
