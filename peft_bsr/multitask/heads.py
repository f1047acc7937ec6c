"""A head for each task instead of the classifier, and their losses.

Shapes: B images, b of them of one task, N tokens, P prefix tokens, D width, C outputs, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss

from peft_bsr.core import ForwardContext
from peft_bsr.errors import AdapterError, ForwardError
from peft_bsr.multitask.calls import ImageCall
from peft_bsr.multitask.config import IGNORED_LABEL, TaskConfig

IGNORED_CLASS = 255  # in labels of segmentation


class DenseHead(nn.Module):
    """Norm and a linear map on every patch of the last block.

    Args:
        norm: Initial LayerNorm of width D (the backbone's final norm), or None for a new one.
        width: D.
        num_outputs: C.
        num_prefix: P.
    """

    def __init__(self, norm: nn.LayerNorm | None, width: int, num_outputs: int, num_prefix: int) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.norm = nn.LayerNorm(width, eps=1e-6 if norm is None else norm.eps)
        for name, parameter in () if norm is None else list(norm.named_parameters()):
            setattr(self.norm, name, nn.Parameter(parameter.detach().clone()))
        self.linear = new_linear(width, num_outputs)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [b, N, D] of a grid (h, w) -> maps [b, C, h, w]."""
        rows, columns = grid
        patches = tokens[:, self.num_prefix : self.num_prefix + rows * columns]
        output: Tensor = self.linear(self.norm(patches.to(self.norm.weight.dtype)))
        return output.transpose(1, 2).unflatten(2, grid)


class TaskHeads(nn.Module):
    """Heads in the order of the tasks. They read the tasks of the batch from the current forward's call.

    Args:
        heads: One per task.
        tasks: The tasks.
        context: Shared with the controllers.
    """

    def __init__(self, heads: list[nn.Module], tasks: list[TaskConfig], context: ForwardContext) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.tasks = tasks
        self.context = context

    def forward(self, pooled: Tensor) -> dict[str, Tensor]:
        """Outputs of the tasks in the batch, by name.

        Heads without images in the batch get gradients of zero, so that no process of a distributed run waits for
        another, and a step does not depend on the number of processes.

        Args:
            pooled: [B, width], the input of the classifier.

        Raises:
            ForwardError: If it is called outside of the model's forward.
        """
        call = self.context.now.call
        if not isinstance(call, ImageCall):
            raise ForwardError("a task head was called outside of the model's forward. Call the model.")
        outputs: dict[str, Tensor] = {}
        unused: list[Tensor] = [p for i, head in enumerate(self.heads) if i not in call.rows for p in head.parameters()]
        for index, rows in call.rows.items():
            task, head = self.tasks[index], self.heads[index]
            source = call.tokens if task.is_dense else pooled
            assert source is not None, "the last block leaves its tokens where a task is dense"
            part = source if rows is None else source.index_select(0, rows.to(source.device))
            outputs[task.name] = head(part, call.grid) if task.is_dense else head(part)
        if torch.is_grad_enabled() and self.training:
            if all(self.tasks[index].is_dense for index in call.rows):
                unused.append(pooled)
            first = next(iter(outputs))
            for tensor in unused:
                outputs[first] = outputs[first] + (tensor * 0).sum().to(outputs[first].dtype)
        return outputs


def new_head(task: TaskConfig, in_features: int, width: int, norm: nn.LayerNorm | None, num_prefix: int) -> nn.Module:
    """A new head with weights N(0, .02) and biases 0.

    Args:
        task: The task.
        in_features: Input width of the classifier.
        width: D.
        norm: The backbone's final norm, for dense heads.
        num_prefix: P.
    """
    if task.is_dense:
        return DenseHead(norm, width, task.num_outputs, num_prefix)
    return new_linear(in_features, task.num_outputs)


def new_linear(in_features: int, out_features: int) -> nn.Linear:
    """A Linear with weights N(0, .02) and biases 0."""
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def task_loss(task: TaskConfig, output: Tensor, labels: Tensor | Sequence[Any]) -> Tensor:
    """Mean loss of one task's part of the batch: cross-entropy, or the squared error.

    Maps are scaled to the size of the labels (bilinear). Without a single valid label the loss is 0.

    Args:
        task: The task.
        output: [b, C], or [b, C, h, w] for dense tasks.
        labels: See `TaskConfig`; a tensor, or one entry per image.

    Raises:
        AdapterError: If the number of labels is not the number of images, or their shapes differ.
    """
    if isinstance(labels, (list, tuple)):
        entries = [torch.as_tensor(label) for label in labels]
        if len(shapes := {tuple(entry.shape) for entry in entries}) > 1:
            raise AdapterError(f"`labels` of task {task.name!r} have the shapes {sorted(shapes)}; give them one.")
        labels = torch.stack(entries) if entries else torch.empty(0)
    labels = torch.as_tensor(labels).to(output.device, non_blocking=True)
    if labels.ndim == 0 or len(labels) != len(output):
        raise AdapterError(
            f"Task {task.name!r} has {len(output)} images in this batch, but `labels` for it have the shape "
            f"{tuple(labels.shape)}. Give one label per image; with several tasks, a tensor over the whole batch, or a "
            "dict of task -> labels."
        )
    output = output.float()
    if task.is_dense:
        output = interpolate(output, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    if task.kind in ("classification", "segmentation"):
        ignored = IGNORED_CLASS if task.is_dense else IGNORED_LABEL
        loss = cross_entropy(output, labels.long(), ignore_index=ignored, reduction="sum")
        return loss / (labels != ignored).sum().clamp_min(1)
    target = labels.to(output.dtype).reshape(output.shape)
    valid = target.isfinite()
    target = torch.where(valid, target, output.detach())  # no error; selecting the valid ones would make the host wait
    return mse_loss(output, target, reduction="sum") / valid.sum().clamp_min(1)


__all__ = ["IGNORED_CLASS", "DenseHead", "TaskHeads", "new_head", "new_linear", "task_loss"]
