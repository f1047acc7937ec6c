"""A block's parts, looked up once, and how it runs on a route with them.

Shapes: B images, N tokens of the sequence, A alive ones, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_bsr.backbones import AttentionScorer, ModelSpec, SideInputHooks
from peft_bsr.compat.transformers_api import captured_outputs
from peft_bsr.core import BlockCall, Route, TokenSplit, pick_tokens, put_tokens, select_tokens
from peft_bsr.engine.halves import LeanMLP, NotLeanError, StockAttention, StockMLP
from peft_bsr.engine.parted import PartedAttention
from peft_bsr.engine.plan import GradientTokens, Reduction
from peft_bsr.engine.watch import Watch
from peft_bsr.errors import ForwardError
from peft_bsr.ops import KeepNormInputs, merge_tokens, reduce_tokens

BlockOutput = Tensor | tuple[Any, ...]  # the tokens, alone or first in a tuple
_NOT_AFTER_A_NORM = (
    "its projections do not get the output of a LayerNorm as it is: windows, pooling or a grid are in between. "
    '`lean="max"` computes the attention again in backward'
)
LeanHalf = TypeVar("LeanHalf", PartedAttention, LeanMLP)


class BoundBlock:
    """The halves of a block, original and lean. Modules are looked up once; tensors are read in each call.

    Args:
        block: The block.
        spec: Description of the model.
        side_input_hooks: Selects the alive tokens' part of side inputs.
        own: Objects whose hooks on the block are ignored, because they are this package's.
        aside: Called with (half, reason) if a half that was planned lean runs as the original.

    Attributes:
        reasons: `"attention"` or `"mlp"` -> why this half cannot run lean. Empty if both can.
        reader: Name of a hook of the user inside the block, or None.
        watch: Detects changes after which the block must be looked up again.
    """

    def __init__(
        self,
        block: nn.Module,
        spec: ModelSpec,
        side_input_hooks: SideInputHooks,
        own: tuple[object, ...],
        aside: Callable[[str, str], None],
    ) -> None:
        self.block, self.spec, self.side_input_hooks, self.aside = block, spec, side_input_hooks, aside
        self.reasons: dict[str, str] = {}
        self._captures = False  # whether transformers can capture the attention's outputs
        self._obstacle: str | None = None  # why the attention's modules must run once
        self.lean_attention: PartedAttention | None = None
        self.lean_mlp: LeanMLP | None = None
        if spec.block_spec is not None:
            self.attention, self.mlp = StockAttention(block, spec.block_spec), StockMLP(block, spec.block_spec)
        self.watch = Watch(modules_of(block, own), (side_input_hooks, *own))
        if spec.block_spec is not None:
            parts = spec.block_spec
            attention = (parts.norm1, parts.attention, *parts.after_attention)
            inside = [m for part in attention for m in modules_of(getattr(block, part), ())]
            self._obstacle, self._captures = self.watch.obstacle(inside), self.watch.captures(inside)
            self.lean_attention = self._lean("attention", PartedAttention, *attention)
            self.lean_mlp = self._lean("mlp", LeanMLP, parts.norm2, *parts.mlp, *parts.after_mlp)
        inside = [m for child in block.children() for m in modules_of(child, own)]
        self.reader = self.watch.foreign_hook(inside)

    def adapted(self, call: BlockCall) -> BlockCall:
        """The call as the halves need it."""
        return call

    def run(
        self,
        call: BlockCall,
        stock: Callable[..., BlockOutput],
        hidden_states: Tensor,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        mix: Callable[[Tensor], Tensor] | None,
    ) -> tuple[BlockOutput, tuple[Tensor, ...]]:
        """Run the block on the tokens of `call.route`. Bit-equal to the original block if all tokens are kept.

        In full view, input and output have the full length: the alive tokens are selected, run, and written back.
        Dropped tokens keep their last value, merged ones have the value of the token that contains them.

        Args:
            call: Settings for this call.
            stock: The block's own forward.
            hidden_states: [B, A, D], in full view [B, N, D].
            args: Further arguments for the block.
            kwargs: Keyword arguments for the block.
            mix: Function that replaces the MLP, normalized tokens -> their change, or None.

        Returns:
            The block's output, with fewer tokens after a reduction; then also the origins [B, A], and after merging
            the origin of the token that contains each patch [B, M].
        """
        route, reduction, whole = call.route, call.plan.reduction, hidden_states
        is_partial = route.is_full_view and route.num_tokens < route.full_length
        tokens = pick_tokens(whole, route.places()) if is_partial else whole
        is_mid_block = reduction is not None and reduction.position == "mid_block"
        output: BlockOutput
        scores: Tensor | None = None
        left: list[Tensor] = []
        split = self._begin_split(call, tokens, args, kwargs)
        is_lean = call.lean is not None and self.spec.whole_block is None
        is_taken_apart = is_mid_block or is_lean or mix is not None or split is not None
        if is_taken_apart or (call.is_traced and call.score is not None):
            tokens, others, scores = self._attend(call, tokens, args, kwargs, split)
            before = tokens
            if is_mid_block:
                tokens, *left = _reduced(reduction, route, scores, tokens)
                split = self._end_split(call, scores, tokens)
            tokens = self._expand(call, tokens, mix, split)
            output = (tokens, *others) if self.spec.returns_tuple else tokens
        else:
            output = stock(tokens, *args, **kwargs)
            before = tokens = output[0] if isinstance(output, tuple) else output
            scores = call.token_scores
        if reduction is not None and not is_mid_block:
            tokens, *left = _reduced(reduction, route, scores, tokens)
        if not is_mid_block:
            self._end_split(call, scores, tokens)
        if route.is_full_view:
            after = route.reduced(*left) if left else route
            if after.merged is not None:
                tokens = after.unmerge(tokens)
            elif after.num_tokens < route.full_length:
                if left:
                    whole = put_tokens(whole, route.places(), before) if is_partial else before
                tokens = put_tokens(whole, after.places(), tokens)
        return ((tokens, *output[1:]) if isinstance(output, tuple) else tokens), tuple(left)

    @property
    def _capture(self) -> str | None:
        """Why the attention's outputs are needed in this forward, or None."""
        is_captured = self._captures and captured_outputs() - {"hidden_states"}
        return "attention weights are captured" if is_captured else None

    def _stock_reason(self, arguments: dict[str, object]) -> str | None:
        """Why the attention half runs as stock modules in this call, or None."""
        if self.lean_attention is None:
            return self.reasons.get("attention")
        return self._capture or self.lean_attention.problem(arguments)

    def _begin_split(
        self, call: BlockCall, tokens: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> TokenSplit | None:
        """Which tokens [B, A, D] carry gradients in the block; selected here if no earlier block did. None = all."""
        if not call.splits or not call.plan.in_graph:
            return None
        half, arguments = self.lean_attention, self._arguments(call, tokens, args, kwargs)
        reason = self._stock_reason(arguments) or (self.reader and f"the hook {self.reader} looks at its modules")
        if half is None or reason is not None:
            self.aside("gradient tokens", str(reason))
            return None
        split = call.split
        if split is None:
            wanted = call.plan.gradient_tokens
            found = None
            if wanted.score is not None:
                found = half.scores(wanted.score, tokens, self.side_input_hooks.gather(arguments))
            # not kept in `call.split`: a recomputation selects again, so that later random numbers are the same
            split = call.split_after = _split(wanted, call.route, found, tokens)
        return split

    def _end_split(self, call: BlockCall, scores: Tensor | None, tokens: Tensor) -> TokenSplit | None:
        """Which tokens [B, A, D], after attention and reduction, carry gradients from now on. None = all.

        After a reduction, they are selected again among the tokens that it keeps. Without one, only a block that no
        gradient reaches selects them, for the next block.
        """
        if call.splits and scores is not None:
            reduction, route = call.plan.reduction, call.route
            if reduction is not None:
                scores = _scores_of_kept(reduction, route, scores.detach())
            if reduction is not None or not call.plan.in_graph:
                call.split_after = _split(call.plan.gradient_tokens, route, scores, tokens)
        return call.split_after

    def _attend(
        self,
        call: BlockCall,
        tokens: Tensor,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        split: TokenSplit | None = None,
    ) -> tuple[Tensor, list[object], Tensor | None]:
        """Tokens after the first half [B, A or Q, D], other outputs of the attention, and scores if asked for."""
        arguments, lean = self._arguments(call, tokens, args, kwargs), call.lean
        if split is not None:
            assert self.lean_attention is not None, "checked in `_begin_split`"
            gathered = self.side_input_hooks.gather(arguments)
            chosen, others = self.lean_attention.parted(call, split, tokens, gathered, lean)
            is_whole = chosen.shape[1] == split.chosen.shape[1]
            return split.join(chosen, others) if is_whole else chosen, [], call.token_scores
        if lean is not None and lean.attention and lean.as_modules and lean.save_products:
            with norm_inputs_kept(self.block, [self.spec.attention], self.aside):
                change, returned = self.attention(tokens, arguments)
            return tokens + change, returned, call.token_scores
        if lean is not None and lean.attention and lean.as_modules:
            if (reason := self._capture or self._obstacle) is None:
                change, scores = self._attend_twice(call, tokens, arguments)
                return tokens + change, [], scores
            self.aside("attention", reason)
        elif lean is not None and lean.attention:
            half, reason = self.lean_attention, self._stock_reason(arguments)
            if half is not None and reason is None:
                change = half(call, tokens, self.side_input_hooks.gather(arguments), lean)
                asked = tokens if lean.num_queries is None else tokens[:, : lean.num_queries]
                return asked + change, [], call.token_scores
            self.aside("attention", str(reason))
        change, returned = self.attention(tokens, arguments)
        return tokens + change, returned, call.token_scores

    def _attend_twice(
        self, call: BlockCall, tokens: Tensor, arguments: dict[str, object]
    ) -> tuple[Tensor, Tensor | None]:
        """Change [B, A, D] by the block's own modules, and scores if asked for; backward runs them again."""
        context = self.side_input_hooks.context
        scorer = AttentionScorer(context)

        def run(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            now = context.now
            earlier, now.running, call.token_scores = now.running, call, None
            try:
                with scorer.watching(None if call.score is None else self.spec.scores_from):
                    change, _ = self.attention(tokens, arguments)
                return change, call.token_scores
            finally:
                now.running, call.token_scores = earlier, None

        found: tuple[Tensor, Tensor | None] = checkpoint(run, tokens, use_reentrant=False)
        call.token_scores = found[1]
        return found

    def _expand(
        self,
        call: BlockCall,
        tokens: Tensor,
        mix: Callable[[Tensor], Tensor] | None,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """Tokens after the second half."""
        lean = call.lean
        if split is not None and (lean is None or lean.num_queries is None):
            chosen, others = split.part(tokens)
            chosen = self._expand(call, chosen, mix)
            with torch.no_grad():
                others = self._expand(call, others, mix)
            return split.join(chosen, others)
        if mix is None and lean is not None and lean.mlp:
            if self.lean_mlp is not None:
                return self.lean_mlp(tokens, lean)
            self.aside("mlp", self.reasons["mlp"])
        return self.mlp(tokens, mix)

    def _arguments(
        self, call: BlockCall, tokens: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> dict[str, object]:
        """The arguments of the block's attention other than the hidden states."""
        block_spec, compute = self.spec.block_spec, self.side_input_hooks.rule.attention_arguments
        assert block_spec is not None, "only blocks with known parts are split into halves"
        arguments = {**dict(zip(block_spec.block_inputs, args, strict=False)), **kwargs} if args else kwargs
        if compute is not None:
            return compute(self.block, tokens, arguments)
        names = block_spec.attention_inputs
        return arguments if names is None else {n: value for n, value in arguments.items() if n in names}

    def _lean(self, name: str, half: Callable[[nn.Module, ModelSpec], LeanHalf], *parts: str) -> LeanHalf | None:
        """The lean half with these parts, or None. `reasons` then says why."""
        try:
            made = half(self.block, self.spec)
        except NotLeanError as reason:
            self.reasons[name] = str(reason)
            return None
        inside = [m for part in parts for m in modules_of(getattr(self.block, part), made.called)]
        if (obstacle := self.watch.obstacle(inside)) is not None:
            self.reasons[name] = obstacle
            return None
        return made

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # a copy of the block looks up its own parts
        return type(None), ()


def modules_of(module: object, without: tuple[object, ...]) -> list[nn.Module]:
    """The module and its submodules, except those in `without` and their submodules; empty if it is not a module."""
    if not isinstance(module, nn.Module) or module in without:
        return []
    return [module, *(m for child in module.children() for m in modules_of(child, without))]


def _reduced(reduction: Reduction | None, route: Route, scores: Tensor | None, tokens: Tensor) -> tuple[Tensor, ...]:
    """Tokens after the reduction, their origins, and after merging the origin of the token that contains each patch."""
    assert reduction is not None, "only blocks with a reduction reduce"
    special = route.num_prefix + route.num_suffix
    keep = reduction.keep(route.num_tokens - special, special, route.full_length)
    if reduction.merges:
        origins, merged = route.origins_like(tokens), route.merged_like(tokens)
        return merge_tokens(tokens, origins, merged, route.num_prefix, keep, route.num_suffix)
    if scores is None:
        raise ForwardError("the attention's queries and keys were not seen; was its implementation replaced?")
    if not reduction.fuse:
        scores = scores.detach()  # only the choice of tokens depends on them
    fused_origin = route.fused_origin if reduction.fuse else None
    return reduce_tokens(tokens, route.origins, scores, route.num_prefix, keep, fused_origin, route.num_suffix)


def _scores_of_kept(reduction: Reduction, route: Route, scores: Tensor) -> Tensor:
    """Scores of the tokens after the reduction, from those before it [B, A]; the fused token ranks first."""
    start, end = route.num_prefix, scores.shape[1] - route.num_suffix
    competing = scores[:, start:end]
    keep = reduction.keep(end - start, route.num_prefix + route.num_suffix, route.full_length)
    kept = competing.gather(1, select_tokens(competing, keep)[0])
    is_fused = reduction.fuse and keep < end - start
    fused = kept.new_full((kept.shape[0], int(is_fused)), float("inf"))
    return torch.cat([scores[:, :start], kept, fused, scores[:, end:]], dim=1)


def _split(wanted: GradientTokens, route: Route, scores: Tensor | None, tokens: Tensor) -> TokenSplit | None:
    """Select the tokens [B, A, D] that carry gradients, by their scores [B, A]; None = all."""
    if wanted.score is None or scores is None:
        scores = torch.rand(tokens.shape[:2], device=tokens.device)
    return TokenSplit.of(scores.detach(), wanted.share, route.num_prefix, route.num_suffix)


@contextmanager
def norm_inputs_kept(block: nn.Module, attentions: Sequence[str], aside: Callable[[str, str], None]) -> Iterator[None]:
    """Context in which attentions that run as modules keep the norm's input; `aside` is called if they do not."""
    with KeepNormInputs(p for name in attentions for p in block.get_submodule(name).parameters()) as kept:
        yield
    if not kept.found:
        aside("attention", _NOT_AFTER_A_NORM)


__all__ = ["BoundBlock", "modules_of", "norm_inputs_kept"]
