"""An adapter's preprocessing: its image processor, at the image size of its model, and a pipeline with it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import AutoFeatureExtractor

from peft_bsr.compat.transformers_api import read_image_processor, source_of
from peft_bsr.errors import HubError, headline
from peft_bsr.hub.files import PROCESSOR, place_of
from peft_bsr.hub.loading import load, read_config
from peft_bsr.hub.task import task_of
from peft_bsr.tuners.base.base_model import changed_settings
from peft_bsr.tuners.base.config import SavedConfig

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


def load_image_processor(
    name: str | Path, *, base: str | Path | None = None, revision: str | None = None, token: str | bool | None = None
) -> BaseImageProcessor:
    """The image processor saved with an adapter, or its base model's, for the image size that the adapter stores.

    Args:
        name: See `load`.
        base: See `load`.
        revision: See `load`.
        token: See `load`.

    Raises:
        HubError: If neither has one.
    """
    config = read_config(name, revision=revision, token=token)
    found: BaseImageProcessor = _load(read_image_processor, "image processor", config, name, base, revision, token)
    return _fitted(found, getattr(config, "base_config", None))


def find_image_processor(model: PeftModel) -> tuple[BaseImageProcessor, str] | tuple[None, None]:
    """The image processor of a loaded model, for its image size, and its origin as text. Only local files are read.

    Args:
        model: A `PeftModel`. The processor is the one saved with its active adapter, if `load` loaded it, or its base
            model's.

    Returns:
        The processor and its origin, or (None, None) if there is none on this machine.
    """
    config = model.peft_config[model.active_adapter]
    attached = getattr(config, "attachment", None)
    sources = {
        "saved with the adapter": getattr(config, "place", None),
        "the base model's own": source_of(model.config),
    }
    for words, source in sources.items():
        if source:
            with suppress(OSError, ValueError, ImportError):
                found = read_image_processor(source, local_files_only=True)
                if attached is not None and attached.own is not None:
                    found = _fitted(found, changed_settings(attached.config, attached.own))
                return found, f"{words}: {source}"
    return None, None


def keep_image_processor(config: SavedConfig, folder: Path) -> None:
    """Copy the image processor of a loaded adapter to where it is saved, unless there is one.

    It runs whenever one of our adapters is saved. Without it, the new copy would be used with the base model's.

    Args:
        config: Configuration of an attached adapter.
        folder: Folder of the saved adapter.
    """
    if config.place is None or (folder / PROCESSOR).exists():
        return
    before = Path(config.place, PROCESSOR)
    if before.is_file():
        shutil.copyfile(before, folder / PROCESSOR)


def fit_processor(processor: BaseImageProcessor, shape: Sequence[int]) -> BaseImageProcessor | None:
    """The processor, if it makes images of that shape, otherwise a copy that resizes whole images to it.

    Args:
        processor: A transformers image processor. It is not changed.
        shape: (channels, height, width).

    Returns:
        The processor or its copy; None if it cannot make images of that shape.
    """
    if _made_by(processor) == tuple(shape):
        return processor
    squeezing = copy.deepcopy(processor)
    squeezing.do_resize, squeezing.do_center_crop = True, False
    squeezing.size = {"height": int(shape[-2]), "width": int(shape[-1])}
    return squeezing if _made_by(squeezing) == tuple(shape) else None


def pipeline(
    name: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype | str | None = None,
    **settings: object,
) -> transformers.Pipeline:
    """A transformers pipeline for an adapter, with its task, model and processor.

    Args:
        name: See `load`.
        base: See `load`.
        revision: See `load`.
        token: See `load`.
        dtype: See `load`.
        settings: Further arguments of `transformers.pipeline`, such as `device` and `batch_size`.

    Returns:
        For example an `ImageClassificationPipeline`: call it with images, paths or URLs. For a regression model,
        `score` is the value.

    Raises:
        HubError: As `load`, and if transformers has no pipeline for the model.

    Examples:
        >>> pipeline("me/pets-bsr")("cat.jpg", top_k=1)  # doctest: +SKIP
        [{'label': 'Abyssinian', 'score': 0.98}]
    """
    model = load(name, base=base, revision=revision, token=token, dtype=dtype)
    task = task_of(model.peft_config[model.active_adapter])
    if task.pipeline is None:
        raise HubError(f"There is no pipeline for `{name}`: {task.description} Call the model of `peft_bsr.load`.")
    if task.is_regression:
        settings.setdefault("function_to_apply", "none")
    kind = "feature_extractor" if task.pipeline.startswith("audio") else "image_processor"
    if kind not in settings:
        place: dict[str, Any] = {"base": base, "revision": revision, "token": token}
        is_image = kind == "image_processor"
        settings[kind] = load_image_processor(name, **place) if is_image else _load_feature_extractor(name, **place)
    return transformers.pipeline(task.pipeline, model=model.get_base_model(), **settings)


def _load_feature_extractor(
    name: str | Path, *, base: str | Path | None, revision: str | None, token: str | bool | None
) -> object:
    config = read_config(name, revision=revision, token=token)
    return _load(_read_feature_extractor, "feature extractor", config, name, base, revision, token)


def _read_feature_extractor(source: str, **place: Any) -> object:
    return AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False, **place)


def _load(
    read: Callable[..., Any],
    kind: str,
    config: PeftConfig,
    name: str | Path,
    base: str | Path | None,
    revision: str | None,
    token: str | bool | None,
) -> Any:
    """What is saved with the adapter, or with its base model."""
    own = str(base or config.base_model_name_or_path)
    problems = []
    for source, version in ((str(name), revision), (own, None if base else config.revision)):
        try:
            return read(place_of(source), revision=version, token=token)
        except (OSError, ValueError, ImportError) as error:
            problems.append(headline(error))
    raise HubError(
        f"Neither `{name}` nor its base model `{own}` has the {kind} that is needed ({'; '.join(problems)}). Save the "
        "one of the training in the adapter's folder, with its `save_pretrained`."
        + (f" `peft_bsr.data.load_processor({own!r})` makes the one of `peft-bsr train`." if "image" in kind else "")
    )


def _fitted(processor: BaseImageProcessor, changes: Mapping[str, Any] | None) -> BaseImageProcessor:
    """The processor, for the image size among changed settings of the model, if there is one."""
    size = _size_in(changes or {})
    return (size and fit_processor(processor, (3, *size))) or processor


def _made_by(processor: BaseImageProcessor) -> tuple[int, ...]:
    """Shape of a processor's output for a landscape image; empty if it fails."""
    from PIL import Image

    try:
        return tuple(processor(Image.new("RGB", (60, 40)), return_tensors="pt")["pixel_values"].shape[1:])
    except (AttributeError, KeyError, TypeError, ValueError):
        return ()


def _size_in(changes: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) among changed settings of a model or of a part of it."""
    size = changes.get("image_size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, list) and len(size) == 2:
        return size[0], size[1]
    return next((found for part in changes.values() if isinstance(part, Mapping) and (found := _size_in(part))), None)


__all__ = [
    "find_image_processor",
    "fit_processor",
    "keep_image_processor",
    "load_image_processor",
    "pipeline",
]
