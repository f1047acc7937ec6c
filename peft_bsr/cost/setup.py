"""Settings of a training step for estimates, and the memory of its optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from peft_bsr.errors import ConfigError

OPTIMIZERS = {  # state tensors for each trained parameter
    "adamw": 2,
    "adamw_fused": 2,
    "adamw_8bit": 2,
    "adamw_offload": 2,
    "sgd_momentum": 1,
    "sgd": 0,
}
SAVING = ("adamw_8bit", "adamw_offload")  # they need less memory on the device, but more time
_SMALL = 4096  # values: torchao and bitsandbytes keep the state of smaller tensors in full precision and on the device
_BLOCK = 256  # values that share a scale
_AUTOCASTS = (None, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Setup:
    """How a model is trained, apart from the adapter.

    Attributes:
        batch_size: Images per step. Default 32.
        image_size: Pixels per side. Default None: the size of the model.
        optimizer: One of `"adamw"` (torch's default AdamW, which copies the tensors that it updates), `"adamw_fused"`
            (no copies; Trainer's default), `"adamw_8bit"` (torchao or bitsandbytes), `"adamw_offload"` (torchao's
            `CPUOffloadOptimizer(params, torch.optim.AdamW)`), `"sgd_momentum"`, `"sgd"`. Default `"adamw"`.
        dtype: Dtype of weights, and of activations without autocast. Default None: the dtype of the model.
        device: Device whose operations are counted. If this machine has no such device, operations of the CPU are
            counted: they save the same tensors, but temporary memory of kernels differs slightly. Default `"cpu"`.
        autocast: `torch.bfloat16` or `torch.float16` to run the forward in `torch.autocast`. Default None.
        compile: Whether the model is compiled (`peft_bsr.compile(model)`; `torch.compile(model)` is the same except for
            ALaST). torch's partitioner determines what is saved, which takes 10 to 30 seconds. Default False.
        gradient_checkpointing: Gradient checkpointing of transformers (non-reentrant) for every block that gradients
            reach; `"offload"` also moves the inputs of these blocks to the CPU
            (`gradient_checkpointing_kwargs={"offload": True}`). Default False.

    Raises:
        ConfigError: If a value is out of range, or cannot be combined with another.

    Examples:
        >>> setup = Setup(batch_size=128, device="cuda", autocast=torch.bfloat16, optimizer="adamw_8bit")
    """

    batch_size: int = 32
    image_size: int | None = None
    optimizer: str = "adamw"
    dtype: torch.dtype | None = None
    device: str | torch.device = "cpu"
    autocast: torch.dtype | None = None
    compile: bool = False
    gradient_checkpointing: bool | Literal["offload"] = False

    def __post_init__(self) -> None:
        problems = [
            f"`{name}={value!r}` must be an integer of at least 1."
            for name, value in (("batch_size", self.batch_size), ("image_size", self.image_size))
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
        ]
        if self.optimizer not in OPTIMIZERS:
            problems.append(
                f"`optimizer={self.optimizer!r}` is unknown. Use one of {', '.join(map(repr, OPTIMIZERS))}."
            )
        if self.autocast not in _AUTOCASTS:
            problems.append(f"`autocast={self.autocast}` must be torch.bfloat16, torch.float16 or None.")
        if self.gradient_checkpointing not in (False, True, "offload"):
            problems.append(
                f'`gradient_checkpointing={self.gradient_checkpointing!r}` must be False, True or "offload".'
            )
        try:
            kind = torch.device(self.device).type
        except (RuntimeError, TypeError):
            problems.append(f'`device={self.device!r}` is not a device of torch. Use `"cpu"` or `"cuda"`.')
        else:
            offloads = self.optimizer == "adamw_offload" or self.gradient_checkpointing == "offload"
            if kind == "cpu" and offloads:
                problems.append('`device="cpu"` has nothing to offload to the CPU. Pass the device that trains.')
        if self.compile and self.gradient_checkpointing == "offload":
            problems.append('`gradient_checkpointing="offload"` cannot be predicted with `compile=True`. Use only one.')
        if problems:
            raise ConfigError.from_problems("estimate", problems)

    @property
    def kind(self) -> str:
        """Device type, such as `"cuda"`."""
        return torch.device(self.device).type


def optimizer_bytes(optimizer: str, trained: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Optimizer state in bytes: on the device, and offloaded to the CPU.

    Args:
        optimizer: One of `OPTIMIZERS`.
        trained: Trained parameters.

    Examples:
        >>> optimizer_bytes("adamw", [torch.nn.Parameter(torch.zeros(64, 64))])
        (32768, 0)
        >>> optimizer_bytes("adamw_8bit", [torch.nn.Parameter(torch.zeros(64, 64))])  # 16 scales and a table each
        (10368, 0)
    """
    here = there = 0
    for parameter in trained:
        states, size = OPTIMIZERS[optimizer], parameter.numel()
        if optimizer == "adamw_8bit" and size >= _SMALL and size % _BLOCK == 0:
            here += states * (size + 4 * size // _BLOCK + 4 * 256)  # codes, scales, table of the 256 values
        elif optimizer == "adamw_offload" and size >= _SMALL:
            there += (states + 2) * parameter.nbytes  # and a copy of the parameter and of its gradient
        else:
            here += states * parameter.nbytes
    return here, there


def update_bytes(optimizer: str, kind: str, trained: list[nn.Parameter]) -> int:
    """Temporary memory of an update: on the CPU, AdamW copies one tensor at a time; on other devices, all of them."""
    if optimizer != "adamw":
        return 0
    return sum(p.nbytes for p in trained) if kind != "cpu" else 2 * max(p.nbytes for p in trained)


def library_bytes(kind: str) -> int:
    """Workspaces of cuBLAS: one for the thread of the forward and one for the thread of the backward. 0 without CUDA.

    Source: torch's documentation of `CUBLAS_WORKSPACE_CONFIG`: by default `:4096:2:16:8` (KiB and count), on Hopper and
    later data center GPUs `:4096:8`. Without a GPU the first is assumed.
    """
    if kind != "cuda":
        return 0
    is_large = torch.cuda.is_available() and torch.version.cuda and torch.cuda.get_device_capability()[0] in (9, 10)
    sizes = os.environ.get("CUBLAS_WORKSPACE_CONFIG") or (":4096:8" if is_large else ":4096:2:16:8")
    numbers = [int(number) for number in sizes.strip(":").split(":")]
    return 2 * 1024 * sum(size * count for size, count in zip(numbers[::2], numbers[1::2], strict=True))


__all__ = ["OPTIMIZERS", "SAVING", "Setup", "library_bytes", "optimizer_bytes", "update_bytes"]
