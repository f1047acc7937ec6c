"""The same training in every way that must not change it: loss and gradient norm of 50 steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, FeatureCache

STEPS, BATCHES, IMAGES = 50, 4, 8  # of a batch
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"image_size": 32, "patch_size": 8}  # 17 tokens
HALVED = {"trainable_blocks": [1, 3], "keep_rate": 0.5}
CONFIGS: dict[str, Callable[..., Any]] = {
    "bsr": lambda **how: BSRConfig(**HALVED, **how),
    "bsr low-rank": lambda **how: BSRConfig(**HALVED, trainable="lora", r=4, **how),
    "bsr low-rank everywhere": lambda **how: BSRConfig(
        trainable_blocks="every:1", keep_rate=1.0, trainable="lora", r=4, **how
    ),
    "alast": lambda **how: ALaSTConfig(token_multiple=1, **how),
    "alast sampled": lambda **how: ALaSTConfig(
        token_multiple=1, trainable_blocks_per_step=2, selection="sample", **how
    ),
}


@dataclass(frozen=True)
class Way:
    """How a model is trained.

    Attributes:
        lean: Option of the method.
        use_reentrant: Of gradient checkpointing; None = without it.
        parts: Each batch is split into so many, their gradients accumulated.
        is_compiled: By dynamo and the partitioner, with eager kernels.
        is_cached: From a feature cache of the frozen leading blocks.
    """

    lean: str = "off"
    use_reentrant: bool | None = None
    parts: int = 1
    is_compiled: bool = False
    is_cached: bool = False


WAYS = {
    "exact": Way("exact"),
    "max": Way("max"),
    "checkpointed": Way(use_reentrant=False),
    "checkpointed, reentrant": Way(use_reentrant=True),
    "exact, checkpointed": Way("exact", use_reentrant=False),
    "exact, accumulated": Way("exact", parts=2),
    "exact, compiled": Way("exact", is_compiled=True),
    "max, compiled": Way("max", is_compiled=True),
    "exact, cached": Way("exact", is_cached=True),
}


def is_possible(name: str, way: Way) -> bool:
    """ALaST's plan changes from step to step: it is not cached, and compiled block by block."""
    if way.is_cached:
        return name in ("bsr", "bsr low-rank")  # the others train from the first block on
    if name == "alast sampled" and way.parts > 1:
        return False  # a draw for each forward
    if way.is_compiled:  # a quarter of a minute each; more of them in tests/engine/test_compiled_lean.py
        return name == "bsr" or (name == "bsr low-rank" and way.lean == "exact")
    return True


def build(name: str, way: Way, numbers: torch.Generator, **settings: Any) -> nn.Module:
    """The model in training mode, its weights from the generator `numbers`."""
    vit = ViTForImageClassification(ViTConfig(**SIZES, num_labels=3))
    with torch.no_grad():  # not what a version of transformers starts from, and large enough that all of it matters
        for parameter in vit.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2, generator=numbers)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=numbers), alpha=0.1)
    model = get_peft_model(vit, CONFIGS[name](lean=way.lean, **settings)).train()
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key:
                parameter.normal_(0, 0.05, generator=numbers)
    if way.use_reentrant is not None:
        vit.gradient_checkpointing_enable({"use_reentrant": way.use_reentrant})
    return model


def data(numbers: torch.Generator) -> list[dict[str, Tensor]]:
    """All samples, batch by batch."""
    images = torch.randn(BATCHES, IMAGES, 3, 32, 32, generator=numbers)
    labels = torch.randint(3, (BATCHES, IMAGES), generator=numbers)
    return [
        {"pixel_values": image, "labels": label}
        for image, label in zip(images.flatten(0, 1), labels.flatten(), strict=True)
    ]


def train(
    model: nn.Module,
    samples: Any,
    way: Way = Way(),
    steps: int = STEPS,
    rank: int = 0,
    processes: int = 1,
    learning_rate: float = 0.01,
) -> list[tuple[float, float]]:
    """Loss and norm of all gradients in each step.

    Args:
        model: In training mode.
        samples: Indexed; one batch after the other, again from the front.
        way: How.
        steps: Of the optimizer.
        rank: Of this process, which takes its share of each batch.
        processes: In all.
        learning_rate: Of SGD.
    """
    # Adam would hide a gradient of the wrong size, and make steps of rounding errors
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate, momentum=0.9)
    share, found = IMAGES // (way.parts * processes), []
    for step in range(steps):
        start, loss = step % BATCHES * IMAGES, 0.0
        for part in range(way.parts):
            first = start + (part * processes + rank) * share
            rows = [samples[i] for i in range(first, first + share)]
            batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
            part_loss = model(**batch).loss / way.parts
            part_loss.backward()
            loss += part_loss.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found.append((loss, norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return found


@cache
def trajectory(name: str, way: Way = Way()) -> Tensor:
    """Loss and gradient norm [steps, 2] of one configuration, trained in one way."""
    numbers = torch.Generator().manual_seed(0)
    model = build(name, way, numbers)
    samples: Any = data(numbers)
    with ExitStack() as stack:
        if way.is_cached:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            samples = FeatureCache.build(model, samples, folder, dtype=torch.float32, batch_size=8, progress=False)
            stack.enter_context(samples.read_by(model))
        if way.is_compiled:
            torch._dynamo.reset()
            stack.callback(torch._dynamo.reset)
            model.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        return torch.tensor(train(model, samples, way), dtype=torch.float64)
