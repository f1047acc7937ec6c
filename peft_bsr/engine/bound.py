"""A block's parts, looked up once, and how it runs on a route with them.

Shapes: B images, N tokens of the sequence, A alive ones, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec, SideInputHooks
from peft_bsr.compat.transformers_api import captured_outputs
from peft_bsr.core import BlockCall, Route, pick_tokens, put_tokens
from peft_bsr.engine.halves import LeanAttention, LeanMLP, NotLeanError, StockAttention, StockMLP
from peft_bsr.engine.plan import Reduction
from peft_bsr.engine.watch import Watch
from peft_bsr.errors import ForwardError
from peft_bsr.ops import merge_tokens, reduce_tokens


class BoundBlock:
    """The halves of a block, stock and lean. Tensors are read at each call; modules were looked up once.

    Args:
        block: The block.
        spec: Knows its parts.
        side_input_hooks: Selects the alive tokens' part of side inputs.
        own: Objects whose hooks on the block are our own.
        aside: Told (half, reason) where a half that was planned lean runs stock.

    Attributes:
        reasons: Why a half cannot run lean, by `"attention"` and `"mlp"`; empty where both can.
        watch: Whether all this still holds.
    """

    def __init__(
        self,
        block: nn.Module,
        spec: ModelSpec,
        side_input_hooks: SideInputHooks,
        own: tuple[Any, ...],
        aside: Callable[[str, str], None],
    ) -> None:
        self.block, self.spec, self.side_input_hooks, self.aside = block, spec, side_input_hooks, aside
        self.reasons: dict[str, str] = {}
        self._captures = False  # whether transformers can capture what the attention gives
        self.lean_attention: LeanAttention | None = None
        self.lean_mlp: LeanMLP | None = None
        if spec.block_spec is not None:
            self.attention, self.mlp = StockAttention(block, spec.block_spec), StockMLP(block, spec.block_spec)
        self.watch = Watch(modules_of(block, own), (side_input_hooks, *own))
        if spec.block_spec is not None:
            parts = spec.block_spec
            attention = (parts.norm1, parts.attention, *parts.after_attention)
            self.lean_attention = self._lean("attention", LeanAttention, *attention)
            self.lean_mlp = self._lean("mlp", LeanMLP, parts.norm2, *parts.mlp, *parts.after_mlp)

    def asked(self, call: BlockCall) -> BlockCall:
        """The call as the halves need it."""
        return call

    def run(
        self,
        call: BlockCall,
        stock: Callable[..., Any],
        hidden_states: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mix: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Run the block on the tokens of `call.route`; bit-equal to the stock block where all are kept.

        In full view the sequence comes and goes whole: the alive tokens are taken out, run, and put back; dropped ones
        keep the value they had when they were dropped, merged ones have that of the token that they are part of.

        Args:
            call: What is asked.
            stock: The block's own forward.
            hidden_states: [B, A, D], in full view [B, N, D].
            args: For the block.
            kwargs: For the block.
            mix: What runs in the place of the MLP, normalized tokens -> their change, or None.

        Returns:
            What the stock block returns, with fewer tokens; and after a reduction the origins [B, A], and where it
            merges, what each patch is part of [B, M].
        """
        route, reduction, whole = call.route, call.plan.reduction, hidden_states
        is_partial = route.is_full_view and route.num_tokens < route.full_length
        tokens = pick_tokens(whole, route.places()) if is_partial else whole
        is_mid_block = reduction is not None and reduction.position == "mid_block"
        scores: Tensor | None = None
        left: list[Tensor] = []
        if is_mid_block or call.lean is not None or mix is not None or (call.is_traced and call.score is not None):
            tokens, others, scores = self._attend(call, tokens, args, kwargs)
            before = tokens
            if is_mid_block:
                tokens, *left = _reduced(reduction, route, scores, tokens)
            tokens = self._expand(call, tokens, mix)
            output = (tokens, *others) if self.spec.returns_tuple else tokens
        else:
            output = stock(tokens, *args, **kwargs)
            before = tokens = output[0] if isinstance(output, tuple) else output
            scores = call.token_scores
        if reduction is not None and not is_mid_block:
            tokens, *left = _reduced(reduction, route, scores, tokens)
        if route.is_full_view:
            after = route.reduced(*left) if left else route
            if after.merged is not None:
                tokens = after.unmerge(tokens)
            elif after.num_tokens < route.full_length:
                if left:
                    whole = put_tokens(whole, route.places(), before) if is_partial else before
                tokens = put_tokens(whole, after.places(), tokens)
        return ((tokens, *output[1:]) if isinstance(output, tuple) else tokens), tuple(left)

    def _attend(
        self, call: BlockCall, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, list[Any], Tensor | None]:
        """Tokens after the first half [B, A or Q, D], what else the attention returns, and scores if any are asked."""
        arguments, lean = self._arguments(call, tokens, args, kwargs), call.lean
        if lean is not None and lean.attention:
            half, reason = self.lean_attention, self.reasons.get("attention")
            if half is not None:
                reason = half.problem(arguments)
                if self._captures and captured_outputs() - {"hidden_states"}:
                    reason = "attention weights are captured"
                if reason is None:
                    change = half(call, tokens, self.side_input_hooks.gather(arguments), lean)
                    asked = tokens if lean.num_queries is None else tokens[:, : lean.num_queries]
                    return asked + change, [], call.token_scores
            self.aside("attention", str(reason))
        change, others = self.attention(tokens, arguments)
        return tokens + change, others, call.token_scores

    def _expand(self, call: BlockCall, tokens: Tensor, mix: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Tokens after the second half."""
        lean = call.lean
        if mix is None and lean is not None and lean.mlp:
            if self.lean_mlp is not None:
                return self.lean_mlp(tokens, lean)
            self.aside("mlp", self.reasons["mlp"])
        return self.mlp(tokens, mix)

    def _arguments(
        self, call: BlockCall, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What the block calls its attention with, next to the hidden states."""
        block_spec, compute = self.spec.block_spec, self.side_input_hooks.rule.attention_arguments
        assert block_spec is not None, "only a block whose parts are known is taken apart"
        arguments = {**dict(zip(block_spec.block_inputs, args, strict=False)), **kwargs} if args else kwargs
        if compute is not None:
            return compute(self.block, tokens, arguments)
        names = block_spec.attention_inputs
        return arguments if names is None else {n: value for n, value in arguments.items() if n in names}

    def _lean(self, name: str, half: Callable[..., Any], *parts: str) -> Any:
        try:
            made = half(self.block, self.spec)
        except NotLeanError as reason:
            self.reasons[name] = str(reason)
            return None
        inside = [m for part in parts for m in modules_of(getattr(self.block, part), made.called)]
        hook = self.watch.foreign_hook(inside)
        self._captures |= name == "attention" and self.watch.captures(inside)
        replaced = next((type(module).__name__ for module in inside if "forward" in vars(module)), None)
        if hook is not None:
            self.reasons[name] = f"the hook {hook} looks at its modules"
        elif replaced is not None:
            self.reasons[name] = f"another `forward` was set on its {replaced}"
        return None if name in self.reasons else made

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the block looks its own parts up
        return type(None), ()


def modules_of(module: Any, without: tuple[Any, ...]) -> list[Any]:
    """The module and all in it, but for modules that are named and what is in these."""
    if not isinstance(module, nn.Module) or module in without:
        return []
    return [module, *(m for child in module.children() for m in modules_of(child, without))]


def _reduced(reduction: Reduction | None, route: Route, scores: Tensor | None, tokens: Tensor) -> tuple[Tensor, ...]:
    """The tokens that the reduction leaves, their origins, and if it merges, what each patch is part of."""
    assert reduction is not None, "only blocks with a reduction reduce"
    special = route.num_prefix + route.num_suffix
    keep = reduction.keep(route.num_tokens - special, special, route.full_length)
    if reduction.merges:
        origins, merged = route.origins_like(tokens), route.merged_like(tokens)
        return merge_tokens(tokens, origins, merged, route.num_prefix, keep, route.num_suffix)
    if scores is None:
        raise ForwardError("the attention ran without showing its queries and keys; was its implementation replaced?")
    if not reduction.fuse:
        scores = scores.detach()  # only the choice of tokens depends on them
    fused_origin = route.fused_origin if reduction.fuse else None
    return reduce_tokens(tokens, route.origins, scores, route.num_prefix, keep, fused_origin, route.num_suffix)


__all__ = ["BoundBlock", "modules_of"]
