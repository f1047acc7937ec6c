"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_bsr.errors import AdapterFileError, ConfigError
from peft_bsr.training.groups import trained_parameters

FILE = "trained_weights.safetensors"
"""File in a Trainer checkpoint, next to the averaged adapter, with the unaveraged weights of the optimizer."""


class EMAState(TypedDict):
    """State of a `TrainedEMA`.

    Attributes:
        updates: Number of updates.
        averages: Name -> float32 tensor.
    """

    updates: int
    averages: dict[str, Tensor]


class TrainedEMA(TrainerCallback):
    """Keeps a moving average of the trained weights in float32, without the frozen ones.

    After each optimizer step, `average = decay * average + (1 - decay) * weights`, where the decay of step t is at most
    `(1 + t) / (10 + t)`, so that short runs forget their initial weights.

    As a Trainer callback it needs nothing else: evaluation, checkpoints and the final model use the average; the
    optimizer's weights are restored for the next step and stored in the checkpoint for resuming. In a training loop of
    your own, call `update()` after each step, and evaluate or save inside `applied()`.

    Args:
        model: A model with an active adapter, or any model with trainable parameters.
        decay: Decay in [0, 1). Default 0.999.

    Raises:
        ConfigError: If `decay` is invalid, or nothing trains.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> ema = TrainedEMA(model)  # Trainer(..., callbacks=[ema])
        >>> ema.update()
        >>> with ema.applied():
        ...     averaged = model.weight.detach().clone()
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"TrainedEMA: `decay={decay!r}` must be from 0 to below 1, such as 0.999.")
        self.decay = decay
        self.updates = 0
        self._weights: dict[str, Tensor] = {}  # weights of the optimizer, while the model has the average
        self._start(model)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights. Call it after the optimizer's step."""
        self._leave()
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._parameters.items():
            average = self._averages[name] = self._averages[name].to(parameter.device)
            average.lerp_(parameter.float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager: the model has the averaged weights."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def state_dict(self) -> EMAState:
        """`updates`, and `averages`: name -> float32 tensor."""
        return {"updates": self.updates, "averages": {name: t.clone() for name, t in self._averages.items()}}

    def load_state_dict(self, state: EMAState) -> None:
        """Load the result of `state_dict`.

        Raises:
            AdapterFileError: If it belongs to other weights.
        """
        _check_names(set(state["averages"]), self._parameters, "the state")
        self.updates = int(state["updates"])
        self._averages = {name: state["averages"][name].float().clone() for name in self._parameters}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Start from the current weights; a resumed run continues its average.

        Raises:
            AdapterFileError: If the run is resumed from a checkpoint that was saved without an average.
        """
        self._start(model)
        if state.global_step:
            self._resume(_checkpoint(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore the optimizer's weights."""
        self._leave()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update the average; if Trainer evaluates or saves after this step, apply it."""
        self.update()
        if control.should_evaluate or control.should_save:
            self._enter()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Apply the average for evaluation and saving."""
        self._enter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Save the optimizer's weights next to the averaged ones."""
        if args.should_save:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._own().items()}
            save_file(tensors, _checkpoint(args, state) / FILE, {"updates": str(self.updates)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep the average in the model, or the best checkpoint if Trainer has loaded it."""
        self._weights = {}

    def _start(self, model: nn.Module) -> None:
        self._parameters = trained_parameters(extract_model_from_parallel(model))
        if not self._parameters:
            raise ConfigError(f"TrainedEMA: {type(model).__name__} has no trainable parameters.")
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._weights, self.updates = {}, 0

    def _own(self) -> dict[str, Tensor]:
        """Weights of the optimizer, also while the model has the average."""
        return self._weights or {name: p.detach() for name, p in self._parameters.items()}

    def _enter(self) -> None:
        if not self._weights:
            self._weights = {name: p.detach().clone() for name, p in self._parameters.items()}
            self._put(self._averages)

    def _leave(self) -> None:
        if self._weights:
            self._put(self._weights)
            self._weights = {}

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    def _resume(self, checkpoint: Path) -> None:
        """Take the optimizer's weights from the checkpoint; the model has loaded the average, until the next step."""
        path = checkpoint / FILE
        if not path.exists():
            raise AdapterFileError(
                f"`{checkpoint}` has no {FILE}: its run had no TrainedEMA. Resume without it, or start a new run."
            )
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            updates = int(file.metadata()["updates"])
        _check_names(set(weights), self._parameters, f"`{path}`")
        self._weights, self.updates = weights, updates


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _check_names(found: set[str], parameters: dict[str, nn.Parameter], what: str) -> None:
    if different := sorted(found ^ set(parameters)):
        raise AdapterFileError(
            f"{what} is an average of other weights: {different[:4]}{' ...' if len(different) > 4 else ''} "
            "are on one side only. Use it with the model that it was made from."
        )


__all__ = ["EMAState", "TrainedEMA"]
