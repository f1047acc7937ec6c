"""Makes a model's blocks follow a plan. The one file that changes a block's class.

Each block gets a child module, its router, and a subclass of its own class with the same name (state-dict keys,
`isinstance`, output capture and FSDP's wrapping stay intact). The block's *call* takes the running forward's route from
the carrier and hands it to `forward` as a keyword. Gradient checkpointing, wherever transformers puts it (around
`forward`, in earlier versions around the call of `nn.Module`), lies inside: a recomputation gets the very route of its
own forward. Reading "the latest route" there was wrong by 0.6 to 1.1, silently.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import (
    AttentionScorer,
    Column,
    FamilyRule,
    ScoringConfig,
    TokenFollower,
    hidden_first,
    remove_hooks,
)
from peft_bsr.core import BlockRun, Route, RouteCarrier, TaskCall
from peft_bsr.engine.entry import meet_entry
from peft_bsr.engine.int8 import saved_in_int8
from peft_bsr.engine.plan import BlockPlan, Plan
from peft_bsr.engine.reducing import forward_block

ROUTER = "token_router"  # name of a block's router among its children


class BlockRouter(nn.Module):
    """What a block needs to follow its plan. No parameters.

    Args:
        index: The block's place in the column.
        column: The model's column.
        carrier: Shared by the routers of one model.
        rule: Exceptions of the model's family.
        plan: What to do; a tuner's router answers per adapter instead.

    Attributes:
        builds_graph: Whether gradients may cross the blocks; if not, they run under `no_grad` in any mode.
    """

    builds_graph = True

    def __init__(
        self, index: int, column: Column, carrier: RouteCarrier, rule: FamilyRule, plan: Plan | None = None
    ) -> None:
        super().__init__()
        self.index = index
        self.column = column
        self.carrier = carrier
        self.rule = rule
        self.scorer = AttentionScorer(carrier)
        self.follower = TokenFollower(carrier, rule)
        self._plan = plan

    @property
    def plan(self) -> Plan | None:
        """The plan in force, or None to run the model untouched."""
        return self._plan

    @property
    def changes(self) -> bool:
        """Whether the plan changes from step to step."""
        return False

    def begin(self) -> None:
        """A forward begins; called on the first block's router, before anybody asks for the plan."""

    def observe(self, before: Tensor, after: Tensor) -> None:
        """See the block's tokens [B, N, D] before and [B, N', D] after it."""

    def rehearsal(self) -> AbstractContextManager[Any]:
        """Forwards inside leave no trace on what the router learns from forwards."""
        return nullcontext()

    def mix(self, block: nn.Module, call: TaskCall | None, tokens: Tensor) -> Tensor | None:
        """What runs in the place of the MLP, where the block's plan has a mixture. None = the MLP itself.

        Args:
            block: The block.
            call: What the forward is asked.
            tokens: [B, N, D], behind the norm.
        """
        return None

    def attached(self, model: nn.Module) -> None:
        """The router was put on its block of `model`."""

    def detached(self, model: nn.Module) -> None:
        """The router was taken off."""

    @property
    def block_plan(self) -> BlockPlan | None:
        """This block's part of the plan in force."""
        plan = self.plan
        return None if plan is None else plan.blocks[self.index]

    @property
    def reduces(self) -> bool:
        """Whether the plan in force drops tokens in any block."""
        return self.plan is not None and self.plan.reduces

    def start_route(self, hidden_states: Tensor) -> Route:
        """The route of a forward that begins with these tokens [B, N, D]."""
        column, plan = self.column, self.plan
        num_patches = hidden_states.shape[1] - column.num_special
        is_full_view = plan is not None and plan.mode == "full_view"
        return Route(column.num_prefix, num_patches, column.num_suffix, is_full_view, call=self.carrier.call)

    def passes(self, block: nn.Module, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the block need not run: the forward begins behind it. Asked at each call, before anything else.

        Args:
            block: The block.
            hidden_states: [B, N, D], what it is called with.
            args: Further arguments of the call.
            kwargs: Its keywords.
        """
        entry = self.carrier.entry
        return entry is not None and entry.tokens is not None and self.index < entry.index


class RoutedBlock(nn.Module):
    """Mixin in front of a transformer block's own class; see `routed_class`."""

    unrouted_class: type

    @property
    def is_leading(self) -> bool:
        """Whether nothing trains in this block or before it."""
        plan = getattr(self, ROUTER).block_plan
        return plan is not None and not plan.in_graph

    def train(self, mode: bool = True) -> Any:
        """Set the mode; inside of a block that always leads, only a router that learns leaves evaluation mode."""
        super().train(mode)
        router: BlockRouter = getattr(self, ROUTER)
        if self.is_leading and not router.changes:
            for name, child in self.named_children():
                child.train(mode and name == ROUTER and any(True for _ in child.parameters()))
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers set, but off in leading blocks: there is nothing to recompute for."""
        return self.__dict__.get("gradient_checkpointing", False) and not self.is_leading

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.__dict__["gradient_checkpointing"] = enabled  # where the block's own class looks once we are gone

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block on the running forward's route, and note what its reduction leaves."""
        router: BlockRouter = getattr(self, ROUTER)
        if router.index == 0:
            router.begin()
        plan = router.block_plan
        if plan is None:
            return super().__call__(*args, **kwargs)
        (hidden_states, *others), named = hidden_first(args, kwargs)
        left: list[Tensor] = []
        if router.index == 0:
            router.carrier.route = router.start_route(hidden_states) if router.reduces else None
        if router.passes(self, hidden_states, tuple(others), named):
            _leave_block(router, left)
            return (hidden_states,) if router.column.returns_tuple else hidden_states
        args, kwargs = _enter_block(self, router, plan, left, args, kwargs)
        with nullcontext() if router.builds_graph else torch.no_grad():
            output = super().__call__(*args, **kwargs)
        router.observe(hidden_states, output[0] if isinstance(output, tuple) else output)
        _leave_block(router, left)
        return output

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        route: Route | None = None,
        plan: BlockPlan | None = None,
        left: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the block on a route, reducing tokens if its plan says so. All comes with the call, for recomputation.

        Args:
            hidden_states: [B, P + A + S, D], or in full view [B, N, D].
            *args: For the block.
            route: Tokens alive, or None to run the stock block on all it gets.
            plan: The block's plan.
            left: The origins behind a reduction are put here, because everybody around a block (hooks, output
                capture, checkpointing) expects it to return what it always did.
            **kwargs: For the block.
        """
        stock = super().forward
        if route is None or plan is None or left is None:
            return stock(hidden_states, *args, **kwargs)
        router: BlockRouter = getattr(self, ROUTER)
        reduction = plan.reduction
        run = BlockRun(route, None if reduction is None else reduction.score)
        earlier, router.carrier.inside = router.carrier.inside, run
        saving: Any = nullcontext()
        if plan.int8:
            saving = saved_in_int8(self, _fewest_values(router.column, plan, route, hidden_states), (args, kwargs))
        try:
            with (
                router.scorer.watching(None if reduction is None else router.column.scores_from),
                saving,
            ):
                mix = functools.partial(router.mix, self, route.call) if plan.mixture else None
                output, origins = forward_block(
                    self, stock, router.column, router.follower, plan, run, hidden_states, args, kwargs, mix
                )
        finally:
            router.carrier.inside = earlier
        if origins is not None:
            left[:] = [origins]
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_routed_block, (self.unrouted_class,), self.__dict__


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
    column = router.column
    block = model.get_submodule(column.blocks[router.index])
    setattr(block, ROUTER, router)
    block_class: Any = type(block)
    block.__class__ = routed_class(block_class)
    attention: Any = block.get_submodule(column.attention)
    router.follower.attach(block, column.attention)
    if column.scores_from == "interface":
        attention.config = ScoringConfig(attention.config, router.scorer)
    elif column.scores_from == "weights":
        attention.register_forward_hook(router.scorer.observe_weights)
    router.attached(model)


def detach_router(model: nn.Module, router: BlockRouter) -> None:
    """Undo `attach_router`."""
    router.detached(model)
    column = router.column
    block: Any = model.get_submodule(column.blocks[router.index])
    attention: Any = block.get_submodule(column.attention)
    router.follower.detach(block, column.attention)
    if column.scores_from == "interface":
        attention.config = attention.config.config
    elif column.scores_from == "weights":
        remove_hooks(attention, router.scorer)
    block.__class__ = block.unrouted_class
    delattr(block, ROUTER)


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
    carrier = router.carrier
    if carrier.entry is not None and router.index == carrier.entry.index:
        hidden_states = meet_entry(carrier, hidden_states)
    if plan.cut_gradient and block.training:
        hidden_states = _cut_gradient(block, plan, hidden_states)
    plan = _as_needed(block, plan)
    if router.reduces:
        route = carrier.current()
        if plan.reduction is not None or route.origins is not None or plan.saves_less or plan.mixture:
            kwargs = {**kwargs, "route": route, "plan": plan, "left": left}
    elif plan.saves_less or plan.mixture:
        kwargs = {**kwargs, "route": router.start_route(hidden_states), "plan": plan, "left": left}
    return (hidden_states, *others), kwargs


def _fewest_values(column: Column, plan: BlockPlan, route: Route, hidden_states: Tensor) -> float:
    """Numbers in the smallest set of tokens that counts: those kept, or those dropped; above one for each head."""
    rate = 1.0 if plan.reduction is None else plan.reduction.keep_rate
    share = min(rate, 1 - rate) * 0.9 if rate < 1 else 1.0
    numbers = max(share * hidden_states.shape[-1], 2 * column.num_heads)
    return hidden_states.shape[0] * route.num_tokens * numbers


def _leave_block(router: BlockRouter, left: list[Tensor]) -> None:
    carrier = router.carrier
    if left:
        carrier.route = route = carrier.current().reduced(left[0])
        if carrier.log is not None:
            carrier.log.append((router.index, route))
    if router.index == router.column.depth - 1:
        carrier.route = None


def _as_needed(block: nn.Module, plan: BlockPlan) -> BlockPlan:
    """The plan without what saves nothing now: nothing is kept for backward, or a compiler decides what.

    Decided outside of gradient checkpointing, whose first forward runs without gradients and whose second does not. Its
    own hooks keep nothing already; those of 8 bits would replace them.
    """
    if not plan.saves_less:
        return plan
    if not (block.training and plan.in_graph and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return replace(plan, lean=None, int8=False)
    return replace(plan, int8=plan.int8 and not getattr(block, "gradient_checkpointing", False))


def _cut_gradient(block: Any, plan: BlockPlan, hidden_states: Tensor) -> Tensor:
    """Keep frozen leading blocks out of the graph, whatever asked for input gradients (76 -> 169 MiB measured)."""
    hidden_states = hidden_states.detach()
    if plan.trained and block.gradient_checkpointing and torch.is_grad_enabled():
        # reentrant checkpointing trains nothing inside a block whose input needs no gradient
        settings = getattr(block._gradient_checkpointing_func, "keywords", {})
        hidden_states.requires_grad_(bool(settings.get("use_reentrant", False)))
    return hidden_states
