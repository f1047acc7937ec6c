"""The task of a model, as in transformers' pipelines and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_bsr.compat.transformers_api import class_names_of_task
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION
from peft_bsr.tuners.base.config import SavedConfig

_TASKS = [f"{kind}-classification" for kind in ("image", "video", "audio")]
_TASKS += ["image-segmentation", "depth-estimation", "object-detection", "image-feature-extraction"]
_INPUTS = {"video": "clip.mp4", "audio": "sound.wav"}
_NAMED = 20  # maximum number of classes on a card


@dataclass(frozen=True)
class Task:
    """The task of an adapter's model.

    Attributes:
        pipeline: Name of transformers' pipeline, or None if there is none.
        is_regression: Whether its outputs are values, not class scores.
        description: The task in one sentence.
    """

    pipeline: str | None
    is_regression: bool
    description: str

    @property
    def tag(self) -> str | None:
        """`pipeline_tag` on the Hub, which has none for regression."""
        return None if self.is_regression else self.pipeline

    @property
    def example(self) -> str:
        """Name of a file as an example input of the pipeline."""
        return _INPUTS.get((self.pipeline or "").partition("-")[0], "image.jpg")


def task_of(config: SavedConfig) -> Task:
    """The task of an attached adapter.

    Args:
        config: Configuration of an attached adapter.
    """
    attachment = config.attachment
    assert attachment is not None, "the configuration of an attached adapter"
    named = getattr(config, "tasks", None)
    if named:
        return Task(None, False, f"Several tasks with a head each: {', '.join(task.name for task in named)}.")
    if config.part is not None:
        return Task(None, False, f"For `{config.part}`, a part of the model.")
    name = _pipeline_of(attachment.classes)
    if name is None or (name == "image-feature-extraction" and len(attachment.spec.image_shape) != 3):
        return Task(None, False, f"`{attachment.classes[0]}`, for which transformers has no pipeline.")
    if not name.endswith("classification") or config.labels is None:
        return Task(name, False, f"{name.replace('-', ' ').capitalize()}.")
    kind, labels = name.partition("-")[0], config.labels
    shown = ", ".join(labels[:_NAMED]) + (", ..." if len(labels) > _NAMED else "")
    if attachment.problem_type == MULTI_LABEL:
        plural = "s" if len(labels) > 1 else ""
        labels_text = f"{len(labels)} label{plural}, each by itself (sigmoid): {shown}"
        description = f"Multi-label {kind} classification, {labels_text}."
        return Task(name, False, description)
    if attachment.problem_type == REGRESSION or len(labels) == 1:
        plural = "s" if len(labels) > 1 else ""
        return Task(name, True, f"{kind.capitalize()} regression, {len(labels)} value{plural}: {shown}.")
    return Task(name, False, f"{kind.capitalize()} classification, {len(labels)} classes: {shown}.")


def _pipeline_of(classes: Sequence[str]) -> str | None:
    """The first pipeline whose auto classes contain one of `classes`, a model's class and its bases."""
    for task in _TASKS:
        if class_names_of_task(task) & set(classes):
            return task
    return None


__all__ = ["Task", "task_of"]
