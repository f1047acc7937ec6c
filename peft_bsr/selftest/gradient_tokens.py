"""Check at attach that a block with `gradient_tokens` below 1 equals the stock block, with gradients of those tokens.

Such a block is split: only the chosen tokens carry gradients.
"""

from __future__ import annotations

from dataclasses import replace

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
from peft_bsr.selftest.reduction import single_block, training_mode


def verify_gradient_tokens(model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None = None) -> None:
    """Check the first split block, if there is one. The model is not changed.

    Args:
        model: The model.
        spec: Description of the model.
        plan: The plan, after the other checks.
        stock: The probe's forward. Default None: a new one is run.

    Raises:
        ConfigError: If a block cannot be split, with the reason.
    """
    split = [i for i, block in enumerate(plan.blocks) if block.gradient_tokens is not None and block.in_graph]
    if not split:
        return
    problem = (
        _drop_path(model, spec, split)
        or _opaque_attention(model, spec, plan, stock)
        or _difference(model, spec, plan.blocks[split[0]], split[0], stock)
    )
    if problem is not None:
        raise ConfigError(
            f"{type(model).__name__}: `gradient_tokens` below 1 is not possible on this model: {problem}. Use 1.0."
        )


def _drop_path(model: nn.Module, spec: ModelSpec, split: list[int]) -> str | None:
    """DropPath drops a path for a whole image, but the two parts of a split block would draw separately."""
    for index in split:
        for name, module in model.get_submodule(spec.blocks[index]).named_modules():
            rate = getattr(module, "drop_prob", None)
            if "DropPath" in type(module).__name__ and isinstance(rate, float) and rate > 0:
                return (
                    f"block {index} drops whole paths in training (`{name}`, rate {rate:g}), and would drop them for "
                    "some tokens of an image only; load the model with `drop_path_rate=0.0`"
                )
    return None


def _opaque_attention(model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None) -> str | None:
    """Why the attention cannot be taken apart, from the check of lean blocks, or None."""
    if spec.block_spec is None:
        return "its blocks are not norm, attention, norm and MLP with two residuals"
    if all(block.lean is None for block in plan.blocks):
        plan = verify_lean(model, spec, plan.with_lean(Lean()), stock)
    if any(b.lean is not None and b.lean.attention and not b.lean.as_modules for b in plan.blocks):
        return None
    itself = "it runs as the block's own modules, because it computes rotations or biases itself"
    return "its attention cannot be taken apart: " + next((n for n in plan.notes if n.startswith("lean att")), itself)


def _difference(model: nn.Module, spec: ModelSpec, wanted: BlockPlan, index: int, stock: StockRun | None) -> str | None:
    """How the output or the gradient of the input differs from the stock block's, or None."""
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
        assert candidate.gradient_tokens is not None
        count = spec.num_special + num_kept(candidate.gradient_tokens.share, hidden.shape[1] - spec.num_special)
        if int(is_chosen.sum()) != count or not bool(is_chosen[is_special].all()):
            return f"gradients reach {int(is_chosen.sum())} tokens instead of {count}"
        expected, of_input, _ = _try(model, spec, index, BlockPlan(True), stock, is_chosen)
    for found, true, what in ((output, expected, "output"), (gradient, of_input, "gradient")):
        error = float((found - true).abs().max() / true.abs().max())
        if error > tolerance(found.dtype):
            return f"the {what} of a split block differs from the stock block's by {error:.1e}"
    return None


def _try(
    model: nn.Module, spec: ModelSpec, index: int, plan: BlockPlan, stock: StockRun, is_chosen: Tensor | None
) -> tuple[Tensor, Tensor, str | None]:
    """Output of block `index`, gradient of its input (of the chosen tokens only), and why it was not split."""
    (hidden, *others), kwargs, _ = stock.calls[index]
    block = model.get_submodule(spec.blocks[index])
    with (
        single_block(model, spec, index, plan, hidden) as controller,
        training_mode(block, [block]),  # not its parts: no dropout
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
