"""Finding modules that are random in training before a given block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_bsr.backbones import in_mode, quiet, tensors_of
from peft_bsr.engine import run_until
from peft_bsr.training.types import Batch
from peft_bsr.tuners.base.layer import ROOT


def drawn_before(model: nn.Module, index: int, inputs: Batch) -> str | None:
    """The first module whose output depends on the random seed, if the tokens depend on it as well.

    Runs two forwards with different seeds up to block `index`, in training mode. Modes and the random state are
    restored.

    Args:
        model: A model with an active adapter of ours.
        index: Index of the block to stop at; the depth of the model for all blocks.
        inputs: Keyword arguments of the model.

    Returns:
        Name of the module, or None if the tokens are not random.
    """
    with quiet(model), in_mode(True, model):
        (first, outputs), (second, others) = (_seeded(model, index, inputs, seed) for seed in (0, 1))
    if torch.equal(first, second):
        return None
    differing = (name for (name, a), (other, b) in zip(outputs, others, strict=False) if (name, a) != (other, b))
    return next(differing, type(model).__name__).removeprefix(ROOT)


def parts_before(model: nn.Module, index: int, inputs: Batch) -> list[nn.Module]:
    """The modules that have run when block `index` begins, embeddings and position tables among them.

    Args:
        model: See `drawn_before`.
        index: The same.
        inputs: The same.
    """
    found: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda part, *_: found.append(part)) for module in model.modules()]
    try:
        with quiet(model):
            run_until(model, index, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _seeded(model: nn.Module, index: int, inputs: Batch, seed: int) -> tuple[Tensor, list[tuple[str, list[float]]]]:
    """Input tokens of the block, and a sum of the output of each module before it."""
    outputs: list[tuple[str, list[float]]] = []

    def note(name: str, output: object) -> None:
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


__all__ = ["drawn_before", "parts_before"]
