"""What a model draws at random in training before one of its blocks runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import in_mode, quiet, tensors_of
from peft_bsr.engine import run_until
from peft_bsr.tuners.base.layer import ROOT


def drawn_before(model: nn.Module, index: int, inputs: dict[str, Any]) -> str | None:
    """The first module that gives something else when a training forward is run again, if the tokens do as well.

    Two forwards of another seed up to block `index`, in training mode. Modes and the random state are as before.

    Args:
        model: With an active adapter of ours.
        index: The block that does not run any more; the depth for all blocks.
        inputs: Of the model.

    Returns:
        Its name, or None where nothing that counts is drawn.
    """
    with quiet(model), in_mode(True, model):
        (first, outputs), (second, others) = (_seeded(model, index, inputs, seed) for seed in (0, 1))
    if torch.equal(first, second):
        return None
    differing = (name for (name, a), (other, b) in zip(outputs, others, strict=False) if (name, a) != (other, b))
    return next(differing, type(model).__name__).removeprefix(ROOT)


def _seeded(
    model: nn.Module, index: int, inputs: dict[str, Any], seed: int
) -> tuple[Tensor, list[tuple[str, list[float]]]]:
    """Tokens before the block, and of each module in front of it a sum of what it gave."""
    outputs: list[tuple[str, list[float]]] = []

    def note(name: str, output: Any) -> None:
        outputs.append((name, [float(tensor.float().sum()) for tensor in tensors_of(output)]))

    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: note(name, output))
        for name, module in model.named_modules()
    ]
    try:
        torch.manual_seed(seed)
        tokens = run_until(model, index, inputs).tokens
    finally:
        for handle in handles:
            handle.remove()
    assert tokens is not None, "a forward that stops leaves its tokens"
    return tokens, outputs


__all__ = ["drawn_before"]
