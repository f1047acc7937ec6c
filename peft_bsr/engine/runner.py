"""Makes a model's blocks follow a plan. The one file that changes a block's class.

Each block gets a child module, its router, and a subclass of its own class with the same name (state-dict keys,
`isinstance`, output capture and FSDP's wrapping stay intact). The block's *call* takes the running forward's route from
the carrier and hands it to `forward` as a keyword. Gradient checkpointing, wherever transformers puts it (around
`forward`, in earlier versions around the call of `nn.Module`), lies inside: a recomputation gets the very route of its
own forward. Reading "the latest route" there was wrong by 0.6 to 1.1, silently.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import Anatomy, Column, ScoringConfig
from peft_bsr.core import num_kept, reduce_tokens
from peft_bsr.engine.plan import BlockPlan, Reduction
from peft_bsr.engine.route import Route, RouteCarrier

_ROUTER = "token_router"


class BlockRouter(nn.Module):
    """What a block needs to follow its plan. No parameters.

    Args:
        index: The block's place in the column.
        column: The model's column.
        carrier: Shared by the routers of one model.
        block_plan: What to do; a tuner's router answers per adapter instead.
    """

    def __init__(self, index: int, column: Column, carrier: RouteCarrier, block_plan: BlockPlan | None = None) -> None:
        super().__init__()
        self.index = index
        self.column = column
        self.carrier = carrier
        self._block_plan = block_plan

    @property
    def block_plan(self) -> BlockPlan | None:
        """The plan in force, or None to run the block untouched."""
        return self._block_plan

    def is_scoring(self) -> bool:
        """Whether the block's attention must report the class token's row."""
        plan = self.block_plan
        return plan is not None and plan.reduction is not None


class RoutedBlock(nn.Module):
    """Mixin in front of a transformer block's own class; see `routed_class`."""

    unrouted_class: type

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers set, but off in frozen leading blocks: there is nothing to recompute for."""
        plan = getattr(self, _ROUTER).block_plan
        is_leading = plan is not None and plan.cut_gradient and not plan.trained
        return self.__dict__.get("gradient_checkpointing", False) and not is_leading

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.__dict__["gradient_checkpointing"] = enabled  # where the block's own class looks once we are gone

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block on the running forward's route, and note what its reduction leaves."""
        router: BlockRouter = getattr(self, _ROUTER)
        plan = router.block_plan
        if plan is None:
            return super().__call__(*args, **kwargs)
        left: list[Tensor] = []
        args, kwargs = _enter_block(self, router, plan, left, args, kwargs)
        output = super().__call__(*args, **kwargs)
        _leave_block(router, left)
        return output

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        route: Route | None = None,
        reduction: Reduction | None = None,
        left: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the block; with a route and a reduction, reduce tokens. All of it comes with the call, for recomputation.

        Args:
            hidden_states: [B, P + M, D].
            *args: For the block.
            route: Tokens alive in `hidden_states`.
            reduction: Where and how much to reduce.
            left: The origins behind the reduction are put here, because everybody around a block (hooks, output
                capture, checkpointing) expects it to return what it always did.
            **kwargs: For the block.
        """
        if route is None or reduction is None or left is None:
            return super().forward(hidden_states, *args, **kwargs)
        anatomy = getattr(self, _ROUTER).column.anatomy
        hidden_states, origins = forward_reducing(self, anatomy, reduction, route, hidden_states, *args, **kwargs)
        left[:] = [origins]
        return hidden_states

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_routed_block, (self.unrouted_class,), self.__dict__


def forward_reducing(
    block: nn.Module,
    anatomy: Anatomy,
    reduction: Reduction,
    route: Route,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The pre-norm block of the Anatomy with a reduction in it; bit-equal to the stock block where all are kept.

    Args:
        block: The block; its parts are looked up by the names of `anatomy`.
        anatomy: Names of the parts.
        reduction: Where and how much.
        route: Tokens alive in `hidden_states`.
        hidden_states: [B, P + M, D].
        attention_mask: As the attention takes it.
        **kwargs: For the attention.

    Returns:
        hidden states [B, P + K (+ 1), D] and origins [B, K (+ 1)].
    """

    def run(name: str, tokens: Tensor) -> Tensor:
        return getattr(block, name)(tokens)

    def reduce(tokens: Tensor) -> tuple[Tensor, Tensor]:
        origins = route.origins_like(tokens)
        keep = num_kept(reduction.keep_rate, origins.shape[1])
        scores = class_rows[:, :, 0, route.num_prefix :].mean(dim=1)
        fused_origin = route.fused_origin if reduction.fuse else None
        return reduce_tokens(tokens, origins, scores, route.num_prefix, keep, fused_origin)

    attention = getattr(block, anatomy.attention)
    attended, class_rows, *_ = attention(run(anatomy.norm1, hidden_states), attention_mask=attention_mask, **kwargs)
    if not reduction.fuse:
        class_rows = class_rows.detach()  # only the choice of tokens depends on them
    for name in anatomy.after_attention:
        attended = run(name, attended)
    hidden_states = hidden_states + attended
    if reduction.position == "mid_block":
        hidden_states, origins = reduce(hidden_states)
    expanded = run(anatomy.mlp, run(anatomy.norm2, hidden_states))
    for name in anatomy.after_mlp:
        expanded = run(name, expanded)
    hidden_states = hidden_states + expanded
    if reduction.position == "after_block":
        hidden_states, origins = reduce(hidden_states)
    return hidden_states, origins


@functools.cache
def routed_class(block_class: type) -> type:
    """The subclass of `block_class` that takes a route; made once, with the same name."""
    namespace = {"unrouted_class": block_class, "__module__": block_class.__module__, "__doc__": block_class.__doc__}
    return type(block_class.__name__, (RoutedBlock, block_class), namespace)


def _new_routed_block(block_class: type) -> nn.Module:
    cls: Any = routed_class(block_class)
    return cls.__new__(cls)


def attach_router(model: nn.Module, router: BlockRouter) -> None:
    """Put `router` on its block of `model`. `detach_router` takes it all back."""
    block = model.get_submodule(router.column.blocks[router.index])
    setattr(block, _ROUTER, router)
    block_class: Any = type(block)
    block.__class__ = routed_class(block_class)
    attention: Any = getattr(block, router.column.anatomy.attention)
    if hasattr(attention, "config"):  # without one, `verify_plan` refuses to reduce tokens
        attention.config = ScoringConfig(attention.config, router.is_scoring)


def detach_router(model: nn.Module, router: BlockRouter) -> None:
    """Undo `attach_router`."""
    block: Any = model.get_submodule(router.column.blocks[router.index])
    attention: Any = getattr(block, router.column.anatomy.attention)
    if hasattr(attention, "config"):
        attention.config = attention.config.config
    block.__class__ = block.unrouted_class
    delattr(block, _ROUTER)


def _enter_block(
    block: nn.Module,
    router: BlockRouter,
    plan: BlockPlan,
    left: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the block's call, made to follow the plan and the route."""
    hidden_states, *others = args if args else (kwargs.pop("hidden_states"),)
    if router.index == 0:
        num_prefix = router.column.num_prefix
        router.carrier.route = Route(num_prefix, hidden_states.shape[1] - num_prefix)
    route = router.carrier.current()
    if plan.cut_gradient and block.training:
        hidden_states = _cut_gradient(block, plan, hidden_states)
    others = [route.gather_mask(value) if _is_mask(value) else value for value in others]
    if _is_mask(kwargs.get("attention_mask")):
        kwargs = {**kwargs, "attention_mask": route.gather_mask(kwargs["attention_mask"])}
    if plan.reduction is not None:
        kwargs = {**kwargs, "route": route, "reduction": plan.reduction, "left": left}
    return (hidden_states, *others), kwargs


def _leave_block(router: BlockRouter, left: list[Tensor]) -> None:
    carrier = router.carrier
    if left:
        carrier.route = route = carrier.current().reduced(left[0])
        if carrier.log is not None:
            carrier.log.append((router.index, route))
    if router.index == router.column.depth - 1:
        carrier.route = None


def _cut_gradient(block: Any, plan: BlockPlan, hidden_states: Tensor) -> Tensor:
    """Keep frozen leading blocks out of the graph, whatever asked for input gradients (76 -> 169 MiB measured)."""
    hidden_states = hidden_states.detach()
    if plan.trained and block.gradient_checkpointing and torch.is_grad_enabled():
        # reentrant checkpointing trains nothing inside a block whose input needs no gradient
        settings = getattr(block._gradient_checkpointing_func, "keywords", {})
        hidden_states.requires_grad_(bool(settings.get("use_reentrant", False)))
    return hidden_states


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4
