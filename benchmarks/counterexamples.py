"""Check gradients of a small ViT with dropout against its own losses: saving memory must not change a step.

    python benchmarks/counterexamples.py

The gradient along a random direction is compared with a central difference of the loss along it, in float64 and with
the same random state. So each way is checked against its own forward; none is the reference. With a relative error
above 1e-5 the gradient is not that of this loss. Compiled = dynamo, torch's partitioner, eager kernels.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from typing import Any

import peft
import torch
import torch._functorch.config as functorch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
DROPOUT = {"hidden_dropout_prob": 0.1}
_STEP = 1e-4
EVERY: dict[str, Any] = {"trainable_blocks": "every:1", "keep_rate": 1.0}


def stock(**config: Any) -> nn.Module:
    """The model, all of it trained."""
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(**SIZES, **DROPOUT, image_size=32, patch_size=8, num_labels=5, **config)
    ).train()


def checkpointed(**how: Any) -> nn.Module:
    """The same with gradient checkpointing."""
    model = stock()
    model.gradient_checkpointing_enable(how)  # type: ignore[operator]
    return model


def bsr(lean: str) -> nn.Module:
    """The same, its blocks lean."""
    return get_peft_model(stock(), BSRConfig(lean=lean, **EVERY)).train()  # type: ignore[arg-type]


def lora() -> nn.Module:
    """PEFT's LoRA, away from its zero start."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(stock(), config).train()  # type: ignore[arg-type]


def compiled(model: nn.Module, budget: float) -> nn.Module:
    """Compiled with torch's memory budget."""
    functorch.activation_memory_budget = budget
    model.compile(backend="aot_eager_decomp_partition")
    return model


WAYS: dict[str, Callable[[], nn.Module]] = {
    "checkpointing": lambda: checkpointed(use_reentrant=False),
    "checkpointing, `preserve_rng_state=False`": lambda: checkpointed(use_reentrant=False, preserve_rng_state=False),
    "compiled, memory budget 1": lambda: compiled(stock(), 1.0),
    "compiled, memory budget 0.5": lambda: compiled(stock(), 0.5),
    "compiled, memory budget 0.1": lambda: compiled(stock(), 0.1),
    "LoRA of PEFT, compiled, memory budget 0.5": lambda: compiled(lora(), 0.5),
    "peft_bsr, lean exact": lambda: bsr("exact"),
    "peft_bsr, lean max": lambda: bsr("max"),
    "peft_bsr, lean max, compiled": lambda: compiled(bsr("max"), 1.0),
}


def relative_error(model: nn.Module) -> float:
    """Relative error of the gradient along a random direction, over all trained weights of the blocks."""
    numbers = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 3, 32, 32, generator=numbers, dtype=torch.float64), torch.arange(8) % 5
    weights = [p for name, p in model.named_parameters() if p.requires_grad and "layers." in name]
    direction = [torch.randn(p.shape, generator=numbers, dtype=p.dtype) * p.detach().abs().mean() for p in weights]

    def loss() -> torch.Tensor:
        torch.manual_seed(2)
        found: torch.Tensor = model(pixel_values=images, labels=labels).loss
        return found

    loss().backward()
    along = sum((p.grad * d).sum().item() for p, d in zip(weights, direction, strict=True) if p.grad is not None)
    losses = []
    for step in (_STEP, -2 * _STEP):
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p.add_(d, alpha=step)
        losses.append(loss().item())  # with gradients enabled: without, another program would be compiled
    expected = (losses[0] - losses[1]) / (2 * _STEP)
    return abs(along - expected) / abs(expected)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{versions}, CPU ({platform.machine()}), float64, batch 8, 32 px\n")
    print("| way | relative error of the gradient | |\n|---|---|---|")
    for name, make in WAYS.items():
        torch._dynamo.reset()
        try:
            error = relative_error(make().double())
        finally:
            functorch.activation_memory_budget = 1.0
        print(f"| {name} | {error:.1e} | {'exact' if error < 1e-5 else 'another gradient'} |")


if __name__ == "__main__":
    main()
