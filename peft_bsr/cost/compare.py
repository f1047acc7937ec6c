"""Methods side by side on the same batch, in the same run: a time alone means nothing."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peft_bsr.cost.flops import count_flops
from peft_bsr.engine import saved_activations
from peft_bsr.errors import TrainabilityError


@dataclass(frozen=True)
class Cost:
    """What one training step of a model costs.

    Attributes:
        trainable_parameters: Number of trained values.
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
    """Cost of a training step of each model on the same batch; the models' weights and modes are left as they were.

    Args:
        models: Name -> model; called as `model(**batch)`, with a `loss` in the output.
        batch: Inputs and labels, first dimension = images.
        repeats: Timed steps of each model, taken in turn, after one that is not counted.

    Returns:
        name -> `Cost`.
    """
    size = len(next(iter(batch.values())))
    steps = {name: TrainingStep(model, batch) for name, model in models.items()}
    modes = {name: {m for m in model.modules() if m.training} for name, model in models.items()}
    try:
        counted = {}
        for name, (model, step) in ((n, (models[n], steps[n])) for n in models):
            model.train()
            with torch.no_grad():
                forward = count_flops(step.forward)
            counted[name] = (saved_activations(model, step.forward), forward, count_flops(step))
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(repeats):
            for name, step in steps.items():
                times[name].append(step.seconds())
    finally:
        for name, model in models.items():
            for module in model.modules():
                module.training = module in modes[name]
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


def cost_table(costs: Mapping[str, Cost], batch: Mapping[str, Tensor]) -> str:
    """The costs as a Markdown table, times also as ratio to the first row, with the conditions they were taken under.

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
    device = torch.cuda.get_device_name(images.device) if images.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    lines.append(
        "\nTrained: parameters. Saved: activations kept for backward, per image. Forward and training (forward and "
        "backward): per image. Step: forward, backward and SGD update, median; its ratio to the first row.\n"
        f"{device}, {str(images.dtype).removeprefix('torch.')}, batch {len(images)}, {tuple(images.shape[2:])} px, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}."
    )
    return "\n".join(lines)


class TrainingStep:
    """Forward, backward and an SGD update that leaves the weights alone (learning rate 0).

    Args:
        model: Called as `model(**batch)`, with a `loss` in the output.
        batch: Inputs and labels.

    Raises:
        TrainabilityError: If nothing asks for gradients.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self.model, self.batch = model, batch
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise TrainabilityError(
                f"{type(model).__name__} has nothing to train: no parameter asks for gradients. Load its adapter with "
                "`is_trainable=True`."
            )
        self.optimizer = torch.optim.SGD(trained, lr=0.0)

    def forward(self) -> Tensor:
        """The loss alone."""
        return self.model(**self.batch).loss

    def __call__(self) -> None:
        """Run the step."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Run the step and time it."""
        is_cuda = any(value.is_cuda for value in self.batch.values())
        if is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self()
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start
