"""A part of a block that keeps its tokens alone: backward runs it once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_bsr.core import BackwardContext
from peft_bsr.ops.dropout import generator_at, generator_state
from peft_bsr.ops.half import Compute, refuse_second_derivatives


def recomputed(
    run: Callable[..., tuple[Tensor, ...]], tokens: Tensor, *parameters: Tensor | None, is_random: bool = False
) -> tuple[Tensor, ...]:
    """`run(tokens, *parameters)`, keeping the tokens alone.

    Args:
        run: A function of its arguments that reads nothing else which changes.
        tokens: [B, N, D].
        parameters: Tensors that get gradients, or None.
        is_random: Whether `run` draws random numbers; backward draws the same again.

    Returns:
        What `run` returns.
    """
    outputs: tuple[Tensor, ...] = _Recomputed.apply(run, is_random, tokens, *parameters)
    return outputs


class _RecomputedContext(BackwardContext):
    run: Callable[..., tuple[Tensor, ...]]
    compute: Compute
    state: Tensor | None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _RecomputedContext,
        run: Callable[..., tuple[Tensor, ...]],
        is_random: bool,
        tokens: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.compute = Compute.of(tokens)
        ctx.state = generator_state(tokens.device) if is_random else None
        ctx.run = run
        ctx.set_materialize_grads(False)  # what nobody has used has no gradient
        ctx.save_for_backward(tokens, *parameters)
        return run(tokens, *parameters)

    @staticmethod
    def backward(ctx: _RecomputedContext, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        dtype, casts = ctx.compute
        inputs: list[Any] = [None if t is None else t.detach() for t in ctx.saved_tensors]
        device = inputs[0].device
        needs = ctx.needs_input_grad[2:]
        wanted = [t.requires_grad_() for t, need in zip(inputs, needs, strict=True) if need]
        with (
            torch.enable_grad(),
            torch.autocast(device.type, dtype, enabled=casts),
            generator_at(ctx.state, device),
        ):
            outputs = ctx.run(*inputs)
        asked = [i for i, output in enumerate(outputs) if output.requires_grad and gradients[i] is not None]
        grads = iter(
            torch.autograd.grad([outputs[i] for i in asked], wanted, [gradients[i] for i in asked], allow_unused=True)
        )
        return None, None, *(next(grads) if need else None for need in needs)


__all__ = ["recomputed"]
