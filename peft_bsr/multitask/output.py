"""Output of a model with tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from peft_bsr.errors import AdapterError
from peft_bsr.multitask.calls import ImageCall
from peft_bsr.multitask.config import TaskConfig
from peft_bsr.multitask.heads import task_loss


@dataclass
class MultitaskOutput(ModelOutput):
    """Output of a model with tasks.

    Attributes:
        loss: Mean over the images of their task's weight times its loss, plus the weighted balance loss; with labels.
        logits: Output of the batch's task, [B, C] or [B, C, h, w]; for several tasks, name -> output of its images.
        task_losses: Name -> unweighted loss, for several tasks.
        rows: Name -> indices of its images in the batch, [b] int64, for several tasks.
        hidden_states: The model's hidden states, with `output_hidden_states=True`.
        attentions: The model's attention weights, with `output_attentions=True`.

    `task` is the task or the list of tasks of the batch: a plain attribute, not a key, because it is not a tensor.
    """

    loss: Tensor | None = None
    logits: Tensor | dict[str, Tensor] | None = None
    task_losses: dict[str, Tensor] | None = None
    rows: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def collect_output(
    tasks: Sequence[TaskConfig],
    weights: Mapping[str, float],
    balance_weight: float,
    call: ImageCall,
    stock: ModelOutput | tuple[dict[str, Tensor], ...],
) -> MultitaskOutput:
    """Build the output at the end of a forward.

    Args:
        tasks: Tasks of the adapter.
        weights: Name -> weight of its loss, 1 if missing.
        balance_weight: Weight of the balance loss.
        call: Tasks and labels of the forward.
        stock: The model's output, with the heads' outputs by name as logits.

    Raises:
        AdapterError: If labels do not fit, or the balance loss would have no gradient.
    """
    values = stock[0] if isinstance(stock, tuple) else stock
    outputs: dict[str, Tensor] = getattr(values, "logits", values)
    present = {tasks[index].name: rows for index, rows in call.rows.items()}
    result = MultitaskOutput(
        hidden_states=getattr(stock, "hidden_states", None), attentions=getattr(stock, "attentions", None)
    )
    losses = _losses(tasks, call, outputs)
    if losses:
        batch = sum(len(outputs[name]) for name in losses)
        parts = [weights.get(name, 1.0) * len(outputs[name]) / batch * loss for name, loss in losses.items()]
        parts += [balance_weight * _balance(call)] if call.balance else []
        result["loss"] = call.share_of_step() * torch.stack(parts).sum()
    result["logits"] = outputs if len(present) > 1 else next(iter(outputs.values()))
    if len(present) > 1:
        result["rows"] = {name: rows for name, rows in present.items() if rows is not None}
        if losses:
            result["task_losses"] = {name: loss.detach() for name, loss in losses.items()}
    result.task = list(present) if len(present) > 1 else next(iter(present))
    return result


def _losses(tasks: Sequence[TaskConfig], call: ImageCall, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if call.labels is None:
        return {}
    losses, missing = {}, []
    for index in call.rows:
        labels = call.labels_of(tasks[index], index)
        if labels is None:
            missing.append(tasks[index].name)
        else:
            losses[tasks[index].name] = task_loss(tasks[index], outputs[tasks[index].name], labels)
    if missing:
        raise AdapterError(f"`labels` have the tasks {sorted(call.labels)}, but the batch has images of {missing} too.")
    return losses


def _balance(call: ImageCall) -> Tensor:
    balance = torch.stack(list(call.balance.values())).mean()
    if torch.is_grad_enabled() and not balance.requires_grad:
        raise AdapterError(
            "`balance_weight` adds a loss on the gates, but reentrant gradient checkpointing runs the blocks "
            'without a graph. Use `gradient_checkpointing_kwargs={"use_reentrant": False}`, or `balance_weight=0`.'
        )
    return balance


__all__ = ["MultitaskOutput", "collect_output"]
