"""Compares the training costs of models on the same batch, in the same run, so that times are comparable."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from peft_bsr.cost.flops import count_flops
from peft_bsr.engine import saved_activations
from peft_bsr.errors import TrainabilityError
from peft_bsr.training.side_effect_free import side_effect_free


@dataclass(frozen=True)
class Cost:
    """Cost of one training step of a model.

    Attributes:
        trainable_parameters: Number of trainable parameters.
        saved_bytes_per_image: Saved activations (see `saved_activations`) divided by the batch size.
        forward_macs_per_image: Multiply-accumulates of a forward pass (FLOPs = 2 x MACs).
        training_flops_per_image: FLOPs of forward and backward.
        step_seconds: Median time of forward, backward and an SGD update.
    """

    trainable_parameters: int
    saved_bytes_per_image: float
    forward_macs_per_image: float
    training_flops_per_image: float
    step_seconds: float


def compare(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor], repeats: int = 5) -> dict[str, Cost]:
    """Cost of a training step of each model on the same batch; the models are not changed, nor are ALaST's budgets.

    Args:
        models: Name -> model; called as `model(**batch)`, with a `loss` in the output.
        batch: Inputs and labels; the first dimension is the batch.
        repeats: Timed steps of each model, in turn, after one warm-up step. Default 5.

    Returns:
        Name -> `Cost`.
    """
    size = len(next(iter(batch.values())))
    steps = {name: TrainingStep(model, batch) for name, model in models.items()}
    counted = {}
    times: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(side_effect_free(model))
        for name, step in steps.items():
            with torch.no_grad():
                forward = count_flops(step.forward)
            counted[name] = (saved_activations(models[name], step.forward), forward, count_flops(step))
        for _ in range(repeats):
            for name, step in steps.items():
                times[name].append(step.seconds())
    return {
        name: Cost(
            trainable_parameters=sum(p.numel() for p in models[name].parameters() if p.requires_grad),
            saved_bytes_per_image=saved / size,
            forward_macs_per_image=forward / 2 / size,
            training_flops_per_image=training / size,
            step_seconds=statistics.median(times[name]),
        )
        for name, (saved, forward, training) in counted.items()
    }


def cost_rows(costs: Mapping[str, Cost]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table of costs, as strings; the last column is the ratio of step times to the first row.

    Args:
        costs: From `compare`; the first row is the reference.
    """
    head = ("", "trained, M", "saved, MiB per image", "GFLOPs per image", "step, s", "ratio")
    reference = next(iter(costs.values()))
    return head, [
        (
            name,
            f"{cost.trainable_parameters / 1e6:.2f}",
            f"{cost.saved_bytes_per_image / 2**20:.3g}",
            f"{cost.training_flops_per_image / 1e9:.3g}",
            f"{cost.step_seconds:.3g}",
            f"{cost.step_seconds / reference.step_seconds:.2f}",
        )
        for name, cost in costs.items()
    ]


def cost_table(costs: Mapping[str, Cost], batch: Mapping[str, Tensor]) -> str:
    """The costs as a Markdown table, with step times relative to the first row, and the conditions of the measurement.

    Args:
        costs: From `compare`; the first row is the reference.
        batch: The batch that was used.
    """
    first = next(iter(costs.values()))
    lines = [
        "| method | trained, M | saved, MiB | forward, GMACs | training, GFLOPs | step, s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cost in costs.items():
        lines.append(
            f"| {name} | {cost.trainable_parameters / 1e6:.2f} | {cost.saved_bytes_per_image / 2**20:.1f} "
            f"| {cost.forward_macs_per_image / 1e9:.2f} | {cost.training_flops_per_image / 1e9:.1f} "
            f"| {cost.step_seconds:.2f} | {cost.step_seconds / first.step_seconds:.2f} |"
        )
    images = next(value for value in batch.values() if value.ndim > 1)
    device = device_name(images.device)
    lines.append(
        "\nTrained: parameters. Saved: activations kept for backward, per image. Forward and training (forward and "
        "backward): per image. Step: forward, backward and SGD update, median; its ratio to the first row.\n"
        f"{device}, {str(images.dtype).removeprefix('torch.')}, batch {len(images)}, {tuple(images.shape[2:])} px, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}."
    )
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """Readable name of the device of a measurement."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU (MPS)" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads"


class TrainingStep:
    """Forward, backward and an SGD update with learning rate 0, which does not change the weights.

    Args:
        model: Called as `model(**batch)`, with a `loss` in the output.
        batch: Inputs and labels.

    Raises:
        TrainabilityError: If no parameter requires gradients.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        if not any(p.requires_grad for p in model.parameters()):
            raise TrainabilityError(
                f"{type(model).__name__} has nothing to train: no parameter has `requires_grad=True`. Load its "
                "adapter with `is_trainable=True`."
            )
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # parameters without a gradient are skipped

    def forward(self) -> Tensor:
        """Run the forward and return the loss."""
        return self.model(**self.batch).loss

    def __call__(self) -> None:
        """Run the step."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Run the step and time it."""
        is_accelerated = any(value.device.type in ("cuda", "mps") for value in self.batch.values())
        if is_accelerated:
            torch.accelerator.synchronize()
        start = time.perf_counter()
        self()
        if is_accelerated:
            torch.accelerator.synchronize()
        return time.perf_counter() - start
