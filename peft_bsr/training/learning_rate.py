"""Finding a learning rate by a short sweep on a part of the training images, without changing the model."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.data import Subset
from transformers import PrinterCallback, ProgressCallback, SchedulerType, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from peft_bsr.errors import ConfigError
from peft_bsr.training.defaults import WARMUP_SHARE
from peft_bsr.training.groups import trained_parameters
from peft_bsr.training.side_effect_free import side_effect_free
from peft_bsr.tuners import method_of

FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
"""Factors of the initial learning rate that a sweep may try."""
_BEGIN = len(FACTORS) // 2
_FORWARDS = ("forward", "_original_forward")  # what accelerate puts on a model for mixed precision


@dataclass(frozen=True)
class LearningRateSweep:
    """Result of a sweep.

    Attributes:
        learning_rate: The best learning rate.
        losses: Learning rate -> mean loss on the held-out images, ascending by rate; infinite if it diverged.
        steps: Optimizer steps of each run.
        train_images: Number of training images.
        held_out_images: Number of images of the training set for evaluation.
    """

    learning_rate: float
    losses: dict[float, float]
    steps: int
    train_images: int
    held_out_images: int

    def __str__(self) -> str:
        tried = ", ".join(f"{rate:.1e}: {loss:.3f}" for rate, loss in self.losses.items())
        return (
            f"learning rate {self.learning_rate:.1e}, by the loss of {self.held_out_images} training images after "
            f"{self.steps} steps on {self.train_images} others ({tried})"
        )


def find_learning_rate(
    trainer: Trainer,
    *,
    steps: int = 20,
    held_out: int = 128,
    make_optimizer: Callable[[float], torch.optim.Optimizer] | None = None,
) -> LearningRateSweep:
    """Try learning rates around that of `trainer.args` for a few steps each, and return the best.

    In steps of half a decade: the given rate, the next lower and higher one, then further while the loss improves; at
    most five rates, so at most `5 * steps` optimizer steps. Each run starts from the current weights and uses the same
    images in the same order, warm-up and a cosine schedule, and the precision and loss of `trainer`; it is judged by
    the loss on other images of the training set. Weights, gradients, random states and an ALaST schedule are restored
    bit for bit.

    Short runs favour larger rates slightly. For long training runs the next lower rate may be better.

    Args:
        trainer: A Trainer before training. The sweep starts at `trainer.args.learning_rate`, which is not changed.
        steps: Optimizer steps per rate, at most those of the training. Default 20.
        held_out: Number of images for evaluation, at most a fifth of the training set. Default 128.
        make_optimizer: Learning rate -> optimizer, if training does not use Trainer's own (`param_groups`).

    Returns:
        The best learning rate and the losses of all rates.

    Raises:
        ConfigError: If there are fewer than 10 training images, or no rate gives a finite loss.

    Examples:
        >>> found = find_learning_rate(trainer)  # doctest: +SKIP
        >>> trainer.args.learning_rate = found.learning_rate  # doctest: +SKIP
    """
    dataset = trainer.train_dataset
    if dataset is None or len(dataset) < 10:
        raise ConfigError("find_learning_rate: it needs at least 10 training images. Set a learning rate instead.")
    args = trainer.args
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist()
    scored = min(held_out, len(order) // 5)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    all_steps = args.max_steps if args.max_steps > 0 else int(-(-len(order) // batch) * args.num_train_epochs)
    steps = max(1, min(steps, all_steps))
    train = Subset(dataset, order[scored : scored + steps * batch])
    held = Subset(dataset, order[:scored])
    losses: dict[int, float] = {}

    def try_rate(index: int) -> None:
        losses[index] = _loss_after(trainer, args.learning_rate * FACTORS[index], steps, train, held, make_optimizer)

    for index in (_BEGIN - 1, _BEGIN, _BEGIN + 1):
        try_rate(index)
    best = min(losses, key=lambda index: losses[index])
    beyond = best + (best > _BEGIN) - (best < _BEGIN)
    if beyond not in losses:
        try_rate(beyond)
        best = min(losses, key=lambda index: losses[index])
    if losses[best] == float("inf"):
        rates = ", ".join(f"{args.learning_rate * FACTORS[index]:.1e}" for index in sorted(losses))
        raise ConfigError(f"find_learning_rate: no learning rate of {rates} gives a finite loss. Set a smaller one.")
    tried = {args.learning_rate * FACTORS[index]: losses[index] for index in sorted(losses)}
    return LearningRateSweep(args.learning_rate * FACTORS[best], tried, steps, len(train), len(held))


def _loss_after(
    trainer: Trainer,
    rate: float,
    steps: int,
    train: Subset,
    held: Subset,
    make_optimizer: Callable[[float], torch.optim.Optimizer] | None,
) -> float:
    model: nn.Module = extract_model_from_parallel(trainer.model)
    with tempfile.TemporaryDirectory() as folder, unchanged(model):
        short = Trainer(
            model=model,
            args=_short(trainer.args, folder, rate, steps),
            data_collator=trainer.data_collator,
            train_dataset=train,
            eval_dataset=held,
            compute_loss_func=trainer.compute_loss_func,
            callbacks=_callbacks(model),
            optimizers=(None if make_optimizer is None else make_optimizer(rate), None),
        )
        for callback in (PrinterCallback, ProgressCallback):
            short.remove_callback(callback)
        short.train()
        loss = float(short.evaluate()["eval_loss"])
    return loss if np.isfinite(loss) else float("inf")


def _callbacks(model: nn.Module) -> list[TrainerCallback]:
    """Callbacks of the active adapter's method; none for a model without adapters of this package."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    method = None if config is None else method_of(config)
    return [] if method is None else method.callbacks()


def _short(args: TrainingArguments, folder: str, rate: float, steps: int) -> TrainingArguments:
    """The arguments for a few steps, without evaluation, saving and logging."""
    short = copy.copy(args)
    short.output_dir, short.learning_rate, short.max_steps = folder, rate, steps
    short.lr_scheduler_type, short.warmup_steps = SchedulerType.COSINE, WARMUP_SHARE
    short.eval_strategy = short.logging_strategy = IntervalStrategy.NO
    short.save_strategy, short.load_best_model_at_end = SaveStrategy.NO, False
    short.report_to, short.disable_tqdm, short.push_to_hub = [], True, False
    return short


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Context manager: weights, gradients, buffers, random states and schedules are restored bit for bit.

    Args:
        model: A model with or without an adapter.
    """
    weights = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    own: dict[str, object] = {name: vars(model)[name] for name in _FORWARDS if name in vars(model)}
    states = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(side_effect_free(model))
        if torch.backends.mps.is_available():
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for name in ("forward", "_original_forward"):  # what accelerate puts on the model for mixed precision
                vars(model).pop(name, None)
            vars(model).update(own)
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, before in weights.items():
                    parameters[name].copy_(before)


__all__ = ["FACTORS", "LearningRateSweep", "find_learning_rate", "unchanged"]
