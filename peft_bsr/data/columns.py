"""Finding the column of images. If there are several candidates, a note or an error names them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Image, Value
from PIL import Image as PILImage

from peft_bsr.data.rows import some
from peft_bsr.errors import DatasetError

if TYPE_CHECKING:
    from datasets.features.features import FeatureType

IMAGE_NAMES = ("image", "images", "img", "file_name")
_LOOKED_AT = 100  # rows that decide what a column of strings holds


def image_column(rows: Dataset, wanted: str | None = None) -> tuple[str, str | None]:
    """The column of images, and a note if there were several.

    Args:
        rows: Images as `datasets.Image`, bytes, `{"bytes": ..., "path": ...}` or paths.
        wanted: `--image-column`. Default None: the only candidate, or the only one of `IMAGE_NAMES`.

    Raises:
        DatasetError: If there is none, or several.
    """
    if wanted is not None:
        return asked_column(rows, wanted, "--image-column"), None
    found = [name for name in rows.column_names if may_be_images(rows, name)]
    return one_column(rows, found, IMAGE_NAMES, "images", "--image-column")


def values_of(rows: Dataset, column: str) -> list[Any]:
    """All values of a column, without reading the others.

    Args:
        rows: The rows.
        column: Name of the column.
    """
    values: list[Any] = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return values


def as_images(rows: Dataset, column: str, root: Path | None) -> Dataset:
    """The rows with a column `image` of type `datasets.Image`.

    Args:
        rows: The rows.
        column: Name of the column of images, see `image_column`.
        root: Folder that its paths are relative to. Default None: the working directory.
    """
    if column != "image":
        rows = (rows.remove_columns("image") if "image" in rows.column_names else rows).rename_column(column, "image")
    feature = rows.features["image"]
    if isinstance(feature, Value) and "string" in feature.dtype:
        return _with_paths(rows, [_joined(root, path) for path in values_of(rows, "image")])
    if not isinstance(feature, Image):
        try:
            rows = rows.cast_column("image", Image())
        except (TypeError, ValueError, NotImplementedError) as error:
            raise DatasetError(
                f"the column `{column}` holds {kind_name(feature)}, not images or paths of images."
            ) from error
    stored = rows.cast_column("image", Image(decode=False)).with_format("arrow").select_columns(["image"])
    if root is None or not _has_relative_paths(stored):
        return rows
    return _with_paths(rows, [value and _joined(root, value["path"]) for value in values_of(stored, "image")])


def _with_paths(rows: Dataset, paths: Sequence[str | None]) -> Dataset:
    values = [{"bytes": None, "path": path} for path in paths]
    return rows.remove_columns("image").add_column("image", values, feature=Image())


def _has_relative_paths(stored: Dataset) -> bool:
    """Whether images are files with relative paths, judged by the first row that has an image."""
    for (value,) in (stored[i : i + 1]["image"].to_pylist() for i in range(len(stored))):
        if value and (value["bytes"] is not None or value["path"]):
            return value["bytes"] is None and not Path(value["path"]).is_absolute()
    return False


def _joined(root: Path | None, path: object) -> str | None:
    if not path:
        return None
    return str((root or Path()) / str(path).replace("\\", "/"))


def asked_column(rows: Dataset, wanted: str, option: str) -> str:
    """Check that a column exists, and return its name.

    Args:
        rows: The rows.
        wanted: Name of the column.
        option: Command-line option that set it, for the error.

    Raises:
        DatasetError: If there is no column of that name.
    """
    if wanted not in rows.column_names:
        close = difflib.get_close_matches(wanted, rows.column_names, 3) or rows.column_names
        raise DatasetError(f"`{option} {wanted}`: there is no column of this name. Did you mean {some(close)}?")
    return wanted


def one_column(
    rows: Dataset, found: list[str], names: Sequence[str], what: str, option: str, otherwise: str = ""
) -> tuple[str, str | None]:
    """The only candidate, or the only one with an expected name; and a note if there were several.

    Args:
        rows: The rows.
        found: Names of the candidates.
        names: Expected names.
        what: Content of the column, for messages.
        option: Command-line option that chooses the column.
        otherwise: Further advice for the error if there are several.

    Raises:
        DatasetError: If there is none, or several.
    """
    columns = some([f"{name} ({kind_name(feature)})" for name, feature in rows.features.items()])
    if not found:
        raise DatasetError(f"the columns are {columns}: none of them holds {what}. Choose one with `{option}`.")
    named = [name for name in found if name in names]
    taken = found[0] if len(found) == 1 else named[0] if len(named) == 1 else None
    if taken is None:
        raise DatasetError(f"several columns may hold {what}: {some(found)}. Choose one with `{option}`{otherwise}.")
    left = [name for name in found if name != taken]
    if left:
        return taken, f"{what} are the column `{taken}`, not {some(left)} (change it with `{option}`)"
    return taken, None if taken in names else f"{what} are the column `{taken}`"


def may_be_images(rows: Dataset, name: str) -> bool:
    """Whether a column holds images, bytes, or paths of images.

    Args:
        rows: The rows.
        name: Name of the column.
    """
    feature = rows.features[name]
    if isinstance(feature, Image):
        return True
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    if not isinstance(feature, Value):
        return False
    return "binary" in feature.dtype or ("string" in feature.dtype and _are_paths(_first(rows, name)))


def _are_paths(values: Sequence[str]) -> bool:
    PILImage.init()
    endings = PILImage.registered_extensions()
    return bool(values) and sum(PurePath(v).suffix.lower() in endings for v in values) > len(values) / 2


def _first(rows: Dataset, name: str) -> list[str]:
    values = values_of(rows.select(range(min(_LOOKED_AT, len(rows)))), name)
    return [value for value in values if value not in (None, "") and value == value]


def kind_name(feature: FeatureType) -> str:
    """The type of a column in one word: `int64`, `Image`.

    Args:
        feature: Feature of `datasets`.
    """
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


__all__ = [
    "IMAGE_NAMES",
    "as_images",
    "asked_column",
    "image_column",
    "kind_name",
    "may_be_images",
    "one_column",
    "values_of",
]
