"""A block as a compiler sees it: each half is a checkpoint region whose policy says what is kept for backward.

The halves are the block's own modules. What a region keeps is what the eager lean halves keep: at `lean="exact"` the
block's input, the products of the first Linears and the attention's output; at `"max"` the input alone, and the
attention's output where weights behind it train. A compiler restores the rest, in kernels of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from peft_bsr.backbones import ModelSpec, ScoreSource, SideInputHooks, run_scored
from peft_bsr.compat.torch_api import activation_memory_budget
from peft_bsr.core import BlockCall
from peft_bsr.engine.bound import BoundBlock, modules_of
from peft_bsr.engine.halves import StockAttention, StockMLP
from peft_bsr.engine.plan import Lean
from peft_bsr.engine.watch import Watch
from peft_bsr.errors import MemoryBudgetWarning

_PRODUCTS = {  # operator -> where its arguments have the left factor
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}
_ATTENTION = ("scaled_dot_product", "flash_attn", "flash_attention", "flex_attention")  # in names of operators
_RANK_SHARE = 8  # a product is kept if it sums over at least an eighth of its width: not a low-rank update
Keeps = Literal["all", "products", "attention", "input"]  # of what happens in a half, for backward


class TracedBlock(BoundBlock):
    """The halves of a block while a compiler traces it.

    Args:
        block: The block.
        spec: Knows its parts.
        side_input_hooks: Selects the alive tokens' part of side inputs.
    """

    def __init__(self, block: Any, spec: ModelSpec, side_input_hooks: SideInputHooks) -> None:
        self.block: Any = block
        self.spec, self.side_input_hooks = spec, side_input_hooks
        if spec.block_spec is not None:
            self.attention, self.mlp = StockAttention(block, spec.block_spec), StockMLP(block, spec.block_spec)
        self.run_attention, self.run_mlp = attention_half, mlp_half

    def asked(self, call: BlockCall) -> BlockCall:
        """The call as the halves need it."""
        return call.traced() if self.spec.block_spec is not None else call

    @property
    def readers(self) -> tuple[str, str, str]:
        """See `half_readers`."""
        found: tuple[str, str, str] = self.block.traced_readers()
        return found

    def _attend(
        self, call: BlockCall, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], split: Any = None
    ) -> tuple[Tensor, list[Any], Tensor | None]:
        arguments, lean, kind = self._arguments(call, tokens, args, kwargs), call.lean, call.score
        keeps: Keeps = "all"
        if lean is not None and lean.attention and not self.readers[1]:
            keeps = self._attention_keeps(lean)
        elif kind is None:
            change, others = self.attention(tokens, arguments)
            return tokens + change, others, None
        asked, *scores = self.run_attention(
            self.attention, self.spec.scores_from, kind, call.num_queries, keeps, tokens, arguments
        )
        return asked, [], scores[0] if scores else None

    def _expand(
        self, call: BlockCall, tokens: Tensor, mix: Callable[[Tensor], Tensor] | None, split: Any = None
    ) -> Tensor:
        lean = call.lean
        if mix is not None:
            return self.mlp(tokens, mix)
        keeps: Keeps = "all"
        if lean is not None and lean.mlp and not self.readers[2]:
            keeps = "products" if lean.save_products and lean.num_queries is None else "input"  # as the eager half
        return self.run_mlp(self.mlp, keeps, tokens)

    def _attention_keeps(self, lean: Lean) -> Keeps:
        if lean.save_products and lean.num_queries is None:
            return "products"
        # for the few tokens that a head reads, products of all tokens would be kept
        places = [leaf for role, leaf in self.spec.paths.items() if role == "attention.output"]
        trains = any(p.requires_grad for leaf in places for p in self.block.get_submodule(leaf).parameters())
        return "attention" if trains else "input"


def attention_half(
    attention: StockAttention,
    source: ScoreSource | None,
    kind: str | None,
    num_queries: int | None,
    keeps: Keeps,
    tokens: Tensor,
    arguments: dict[str, Any],
) -> tuple[Tensor, ...]:
    """The first half of a block as a pure function.

    Args:
        attention: Norm, attention and what follows it.
        source: How scores are had.
        kind: Of the scores asked for, or None.
        num_queries: Tokens that ask, at the front; None = all.
        keeps: What is kept for backward.
        tokens: [B, N, D].
        arguments: Of the attention.

    Returns:
        The tokens that asked, after the half [B, N or Q, D], and scores [B, N] if they were asked for.
    """

    def half(tokens: Tensor) -> tuple[Tensor, ...]:
        run = partial(attention, tokens, arguments)
        scores: Sequence[Tensor]
        if kind is None or source is None:
            change, scores = run()[0], ()
        else:
            change, *scores = run_scored(source, kind, run)
        return (change if num_queries is None else change[:, :num_queries], *scores)

    change, *scores = region(half, keeps, tokens)
    return ((tokens if num_queries is None else tokens[:, :num_queries]) + change, *scores)


def mlp_half(mlp: StockMLP, keeps: Keeps, tokens: Tensor) -> Tensor:
    """The second half of a block as a pure function: tokens [B, N, D] -> the same after it."""
    (after,) = region(lambda tokens: (mlp(tokens),), keeps, tokens)
    return after


def region(run: Callable[[Tensor], tuple[Tensor, ...]], keeps: Keeps, tokens: Tensor) -> tuple[Tensor, ...]:
    """Run a pure function so that a compiler keeps of what happens inside no more for backward than said.

    Args:
        run: Tensors -> tensors; may read other tensors, and changes nothing.
        keeps: What is kept.
        tokens: For it.
    """
    if keeps == "all":
        return run(tokens)
    settings: dict[str, Any] = {"use_reentrant": False}
    if keeps != "input":
        policy = _keep_products if keeps == "products" else _keep_attention
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    outputs: tuple[Tensor, ...] = checkpoint(run, tokens, **settings)
    return outputs


def _keep_products(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what attention gives, and every product but those of a low-rank update."""
    place = _PRODUCTS.get(operator)
    if place is None:
        return _keep_attention(ctx, operator)
    left, right = args[place : place + 2]
    is_kept = _RANK_SHARE * left.shape[-1] >= right.shape[-1]
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what attention gives."""
    name = str(operator)
    is_kept = any(part in name for part in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def half_readers(block: nn.Module, spec: ModelSpec, own: tuple[Any, ...]) -> tuple[str, str, str]:
    """Names of hooks that look at a block, at its first half and at its second, empty for none.

    Args:
        block: The block.
        spec: Knows its parts.
        own: Objects whose hooks are our own.
    """
    parts, every = spec.block_spec, modules_of(block, ())
    watch = Watch(every, own)
    if parts is None:
        return watch.hook or "", "", ""
    attention = (parts.norm1, parts.attention, *parts.after_attention)
    halves = [attention, (parts.norm2, *parts.mlp, *parts.after_mlp)]
    inside = [[m for name in names for m in modules_of(getattr(block, name), ())] for names in halves]
    found = [watch.foreign_hook(modules) or ("capture" if watch.captures(modules) else "") for modules in inside]
    return watch.hook or "", found[0], found[1]


def warn_of_budget(module: nn.Module) -> None:
    """Warn where a compiler would compute random numbers anew for backward.

    With torch's memory budget below 1 it draws others then, and gradients are wrong (pytorch#190758).

    Args:
        module: What is compiled; parts that draw nothing now (rates of 0, evaluation mode) do not count.
    """
    budget = activation_memory_budget()
    if budget >= 1:
        return
    drawing = next((name for name, part in module.named_modules() if part.training and _draws(part)), None)
    if drawing is not None:
        warnings.warn(
            f"`{drawing}` draws random numbers in training, and torch._functorch.config.activation_memory_budget is "
            f"{budget:g}: below 1, torch gives wrong gradients then (pytorch issue 190758). Set the budget to 1, or "
            "the rates of dropout and drop path to 0.",
            MemoryBudgetWarning,
            stacklevel=2,
        )


def _draws(module: nn.Module) -> bool:
    """Whether a rate of dropout or drop path above 0 is among the module's attributes."""
    own = vars(module)
    rates = [
        value
        for name, value in own.items()
        if "drop" in name.lower() or ("Drop" in type(module).__name__ and name == "p")
    ]
    return any(isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0 for rate in rates)


__all__ = ["TracedBlock", "half_readers", "region", "warn_of_budget"]
