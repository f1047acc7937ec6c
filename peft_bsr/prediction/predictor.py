"""A model to predict with: an adapter, a transformers model or an ONNX file, behind one interface."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from peft_bsr.backbones import in_mode, set_image_size
from peft_bsr.compat.transformers_api import read_image_processor
from peft_bsr.errors import HubError, MissingDependencyError, UsageError, headline
from peft_bsr.exporting import open_onnx, problem_type_of, processor_of
from peft_bsr.hub import fit_processor, load, load_image_processor, task_of
from peft_bsr.hub.files import ADAPTER, MODEL, list_files, place_of
from peft_bsr.problem_type import ProblemType

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BaseImageProcessor, PreTrainedModel


@dataclass(frozen=True)
class Predictor:
    """A model to predict with.

    Attributes:
        name: Name that was passed to `open_predictor`.
        labels: Names of its classes, or of its values, by index.
        problem_type: As in transformers' configurations.
        processor: A transformers image processor.
        run: Pixels [B, 3, H, W] -> logits or values [B, C], fp32, on the CPU.
        batch_size: The fixed batch size, or None for any.
    """

    name: str
    labels: list[str]
    problem_type: ProblemType
    processor: BaseImageProcessor
    run: Callable[[Tensor], Tensor]
    batch_size: int | None = None


def open_predictor(
    name: str | Path, *, base: str | Path | None = None, device: str | None = None, image_size: int | None = None
) -> Predictor:
    """Load a model to predict with.

    Args:
        name: Folder or Hub id of an adapter or a transformers model, or an `.onnx` file of `peft_bsr.export`.
        base: Base model of an adapter, see `peft_bsr.load`.
        device: `"cpu"`, `"cuda"`, `"mps"`. Default None: cuda, mps or cpu, the first one available; for an ONNX file
            cuda if onnxruntime has it, otherwise cpu.
        image_size: Side length in pixels, see `peft_bsr.set_image_size`. Default None: the size in training.

    Raises:
        ConfigError: If `image_size` does not fit the model.
        UnsupportedModelError: If the model cannot take images of `image_size`.
        HubError: If there is no such model, if it does not predict classes or values, or if it has no description of
            its preprocessing.
        MissingDependencyError: If onnxruntime is needed and not installed.
        UsageError: If there is no such device, or if an ONNX file has another image size.
    """
    if Path(name).suffix.lower() == ".onnx":
        return _open_onnx(Path(name).expanduser(), device, image_size)
    device = find_device(device)
    files = list_files(name)
    if ADAPTER in files:
        adapted = load(name, base=base, image_size=image_size)
        processor = at_size(load_image_processor(name, base=base), image_size)
        return to_predictor(adapted.to(device), processor, name=str(name))
    if MODEL not in files:
        raise HubError(f"`{name}` has neither {MODEL} nor {ADAPTER}: it is neither a model nor an adapter.")
    place = place_of(name)
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            place, output_loading_info=True, trust_remote_code=False
        )
        processor = read_image_processor(place)
    except (OSError, ValueError, ImportError) as error:
        raise HubError(f"`{name}` cannot be read as an image classifier ({headline(error)}).") from error
    if report["missing_keys"]:
        raise HubError(
            f"`{name}` lacks weights of {type(model).__name__}, such as {sorted(report['missing_keys'])[0]}: it was "
            "not trained as a classifier. Give an adapter or a trained classifier."
        )
    if image_size is not None:
        set_image_size(model, image_size)
    return to_predictor(model.to(device), at_size(processor, image_size), name=str(name))


def at_size(processor: BaseImageProcessor, image_size: int | None) -> BaseImageProcessor:
    """An image processor with the given image size.

    Args:
        processor: A transformers image processor. It is not changed.
        image_size: Side length in pixels. None: return `processor`.

    Raises:
        HubError: If it cannot make images of that size.
    """
    fitting = processor if image_size is None else fit_processor(processor, (3, image_size, image_size))
    if fitting is None:
        raise HubError(f"{type(processor).__name__} cannot resize images to {image_size} px. Do not pass a size.")
    return fitting


def to_predictor(
    model: PeftModel | PreTrainedModel, processor: BaseImageProcessor, *, name: str | None = None
) -> Predictor:
    """A predictor for a model in memory, in evaluation mode, on the model's device.

    Args:
        model: A `PeftModel` or a transformers model that predicts classes or values.
        processor: A transformers image processor.
        name: Name for messages. Default None: the model's class.

    Raises:
        HubError: If it does not predict classes or values.
    """
    name = name or type(model).__name__
    config: Any = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    if getattr(config, "attachment", None) is not None:
        task = task_of(config)
        if task.pipeline != "image-classification":
            raise HubError(f"`{name}` does not predict classes or values of images. {task.description}")

    def run(pixels: Tensor) -> Tensor:
        with in_mode(False, model), torch.no_grad():
            logits: Tensor = model(pixel_values=pixels.to(model.device, model.dtype)).logits
        return logits.float().cpu()

    settings = model.config
    labels = [str(settings.id2label[index]) for index in range(settings.num_labels)]
    return Predictor(name, labels, problem_type_of(settings), processor, run)


def find_device(asked: str | None) -> str:
    """The requested device, or the best available: cuda, mps or cpu.

    Args:
        asked: Name of the device. None: the best available.

    Raises:
        UsageError: If this machine has no such device.
    """
    there = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if asked not in (None, "cpu", there):
        raise UsageError(f"`device {asked}`: torch cannot use this device here. Use {there}.")
    return asked or there


def _open_onnx(path: Path, device: str | None, image_size: int | None) -> Predictor:
    if not path.is_file():
        raise HubError(f"There is no file `{path}`.")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError("ONNX files need onnxruntime. Run `pip install 'peft-bsr[export]'`.") from error
    providers = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and device in (None, "cuda"):
        providers = ["CUDAExecutionProvider", *providers]
    elif device not in (None, "cpu"):
        raise UsageError(
            f"`device {device}`: this onnxruntime runs on the CPU only. For cuda install `onnxruntime-gpu`."
        )
    try:
        session = open_onnx(path, providers)
    except Exception as error:  # of onnxruntime, no common class
        raise HubError(f"`{path}` cannot be read by onnxruntime ({headline(error)}).") from error
    outputs = {one.name: one.shape for one in session.get_outputs()}
    if "logits" not in outputs or len(outputs["logits"]) > 2:  # no head, or one value for each pixel or box
        raise HubError(f"`{path}` does not give classes or values of images; its outputs are {', '.join(outputs)}.")
    said = session.get_modelmeta().custom_metadata_map
    processor = processor_of(said)
    missing = [words for words, found in (("its classes", said.get("labels")), ("its images", processor)) if not found]
    if missing:
        raise HubError(
            f"`{path}` does not describe {' and '.join(missing)}. Write it again: `peft-bsr export ADAPTER`, or "
            "`peft_bsr.export(model, ..., image_processor=...)` with a model with classes (heads of `tasks` "
            "have no class names)."
        )
    (images,) = session.get_inputs()
    if image_size not in (None, *images.shape[-2:]):
        raise UsageError(
            f"`image_size {image_size}`: `{path}` takes images of {images.shape[-2]} x {images.shape[-1]} px only. "
            f"Export one for that size: `peft-bsr export ADAPTER --image-size {image_size}`."
        )
    fixed = images.shape[0] if isinstance(images.shape[0], int) else None

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {images.name: pixels.numpy()})[0])

    return Predictor(str(path), json.loads(said["labels"]), said["problem_type"], processor, run, fixed)


__all__ = ["Predictor", "at_size", "find_device", "open_predictor", "to_predictor"]
