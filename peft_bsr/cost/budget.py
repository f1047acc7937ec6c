"""From a memory budget to the plans that fit into it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_bsr.cost.estimation import Estimate, estimate
from peft_bsr.cost.twin import on_meta, settle
from peft_bsr.errors import ConfigError
from peft_bsr.tuners.bsr.config import BSRConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", re.IGNORECASE)

_MARGIN = 1.05  # what kernels and the allocator take by themselves; up to 3 % was measured
_HALVES = "half of the tokens go, 3 times"
# how it is run, the fewest FLOPs first
_LEVELS: tuple[tuple[dict[str, Any], bool, str], ...] = (
    ({"lean": "exact"}, False, ""),
    ({"lean": "max"}, False, "first products are computed twice"),
    ({"lean": "max", "saved_activations": "int8"}, False, "first products are computed twice; gradients off by 1 %"),
    ({"lean": "off"}, True, "blocks that gradients reach run twice"),
)
_SHOWN = ("trainable_blocks", "reduction_blocks", "keep_rate", "trainable", "lean", "saved_activations")


@dataclass(frozen=True)
class BudgetPlan:
    """A way to train that fits.

    Attributes:
        config: For `get_peft_model`, or None for full fine-tuning.
        gradient_checkpointing: Whether to switch it on (not reentrant).
        estimate: What it takes.
        gives_up: What it gives up against full fine-tuning as it is.
    """

    config: BSRConfig | None
    gradient_checkpointing: bool
    estimate: Estimate
    gives_up: str

    def describe(self) -> str:
        """One line."""
        if self.config is None:
            what = "full fine-tuning"
        else:
            defaults = BSRConfig()
            given = [
                f"{n}={getattr(self.config, n)!r}" for n in _SHOWN if getattr(self.config, n) != getattr(defaults, n)
            ]
            what = f"BSRConfig({', '.join(given)})"
        what += " + gradient checkpointing" if self.gradient_checkpointing else ""
        size, flops = self.estimate.total_bytes / 2**20, self.estimate.training_flops / self.estimate.batch_size / 1e9
        return f"{size:8.0f} MiB  {flops:6.1f} GFLOPs an image  {what}  (gives up: {self.gives_up})"


def plan_for_budget(
    model: nn.Module,
    memory: str | int,
    *,
    batch_size: int = 32,
    image_size: int | None = None,
    optimizer: str = "adamw",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    limit: int | None = None,
) -> list[BudgetPlan]:
    """Ways to train `model` whose predicted peak and 5 % more fit, the one that gives up least first.

    For every choice of trained blocks and tokens there is at most one, the one of fewest FLOPs among those that fit
    (lean blocks, checkpointing, 8 bits). The order is by how much trains and how many tokens stay, not by accuracy:
    which of two is better on your images, only a run can say.

    Args:
        model: See `estimate`; best without weights, on the meta device.
        memory: Bytes, or a text such as `"2GB"` (10^9) or `"1.5GiB"` (2^30). For weights, optimizer, gradients and
            activations; Python and torch (about 0.4 GB on the CPU) come on top.
        batch_size: See `estimate`.
        image_size: See `estimate`.
        optimizer: See `estimate`.
        dtype: See `estimate`.
        device: See `estimate`.
        limit: Stop after so many. Default all.

    Returns:
        At least one.

    Raises:
        ConfigError: If nothing fits; it names the smallest that could be. Or if the size cannot be read.
        UnsupportedModelError: See `estimate`.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> with torch.device("meta"):
        ...     vit = ViTForImageClassification(ViTConfig(num_labels=10))
        >>> plan_for_budget(vit, "0.7GB", batch_size=8, limit=1)[0].gives_up
        'nothing but low-rank updates of the blocks trains; first products are computed twice'
    """
    budget = parse_size(memory)
    model = on_meta(model).requires_grad_(True)  # also of one that an adapter has frozen: full fine-tuning is a plan
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "image_size": image_size,
        "optimizer": optimizer,
        "dtype": dtype,
        "device": device,
    }
    found: list[BudgetPlan] = []
    smallest: BudgetPlan | None = None
    for setting, gives_up in _settings(depth=len(settle(model, BSRConfig()).column.blocks)):
        for config, checkpointing, price in _ways(setting):
            cost = estimate(model, config, gradient_checkpointing=checkpointing, **settings)
            plan = BudgetPlan(config, checkpointing, cost, "; ".join(filter(None, (gives_up, price))))
            if smallest is None or cost.total_bytes < smallest.estimate.total_bytes:
                smallest = plan
            if cost.total_bytes * _MARGIN <= budget:
                found.append(plan)
                break  # the others take more FLOPs
        if limit is not None and len(found) >= limit:
            break
    if not found:
        assert smallest is not None, "something was tried"
        least = smallest.estimate
        raise ConfigError(
            f"`memory={memory!r}` is too little for {type(model).__name__} at `batch_size={batch_size}`. The smallest "
            f"plan takes {least.total_bytes / 2**20:.0f} MiB, of which weights {least.weights_bytes / 2**20:.0f} MiB:\n"
            f"{smallest.describe()}\nUse a smaller batch, half precision or a smaller model."
        )
    return found


def parse_size(memory: str | int) -> int:
    """Bytes of `"2GB"`, `"512 MiB"`, `1000`.

    Raises:
        ConfigError: If it is not understood.

    Examples:
        >>> parse_size("1.5GiB")
        1610612736
    """
    match = _SIZE.fullmatch(memory) if isinstance(memory, str) else None
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f'`memory={memory!r}` is not understood. Use bytes, or a text such as "2GB" or "1.5GiB".')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _settings(depth: int) -> tuple[tuple[dict[str, Any] | None, str], ...]:
    """What trains and how many tokens stay, what gives up least first."""
    late = 2 * depth // 3
    return (
        (None, "nothing: every weight trains on every token"),
        ({"trainable_blocks": "every:1", "reduction_blocks": []}, "the embeddings stay frozen"),
        (
            {"trainable_blocks": "every:1", "reduction_blocks": [], "trainable": "lora"},
            "nothing but low-rank updates of the blocks trains",
        ),
        ({"trainable_blocks": "every:4", "reduction_blocks": []}, "3 blocks of 4 stay frozen"),
        (
            {"trainable_blocks": "last:3", "reduction_blocks": [late]},
            f"all but the last 3 blocks stay frozen; half of the tokens go, at block {late}",
        ),
        ({"trainable_blocks": "every:4", "keep_rate": 0.7}, "3 blocks of 4 stay frozen; 3 tokens of 10 go, 3 times"),
        ({"trainable_blocks": "every:4", "keep_rate": 0.5}, f"3 blocks of 4 stay frozen; {_HALVES}"),
        ({"trainable_blocks": "last:3", "keep_rate": 0.5}, f"all but the last 3 blocks stay frozen; {_HALVES}"),
        ({"trainable_blocks": "last:1", "keep_rate": 0.5}, f"all but the last block stay frozen; {_HALVES}"),
        (
            {"trainable_blocks": "last:1", "keep_rate": 0.5, "trainable": "lora"},
            f"nothing but a low-rank update of the last block trains; {_HALVES}",
        ),
    )


def _ways(setting: dict[str, Any] | None) -> Iterator[tuple[BSRConfig | None, bool, str]]:
    if setting is None:
        yield None, False, ""
        yield None, True, "every block runs twice"
        return
    for level, checkpointing, price in _LEVELS:
        yield BSRConfig(**setting, **level), checkpointing, price


__all__ = ["BudgetPlan", "parse_size", "plan_for_budget"]
