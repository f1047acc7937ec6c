"""A block under `torch.compile`: each half is a checkpoint region with a policy for what is kept for backward.

The halves are the block's own modules. A region keeps what the eager lean halves keep: at `lean="exact"` the block's
input, the products of the first Linears and the attention's output; at `"max"` only the input, and the attention's
output if the output projection trains. The compiler recomputes the rest.
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
from peft_bsr.core import BlockCall, TokenSplit
from peft_bsr.engine.bound import BoundBlock, modules_of
from peft_bsr.engine.halves import StockAttention, StockMLP
from peft_bsr.engine.plan import Lean
from peft_bsr.engine.watch import Watch
from peft_bsr.errors import MemoryBudgetWarning

_PRODUCTS: dict[object, int] = {  # operator -> position of the left factor in its arguments
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}
_ATTENTION = ("scaled_dot_product", "flash_attn", "flash_attention", "flex_attention")  # parts of operator names
_RANK_SHARE = 8  # a product is kept if it sums over at least 1/8 of its width; a low-rank update does not
Keeps = Literal["all", "products", "attention", "input"]  # what a half keeps for backward


class TracedBlock(BoundBlock):
    """The halves of a block while a compiler traces it.

    Args:
        block: The block.
        spec: Description of the model.
        side_input_hooks: Selects the alive tokens' part of side inputs.
    """

    def __init__(self, block: nn.Module, spec: ModelSpec, side_input_hooks: SideInputHooks) -> None:
        self.block: Any = block  # a ControlledBlock
        self.spec, self.side_input_hooks = spec, side_input_hooks
        if spec.block_spec is not None:
            self.attention, self.mlp = StockAttention(block, spec.block_spec), StockMLP(block, spec.block_spec)
        self.run_attention, self.run_mlp = attention_half, mlp_half

    def adapted(self, call: BlockCall) -> BlockCall:
        """The call as the halves need it."""
        return call.traced() if self.spec.block_spec is not None else call

    @property
    def readers(self) -> tuple[str, str, str]:
        """See `half_readers`."""
        readers: tuple[str, str, str] = self.block.traced_readers()
        return readers

    def _attend(
        self,
        call: BlockCall,
        tokens: Tensor,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        split: TokenSplit | None = None,
    ) -> tuple[Tensor, list[object], Tensor | None]:
        arguments, lean, kind = self._arguments(call, tokens, args, kwargs), call.lean, call.score
        keeps: Keeps = "all"
        if lean is not None and lean.attention and self._may_drop("attention", self._attention_obstacle(call)):
            keeps = self._attention_keeps(lean)
        elif kind is None:
            change, others = self.attention(tokens, arguments)
            return tokens + change, others, None
        asked, *scores = self.run_attention(
            self.attention, self.spec.scores_from, kind, call.num_queries, keeps, tokens, arguments
        )
        return asked, [], scores[0] if scores else None

    def _expand(
        self,
        call: BlockCall,
        tokens: Tensor,
        mix: Callable[[Tensor], Tensor] | None,
        split: TokenSplit | None = None,
    ) -> Tensor:
        lean = call.lean
        if mix is not None:
            return self.mlp(tokens, mix)
        keeps: Keeps = "all"
        if lean is not None and lean.mlp and self._may_drop("mlp", self.readers[2]):
            keeps = "products" if lean.save_products and lean.num_queries is None else "input"  # as the eager half
        return self.run_mlp(self.mlp, keeps, tokens)

    def _may_drop(self, half: str, obstacle: str) -> bool:
        """Whether a half that is planned lean can be a region; the obstacle, empty for none, is recorded."""
        if obstacle:
            self.block.traced_note(half, obstacle)
        return not obstacle

    def _attention_obstacle(self, call: BlockCall) -> str:
        """Why the attention half cannot be a region, empty if it can."""
        if self.side_input_hooks.rule.position_bias is not None and call.route.origins is not None:
            # the running block's route gathers it; in a region, dynamo fails on that at several image sizes
            return "a compiler does not follow position biases of fewer tokens in a region"
        if call.score is not None and self.spec.scores_from == "sdpa":  # seen by a mode, which dynamo has in no region
            return "a compiler does not show the scores of this attention in a region"
        return self.readers[1]

    def _attention_keeps(self, lean: Lean) -> Keeps:
        if lean.save_products and lean.num_queries is None:
            return "products"
        # products of all tokens would be kept, although the head reads few of them
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
    arguments: dict[str, object],
) -> tuple[Tensor, ...]:
    """The first half of a block as a pure function.

    Args:
        attention: Norm, attention and what follows it.
        source: Source of token scores.
        kind: Kind of token score, or None.
        num_queries: Number of first tokens that are used as queries; None = all.
        keeps: What is kept for backward.
        tokens: [B, N, D].
        arguments: Arguments of the attention other than the tokens.

    Returns:
        The tokens used as queries, after the half [B, N or Q, D], and scores [B, N] if asked for.
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
    """The second half of a block as a pure function: tokens [B, N, D] -> tokens [B, N, D]."""
    (after,) = region(lambda tokens: (mlp(tokens),), keeps, tokens)
    return after


def region(run: Callable[[Tensor], tuple[Tensor, ...]], keeps: Keeps, tokens: Tensor) -> tuple[Tensor, ...]:
    """Run a pure function in a checkpoint region, which limits what a compiler keeps for backward.

    Args:
        run: Tokens -> tensors; may read other tensors, and changes nothing.
        keeps: What is kept for backward.
        tokens: Argument of `run`.
    """
    if keeps == "all":
        return run(tokens)
    settings: dict[str, Any] = {"use_reentrant": False}
    if keeps != "input":
        policy = _keep_products if keeps == "products" else _keep_attention
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    outputs: tuple[Tensor, ...] = checkpoint(run, tokens, **settings)
    return outputs


def _keep_products(ctx: object, operator: object, *args: Any, **kwargs: object) -> CheckpointPolicy:
    """Keep the attention's output, and all products except those of low-rank updates."""
    place = _PRODUCTS.get(operator)
    if place is None:
        return _keep_attention(ctx, operator)
    left, right = args[place : place + 2]
    is_kept = _RANK_SHARE * left.shape[-1] >= right.shape[-1]
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention(ctx: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Keep the attention's output."""
    name = str(operator)
    is_kept = any(part in name for part in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def half_readers(block: nn.Module, spec: ModelSpec, own: tuple[object, ...]) -> tuple[str, str, str]:
    """Name of a user's hook on a block, and why its attention half and its MLP half must run as they are, or empty.

    Args:
        block: The block.
        spec: Description of the model.
        own: Objects whose hooks are ignored, because they are this package's.
    """
    parts, every = spec.block_spec, modules_of(block, ())
    watch = Watch(every, own)
    if parts is None:
        return watch.hook or "", "", ""
    attention = (parts.norm1, parts.attention, *parts.after_attention)
    halves = [attention, (parts.norm2, *parts.mlp, *parts.after_mlp)]
    inside = [[m for name in names for m in modules_of(getattr(block, name), ())] for names in halves]
    capture = "output_capturing_hook"
    hooks = [watch.foreign_hook(modules) or (capture if watch.captures(modules) else "") for modules in inside]
    reasons = [hook and f"the hook {hook} looks at its modules" for hook in hooks]
    return watch.hook or "", reasons[0], reasons[1]


def warn_of_budget(module: nn.Module) -> None:
    """Warn if compiled code would draw random numbers again in backward.

    With torch's memory budget below 1, it draws other numbers, and gradients are wrong (pytorch#190758).

    Args:
        module: The module that is compiled. Parts with rates of 0 or in evaluation mode do not count.
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
    """Whether an attribute of the module is a dropout or drop path rate above 0."""
    own = vars(module)
    rates = [
        value
        for name, value in own.items()
        if "drop" in name.lower() or ("Drop" in type(module).__name__ and name == "p")
    ]
    return any(isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0 for rate in rates)


__all__ = ["TracedBlock", "half_readers", "region", "warn_of_budget"]
