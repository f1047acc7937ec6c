"""Peak memory of a training run, predicted by the planner and measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import BaseImageProcessor, TrainingArguments

from peft_bsr.cli.methods import attach, config_of
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cost import Estimate, PeakMemory, Setup, estimate
from peft_bsr.data import size_of
from peft_bsr.errors import PeftBsrError, UsageError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {  # name in `Setup` -> fields of TrainingArguments
    "adamw_fused": ("optim=adamw_torch_fused",),
    "adamw": ("optim=adamw_torch",),
    "adamw_8bit": ("optim=adamw_torch_8bit",),  # torchao's
    "sgd_momentum": ("optim=sgd", "optim_args=momentum=0.9"),
    "sgd": ("optim=sgd",),
}


@dataclass
class Peak:
    """Peak memory of a run.

    Attributes:
        predicted: Estimate of the planner for a training step, or None.
        measured_bytes: Peak minus the memory in use before the model was loaded, or None.
        device: `"cuda"` and `"mps"` measure memory of the device, `"cpu"` memory of this process.
    """

    predicted: Estimate | None = None
    measured_bytes: int | None = None
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        predicted = None if self.predicted is None else self.predicted.total_bytes
        return {"predicted_bytes": predicted, "measured_bytes": self.measured_bytes, "device": self.device}

    def __str__(self) -> str:
        """`612 MiB predicted, 655 MiB measured`."""
        predicted = None if self.predicted is None else self.predicted.total_bytes
        sizes = {"predicted": predicted, "measured": self.measured_bytes}
        return ", ".join(f"{size / 2**20:.0f} MiB {how}" for how, size in sizes.items() if size is not None)


@contextmanager
def watch_peak(device: torch.device) -> Iterator[Peak]:
    """Context manager: measure the peak if possible (on a CPU this needs Linux); it is set on exit.

    Args:
        device: Device of the training.
    """
    peak = Peak(device=device.type)
    memory = None
    with ExitStack() as stack:
        with suppress(PeftBsrError):
            memory = stack.enter_context(PeakMemory(device))
        yield peak
    if memory is not None:
        peak.measured_bytes = memory.added_bytes


def predict_peak(
    settings: TrainSettings, arguments: TrainingArguments, base: nn.Module, processor: BaseImageProcessor
) -> Estimate:
    """Predict the peak memory of a training step.

    Args:
        settings: Settings of the run.
        arguments: Arguments of the Trainer.
        base: The model without an adapter. With `full` and `linear`, its `requires_grad` flags are set.
        processor: Image processor.

    Raises:
        UsageError: If the planner does not know the optimizer, or images that are not square.
        PeftBsrError: See `peft_bsr.cost.estimate`.
    """
    height, width = size_of(processor)
    chosen = [f"optim={arguments.optim.value}"]
    chosen += [f"optim_args={arguments.optim_args}"] if arguments.optim_args else []
    optimizer = next((name for name, pairs in OPTIMIZERS.items() if list(pairs) == chosen), None)
    if height != width or optimizer is None:
        raise UsageError(f"the planner does not predict images of {height} x {width} px with {', '.join(chosen)}.")
    config = config_of(settings.method, base, settings.options)
    setup = Setup(
        batch_size=arguments.per_device_train_batch_size,
        image_size=height,
        optimizer=optimizer,
        device=arguments.device,
        autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
        compile=arguments.torch_compile,
        gradient_checkpointing=_checkpointing(arguments),
    )
    return estimate(base if config is not None else attach(settings.method, base, {}), config, setup)


def _checkpointing(arguments: TrainingArguments) -> bool | Literal["offload"]:
    if not arguments.gradient_checkpointing:
        return False
    return "offload" if (arguments.gradient_checkpointing_kwargs or {}).get("offload") else True


__all__ = ["OPTIMIZERS", "PRECISIONS", "Peak", "predict_peak", "watch_peak"]
