"""The tasks and labels of a forward, read from its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_bsr.backbones import ModelSpec
from peft_bsr.core import TaskCall
from peft_bsr.errors import AdapterError
from peft_bsr.multitask.config import IGNORED_LABEL, TaskConfig

_OWN = ("task", "task_ids")  # keyword arguments that the model itself does not take


@dataclass(eq=False)
class ImageCall(TaskCall):
    """A call on images.

    Attributes:
        rows: Index of each task in the batch -> indices of its images, [b] int64 on the images' device; None: all.
        places: The same as Python numbers.
        labels: Labels as they were passed.
        num_items: Trainer's number of label items in all batches of an accumulated step, if it was passed.
        grid: (rows, columns) of the images' patches, if the model has such a grid.
    """

    rows: dict[int, Tensor | None] = field(default_factory=dict)
    places: dict[int, list[int]] = field(default_factory=dict)
    labels: Any = None
    num_items: Tensor | int | None = None
    grid: tuple[int, int] | None = None

    def labels_of(self, task: TaskConfig, index: int) -> Tensor | Sequence[Any] | None:
        """Labels of a task, given by its index among the adapter's tasks; None if there are none."""
        labels, rows = self.labels, self.rows[index]
        if isinstance(labels, dict):
            return labels.get(task.name)
        if labels is None or rows is None:
            return labels
        if isinstance(labels, Tensor) and labels.device == rows.device:
            return labels.index_select(0, rows)
        return [labels[place] for place in self.places[index]]

    def share_of_step(self) -> Tensor | float:
        """Share of the batch in the loss of a step: below 1 if the step accumulates the gradients of several batches.

        Trainer counts the labels of all of them that are not -100.
        """
        if self.num_items is None or not isinstance(self.labels, Tensor):
            return 1.0
        return (self.labels != IGNORED_LABEL).sum() / self.num_items


def without_tasks(kwargs: dict[str, object]) -> dict[str, object]:
    """The keyword arguments without `task` and `task_ids`."""
    return {name: value for name, value in kwargs.items() if name not in _OWN}


def read_call(
    tasks: Sequence[TaskConfig],
    spec: ModelSpec,
    args: tuple[object, ...],
    kwargs: dict[str, Any],
    num_images: int | None = None,
) -> tuple[ImageCall, dict[str, object]]:
    """The tasks and labels of a call, and the keyword arguments for the model itself.

    Args:
        tasks: Tasks of the adapter.
        spec: Description of the model.
        args: Positional arguments of the call.
        kwargs: Keyword arguments; `task` (a name, or one per image), `task_ids` (indices [B]), `labels` and Trainer's
            `num_items_in_batch` are removed.
        num_images: Number of images in cached tokens, if the forward starts from a cache. Default None: that of the
            call.

    Raises:
        AdapterError: If no task or an unknown task is named.
    """
    taken = (*_OWN, "labels", "num_items_in_batch")
    left = {name: value for name, value in kwargs.items() if name not in taken}
    images = next((v for v in (*args, *left.values()) if isinstance(v, Tensor) and v.ndim > 1), None)
    assert images is not None, "a vision model is called with images"
    asked = _indices(tasks, kwargs.get("task"), kwargs.get("task_ids"), num_images or images.shape[0])
    if len(set(asked)) == 1:
        call = ImageCall(asked[0], rows={asked[0]: None})
    else:
        places = {i: [place for place, task in enumerate(asked) if task == i] for i in sorted(set(asked))}
        numbers = torch.tensor([asked, [place for own in places.values() for place in own]])
        ids, order = numbers.to(images.device, non_blocking=True).unbind()  # one copy, for which nothing waits
        rows = order.split([len(own) for own in places.values()])
        call = ImageCall(ids, rows=dict(zip(places, rows, strict=True)), places=places)
    call.labels, call.num_items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    call.keeps_tokens = any(tasks[index].is_dense for index in call.rows)
    if spec.grid is not None and len(spec.grid) == 2 and images.ndim == 4:
        call.grid = spec.grid_at(*images.shape[2:])
    return call, left


def _indices(
    tasks: Sequence[TaskConfig],
    task: str | Sequence[str] | None,
    task_ids: Tensor | Sequence[int] | int | None,
    batch: int,
) -> list[int]:
    names = [t.name for t in tasks]
    if task is not None and task_ids is not None:
        raise AdapterError(f"`task={task!r}` and `task_ids` were both given. Give one of them.")
    if task is None and task_ids is None:
        if len(tasks) == 1:
            return [0]
        raise AdapterError(
            f"No task was given, but this adapter has several: {names}. Call the model with `task={names[0]!r}`, or "
            "with `task_ids`, the index of each image's task in this list."
        )
    if isinstance(task, str):
        asked: list[Any] = [task]
    elif task is not None:
        asked = list(task)
    else:
        given = task_ids.tolist() if isinstance(task_ids, Tensor) else task_ids
        asked = list(given) if isinstance(given, (list, tuple)) else [given]
    if unknown := sorted({repr(a) for a in asked if a not in (names if task is not None else range(len(names)))}):
        what = "`task`" if task is not None else "`task_ids`"
        raise AdapterError(
            f"{what} has {', '.join(unknown)}, but the tasks of this adapter are {names}"
            + ("." if task is not None else f" (0 to {len(names) - 1}).")
        )
    is_whole_batch = isinstance(task, str) or (task_ids is not None and not isinstance(given, (list, tuple)))
    if not is_whole_batch and len(asked) != batch:
        raise AdapterError(f"{len(asked)} tasks were given for {batch} images. Give one, or one per image.")
    return [names.index(a) if task is not None else int(a) for a in asked]


__all__ = ["ImageCall", "read_call", "without_tasks"]
