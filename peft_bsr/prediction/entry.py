"""`predict`: predictions for images in one call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from peft_bsr.errors import DatasetError, InputError, MissingDependencyError, UnreadableImageWarning
from peft_bsr.hub import find_image_processor
from peft_bsr.prediction.answers import THRESHOLD, Prediction, to_prediction
from peft_bsr.prediction.predictor import Predictor, open_predictor, to_predictor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BaseImageProcessor, PreTrainedModel

    from peft_bsr.prediction.images import Images

_NAMED = 10  # files in a message


def predict(
    model: str | Path | PeftModel | PreTrainedModel,
    images: Images,
    *,
    top_k: int | None = 1,
    threshold: float = THRESHOLD,
    batch_size: int = 32,
    workers: int | None = None,
    device: str | None = None,
    base: str | Path | None = None,
    image_processor: BaseImageProcessor | None = None,
    progress: bool = False,
) -> list[Prediction]:
    """Predict classes, several labels, or values of images.

    Args:
        model: Folder or Hub id of an adapter or a transformers model, an `.onnx` file of `peft_bsr.export`, or a model
            in memory, which runs on its device.
        images: A file, a folder (all images in it, at any depth), a table or a dataset by name, a Pillow image, a list
            of files, folders or images, or a `datasets.Dataset` with a column `image`.
        top_k: Number of most probable classes. Default 1; None: all, also for several labels.
        threshold: Probability from which a label is predicted, for several labels. Default 0.5.
        batch_size: Images per forward. Default 32.
        workers: Number of processes that read images. Default None: 0 without a GPU, otherwise at most 4.
        device: `"cpu"`, `"cuda"`, `"mps"`. Default None: the best available.
        base: Base model of an adapter, if the one it names cannot be read.
        image_processor: A transformers image processor, for a model in memory. Default None: the one saved with the
            adapter, if `peft_bsr.load` loaded it, or the base model's own, if its files are on this machine.
        progress: Whether to show a progress bar.

    Returns:
        One prediction per image, in order. Those of images that cannot be read have an `error`, and a warning gives
        their number.

    Raises:
        DatasetError: If there are no images, or if none of them can be read.
        HubError: If there is no such model, or if it does not predict classes or values.
        InputError: If a model in memory has no image processor.

    Examples:
        >>> predict("outputs/train/adapter", "photos")  # doctest: +SKIP
        [Prediction(file='photos/a.jpg', labels=('daisy',), classes=(0,), probabilities=(0.98,), values=(), error=None)]
    """
    try:
        from peft_bsr.prediction.images import outputs_of, read_rows, row_name
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"`predict` reads images with `{error.name}`, which is not installed. Run `pip install 'peft-bsr[cli]'`."
        ) from error
    if top_k is not None and top_k < 1:
        raise InputError(f"`top_k={top_k}` must be at least 1, or None for all.")
    rows = read_rows(images)
    predictor = (
        open_predictor(model, base=base, device=device)
        if isinstance(model, (str, Path))
        else _in_memory(model, image_processor, device)
    )
    outputs = outputs_of(predictor, rows, batch_size=batch_size, workers=workers, progress=progress)
    found = [
        to_prediction(predictor, row_name(rows, index), one, top_k=top_k, threshold=threshold)
        for index, one in enumerate(outputs)
    ]
    bad = [one for one in found if one.error is not None]
    if bad:
        named = "; ".join(f"{one.file} ({one.error})" for one in bad[:_NAMED]) + "; ..." * (len(bad) > _NAMED)
        if len(bad) == len(found):
            raise DatasetError(f"None of the {len(found)} images can be read: {named}")
        warnings.warn(
            f"{len(bad)} of {len(found)} images cannot be read: {named}", UnreadableImageWarning, stacklevel=2
        )
    return found


def _in_memory(
    model: PeftModel | PreTrainedModel, processor: BaseImageProcessor | None, device: str | None
) -> Predictor:
    if device is not None:
        raise InputError(f"`device={device!r}`: a model in memory stays on its device. Use `model.to({device!r})`.")
    if processor is None and hasattr(model, "peft_config"):
        processor, _ = find_image_processor(model)
    if processor is None:
        raise InputError(f"{type(model).__name__} in memory has no image processor. Pass `image_processor=`.")
    return to_predictor(model, processor)


__all__ = ["predict"]
