"""One block's forward on a route: gather, attention, reduction, MLP, scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peft_bsr.backbones import Anatomy, Column, TokenFollower, apply_part
from peft_bsr.core import BlockRun, pick_tokens, put_tokens, reduce_tokens
from peft_bsr.engine.lean_block import run_lean_attention, run_lean_mlp
from peft_bsr.engine.plan import BlockPlan, Lean, Reduction
from peft_bsr.errors import ForwardError


def forward_block(
    block: nn.Module,
    stock: Callable[..., Any],
    column: Column,
    follower: TokenFollower,
    plan: BlockPlan,
    run: BlockRun,
    hidden_states: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mix: Callable[[Tensor], Tensor | None] | None = None,
) -> tuple[Any, Tensor | None]:
    """Run a block on the tokens of `run.route`; bit-equal to the stock block where all are kept.

    In full view the sequence comes and goes whole: the alive tokens are taken out, run, and put back; dropped ones
    keep the value they had when they were dropped.

    Args:
        block: The block.
        stock: Its own forward.
        column: Knows its parts.
        follower: Selects the alive tokens' part of side inputs.
        plan: Where and how much to reduce, and what not to keep for backward.
        run: The route, and where the scores arrive.
        hidden_states: [B, P + A + S, D], in full view [B, N, D].
        args: For the block.
        kwargs: For the block.
        mix: What runs in the place of the MLP, normed tokens -> their change; None, or one that gives None = the MLP.

    Returns:
        What the stock block returns, with fewer tokens; and the origins behind the reduction [B, A'], None without.
    """
    route, reduction = run.route, plan.reduction
    lean = plan.lean
    whole = hidden_states
    is_partial = route.is_full_view and route.num_tokens < route.full_length
    if is_partial:
        hidden_states = pick_tokens(whole, route.places())
    origins = None
    is_mid_block = reduction is not None and reduction.position == "mid_block"
    if is_mid_block or lean is not None or mix is not None:
        mid_block = reduction if is_mid_block else None
        output, before, origins = _forward_composed(
            block, column, follower, mid_block, lean, run, hidden_states, args, kwargs, mix
        )
    else:
        output = stock(hidden_states, *args, **kwargs)
        before = _tokens(output)
    tokens = _tokens(output)
    if reduction is not None and reduction.position == "after_block":
        tokens, origins = _reduce(reduction, run, tokens)
    if route.is_full_view:
        if origins is not None and route.reduced(origins).num_tokens < route.full_length:
            whole = put_tokens(whole, route.places(), before) if is_partial else before
            tokens = put_tokens(whole, route.reduced(origins).places(), tokens)
        elif is_partial:
            tokens = put_tokens(whole, route.places(), tokens)
    return ((tokens, *output[1:]) if isinstance(output, tuple) else tokens), origins


def _forward_composed(
    block: nn.Module,
    column: Column,
    follower: TokenFollower,
    reduction: Reduction | None,
    lean: Lean | None,
    run: BlockRun,
    hidden_states: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mix: Callable[[Tensor], Tensor | None] | None,
) -> tuple[Any, Tensor, Tensor | None]:
    """The pre-norm block of the Anatomy, with a reduction between its halves, lean halves or another MLP.

    Returns:
        Its output, the tokens between its halves before the reduction, and the origins behind it.
    """
    anatomy = column.anatomy
    assert anatomy is not None, "a plan reduces mid-block, runs lean or mixes only where the block's parts are known"
    arguments = _attention_arguments(block, anatomy, follower.rule.attention_arguments, hidden_states, args, kwargs)
    attended, others = None, []
    if lean is not None and lean.attention:
        attended = run_lean_attention(block, column, lean, run, hidden_states, follower.follow(arguments))
    if attended is None:
        normalized = apply_part(block, anatomy.norm1, hidden_states)
        attended = getattr(block, anatomy.attention)(normalized, **arguments)
        attended, *others = attended if isinstance(attended, tuple) else (attended,)
    for name in anatomy.after_attention:
        attended = apply_part(block, name, attended)
    before = hidden_states[:, : attended.shape[1]] + attended
    residual, origins = (before, None) if reduction is None else _reduce(reduction, run, before)
    expanded = None if mix is None else mix(apply_part(block, anatomy.norm2, residual))
    if expanded is None and lean is not None and lean.mlp:
        expanded = run_lean_mlp(block, anatomy, lean, residual)
    if expanded is None:
        expanded = apply_part(block, anatomy.norm2, residual)
        for name in anatomy.mlp[:-1]:
            expanded = apply_part(block, name, expanded)
        takes = (residual,) if anatomy.mlp_adds_residual else ()
        expanded = apply_part(block, anatomy.mlp[-1], expanded, *takes)
        is_added = anatomy.mlp_adds_residual
    else:
        is_added = False
    for name in () if anatomy.mlp_adds_residual else anatomy.after_mlp:
        expanded = apply_part(block, name, expanded)
    tokens = expanded if is_added else residual + expanded
    return ((tokens, *others) if column.returns_tuple else tokens), before, origins


def _reduce(reduction: Reduction, run: BlockRun, tokens: Tensor) -> tuple[Tensor, Tensor]:
    route, scores = run.route, run.token_scores
    if scores is None:
        raise ForwardError("the attention ran without showing its queries and keys; was its implementation replaced?")
    if not reduction.fuse:
        scores = scores.detach()  # only the choice of tokens depends on them
    origins = route.origins_like(tokens)
    keep = reduction.keep(origins.shape[1], route.num_prefix + route.num_suffix)
    fused_origin = route.fused_origin if reduction.fuse else None
    return reduce_tokens(tokens, origins, scores, route.num_prefix, keep, fused_origin, route.num_suffix)


def _attention_arguments(
    block: nn.Module,
    anatomy: Anatomy,
    compute: Callable[..., dict[str, Any]] | None,
    hidden_states: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """What the block calls its attention with, beside the hidden states."""
    arguments = {**dict(zip(anatomy.block_inputs, args, strict=False)), **kwargs}
    if compute is not None:
        return compute(block, hidden_states, arguments)
    names = anatomy.attention_inputs
    return arguments if names is None else {n: value for n, value in arguments.items() if n in names}


def _tokens(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
