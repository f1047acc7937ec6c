"""Proof at attach that a block whose tokens are parted is the block, and that gradients reach the chosen alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import (
    ModelSpec,
    StockRun,
    no_zero_tables,
    probe_inputs,
    quiet,
    run_stock,
    seed,
    tensors_of,
    tolerance,
)
from peft_bsr.core import num_kept
from peft_bsr.engine import BlockPlan, Lean, Plan
from peft_bsr.errors import ConfigError
from peft_bsr.selftest.lean import verify_lean
from peft_bsr.selftest.reduction import alone, training_mode


def verify_gradient_tokens(model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None = None) -> None:
    """Try the first block whose tokens are parted, if there is one; the model is left as it was.

    Args:
        model: The model.
        spec: Description of the model.
        plan: As the other checks allowed it.
        stock: The probe's forward, if there is one; default: one more is run.

    Raises:
        ConfigError: If a block cannot be parted, with the reason.
    """
    parted = [i for i, block in enumerate(plan.blocks) if block.gradient_tokens is not None and block.in_graph]
    if not parted:
        return
    problem = (
        _drop_path(model, spec, parted)
        or _not_taken_apart(model, spec, plan, stock)
        or _difference(model, spec, plan.blocks[parted[0]], parted[0], stock)
    )
    if problem is not None:
        raise ConfigError(
            f"{type(model).__name__}: `gradient_tokens` below 1 is not possible on this model: {problem}. Leave it 1.0."
        )


def _drop_path(model: nn.Module, spec: ModelSpec, parted: list[int]) -> str | None:
    """A path is dropped for a whole image, which two parts of it would not agree on."""
    for index in parted:
        for name, module in model.get_submodule(spec.blocks[index]).named_modules():
            rate = getattr(module, "drop_prob", None)
            if "DropPath" in type(module).__name__ and isinstance(rate, float) and rate > 0:
                return (
                    f"block {index} drops whole paths in training (`{name}`, rate {rate:g}), and would drop them for "
                    "some tokens of an image and not for others; load it with `drop_path_rate=0.0`"
                )
    return None


def _not_taken_apart(model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None) -> str | None:
    """Why the attention cannot be taken apart, by the proof of lean blocks, which sees its weights' gradients."""
    if spec.block_spec is None:
        return "its blocks are not norm, attention, norm and MLP with two residuals"
    if all(block.lean is None for block in plan.blocks):
        plan = verify_lean(model, spec, plan.with_lean(Lean()), stock)
    if any(block.lean is not None and block.lean.attention for block in plan.blocks):
        return None
    return "its attention cannot be taken apart: " + next((n for n in plan.notes if n.startswith("lean att")), "")


def _difference(model: nn.Module, spec: ModelSpec, wanted: BlockPlan, index: int, stock: StockRun | None) -> str | None:
    """What differs from the stock block, by its output and the gradient of its input, or None."""
    with quiet(model):
        stock = stock or run_stock(model, spec.blocks, probe_inputs(model, 1, spec.image_shape))
        (hidden, *_), _, _ = stock.calls[index]
        places = torch.arange(hidden.shape[1], device=hidden.device)
        is_special = (places < spec.num_prefix) | (places >= hidden.shape[1] - spec.num_suffix)
        candidate = BlockPlan(True, lean=wanted.lean, gradient_tokens=wanted.gradient_tokens)
        if candidate.lean is not None:
            candidate = replace(candidate, lean=replace(candidate.lean, num_queries=None))
        output, gradient, aside = _try(model, spec, index, candidate, stock, None)
        if aside is not None:
            return aside
        is_chosen = gradient.abs().amax(dim=(0, 2)) > 0
        share = candidate.gradient_tokens.share  # type: ignore[union-attr]
        special = spec.num_prefix + spec.num_suffix
        count = special + num_kept(share, hidden.shape[1] - special)
        if int(is_chosen.sum()) != count or not bool(is_chosen[is_special].all()):
            return f"gradients reach {int(is_chosen.sum())} tokens instead of {count}"
        expected, of_input, _ = _try(model, spec, index, BlockPlan(True), stock, is_chosen)
    for found, true, what in ((output, expected, "output"), (gradient, of_input, "gradient")):
        error = float((found - true).abs().max() / true.abs().max())
        if error > tolerance(found.dtype):
            return f"the {what} of a parted block differs from the stock block's by {error:.1e}"
    return None


def _try(
    model: nn.Module, spec: ModelSpec, index: int, plan: BlockPlan, stock: StockRun, is_chosen: Tensor | None
) -> tuple[Tensor, Tensor, str | None]:
    """Output of block `index`, gradient of its input, and why it was not parted; the others detached if told which."""
    (hidden, *others), kwargs, _ = stock.calls[index]
    block: Any = model.get_submodule(spec.blocks[index])
    with (
        alone(model, spec, index, plan, hidden) as controller,
        training_mode(block, [block]),  # its parts stay as they are: nothing is dropped
    ):
        tokens = hidden.detach().clone().requires_grad_()
        entering = tokens if is_chosen is None else torch.where(is_chosen[:, None], tokens, tokens.detach())
        seed(model)
        with no_zero_tables(block):
            output = tensors_of(block(entering, *others, **kwargs))[0]
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        if is_chosen is not None:
            weights = weights * is_chosen[:, None]
        (gradient,) = torch.autograd.grad((output * weights).sum(), tokens)
    return output.detach(), gradient, controller.aside.get("gradient tokens")


__all__ = ["verify_gradient_tokens"]
