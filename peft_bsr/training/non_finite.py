"""Stops a run at the first loss that is not finite, and saves the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import ModelOutput

from peft_bsr.errors import NonFiniteLossError
from peft_bsr.training.groups import trained_parameters
from peft_bsr.training.types import Batch


class NonFiniteLossCallback(TrainerCallback):
    """Raises at the first training loss that is NaN or infinite; Trainer itself would continue and not log that loss.

    The batch is saved in `non_finite_step_N.pt` (`torch.load` gives the model's keyword arguments). The message says
    whether the trained weights were still finite: if so, check the batch, otherwise the learning rate.

    The loss is the one that the model returns; without a loss, the logits are checked. If Trainer has a
    `compute_loss_func`, wrap it with `watch`. The check waits for the device once per step, as Trainer does.

    Args:
        folder: Folder for the batch; created if missing.

    Examples:
        >>> callback = NonFiniteLossCallback("out")  # Trainer(..., callbacks=[callback])
        >>> # Trainer(..., compute_loss_func=callback.watch(TrainingLoss()), callbacks=[callback])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._handles: list[RemovableHandle] = []
        self._inputs: Batch = {}
        self._is_watching = False
        self._model: nn.Module | None = None
        self._state: TrainerState | None = None
        self._rate = 0.0

    def watch(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap a loss function to check its results in training.

        Args:
            loss: Loss function for `compute_loss_func`, of (outputs, labels, num_items_in_batch).
        """
        self._is_watching = True

        def watched(outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
            result = loss(outputs, labels, num_items_in_batch=num_items_in_batch)
            if result.requires_grad and self._model is not None:  # in the run itself, not in a sweep before it
                self._check(result, {**self._inputs, "labels": labels})
            return result

        return watched

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Add hooks that record the model's inputs."""
        self._release()
        self._model, self._state = model, state
        self._handles = [
            model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **kwargs: object,
    ) -> None:
        """Record the learning rate for the message."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the hooks."""
        self._release()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[object, ...], kwargs: Batch) -> None:
        self._inputs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[object, ...], output: ModelOutput) -> None:
        if module.training and torch.is_grad_enabled() and not self._is_watching:
            value = output.get("loss") if isinstance(output, dict) else None
            self._check(output["logits"] if value is None else value, self._inputs)

    def _check(self, value: Tensor, batch: Batch) -> None:
        if bool(value.detach().isfinite().all()):
            return
        assert self._model is not None and self._state is not None, "hooks and state come together"
        step = self._state.global_step + 1
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"non_finite_step_{step}.pt"
        torch.save({name: t.detach().cpu() if isinstance(t, Tensor) else t for name, t in batch.items()}, path)
        broken = [n for n, p in trained_parameters(self._model).items() if not bool(p.detach().isfinite().all())]
        reason = (
            f"{len(broken)} trained tensors are not finite, {broken[0]!r} first: the previous steps were too large. "
            f"Lower the learning rate ({self._rate:.3g} in this step)"
            if broken
            else "The trained weights are finite: check this batch, or lower the learning rate "
            f"({self._rate:.3g} in this step) if the loss rose before"
        )
        self._release()
        raise NonFiniteLossError(f"the loss of step {step} is not finite. {reason}. The batch is saved in `{path}`.")

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs, self._model = [], {}, None


__all__ = ["NonFiniteLossCallback"]
