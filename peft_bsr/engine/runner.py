"""Makes a model's blocks follow a plan. The only file that changes a block's class.

Each block gets a child module, its controller, and a subclass of its own class with the same name (state-dict keys,
`isinstance`, output capture and FSDP's wrapping stay intact). The block's `__call__` reads the running forward's route
from the context and passes it to `forward` as a keyword. Gradient checkpointing, wherever transformers applies it
(around `forward`, in earlier versions around `nn.Module.__call__`), is inside, so a recomputation gets the route of its
own forward. Reading "the latest route" there gave silent errors of 0.6 to 1.1.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec, ScoringConfig
from peft_bsr.compat.torch_api import remove_hooks
from peft_bsr.core import BlockCall
from peft_bsr.engine.bound import BlockOutput
from peft_bsr.engine.controller import CONTROLLER, BlockController
from peft_bsr.engine.halves import Admit
from peft_bsr.engine.int8 import saved_in_int8
from peft_bsr.engine.traced import half_readers, warn_of_budget

Controlled = TypeVar("Controlled", bound="ControlledBlock")


class ControlledBlock(nn.Module):
    """Mixin before a transformer block's own class; see `controlled_class`."""

    uncontrolled_class: type
    _modules: dict[str, Any]

    @property
    def is_leading(self) -> bool:
        """Whether nothing trains in this block or before it."""
        plan = getattr(self, CONTROLLER).block_plan
        return plan is not None and not plan.in_graph

    @property
    def is_evaluated(self) -> bool:
        """Whether the block runs in evaluation mode in training, too: a leading block of a plan that never changes."""
        return self.is_leading and not getattr(self, CONTROLLER).is_dynamic

    def train(self: Controlled, mode: bool = True) -> Controlled:
        """Set the mode. Blocks before the first trained one stay in evaluation mode, except trained controllers."""
        super().train(mode)
        if self.is_evaluated:
            for name, child in self.named_children():
                child.train(mode and name == CONTROLLER and any(True for _ in child.parameters()))
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        """The value that transformers set, but False in leading blocks, which have no backward."""
        return self.__dict__.get("gradient_checkpointing", False) and not self.is_leading

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.__dict__["gradient_checkpointing"] = enabled  # the block's own class reads it there

    def __call__(self, *args: object, **kwargs: object) -> BlockOutput:
        """Call the block on the running forward's route."""
        controller: BlockController = self._modules[CONTROLLER]
        try:
            return controller.call(self, super().__call__, args, kwargs)
        except BaseException:  # after an interrupt, or if only a part of the model was called, its hooks do not run
            controller.context.now.clear()
            raise

    def forward(
        self, hidden_states: Tensor, *args: object, block_call: BlockCall | None = None, **kwargs: object
    ) -> BlockOutput:
        """Run the block, on a route if there is one. All settings are arguments, so that a recomputation has them.

        Args:
            hidden_states: [B, P + A + S, D], or in full view [B, N, D].
            *args: Further arguments of the block.
            block_call: Settings for this call, or None to run the stock block on its whole input.
            **kwargs: Keyword arguments of the block.
        """
        controller: BlockController = self._modules[CONTROLLER]
        if controller.builds_graph or controller.plan is None:
            return self._run(block_call, hidden_states, args, kwargs)
        with torch.no_grad():
            output = self._run(block_call, hidden_states, args, kwargs)
        if not controller.refines:
            return output
        tokens, *others = output if isinstance(output, tuple) else (output,)
        route: Any = controller.context.now.route
        if block_call is not None and block_call.score is not None:
            route = route.reduced(others[-1] if block_call.is_traced else block_call.origins)
        refined = controller.refine(self, tokens, route)
        return (refined, *others) if isinstance(output, tuple) else refined

    def _stock(self, hidden_states: Tensor, *args: object, **kwargs: object) -> BlockOutput:
        """Run the block's own forward, in evaluation mode in leading blocks: it may call functional dropout."""
        output: BlockOutput
        if not (self.training and self.is_evaluated):
            output = super().forward(hidden_states, *args, **kwargs)
            return output
        self.training = False  # between forwards, the flag is the model's mode
        try:
            output = super().forward(hidden_states, *args, **kwargs)
            return output
        finally:
            self.training = True

    def _run(
        self,
        block_call: BlockCall | None,
        hidden_states: Tensor,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> BlockOutput:
        """Run the block, or its halves if `block_call` is given."""
        if block_call is None:
            return self._stock(hidden_states, *args, **kwargs)
        controller: BlockController = self._modules[CONTROLLER]
        now, plan, spec = controller.context.now, block_call.plan, controller.spec
        mix = (
            functools.partial(controller.mix, self, block_call.route.call)
            if plan.mixture and controller.mixes
            else None
        )
        if block_call.is_traced:
            output, left = controller.bound(self).run(block_call, self._stock, hidden_states, args, kwargs, mix)
            parts = output if isinstance(output, tuple) else (output,)
            return (*parts, *left) if left else output
        block_call.token_scores = block_call.origins = block_call.merged = None  # a recomputation sets its own
        block_call.split_after = block_call.split
        packing: AbstractContextManager[Admit | None] = nullcontext()
        bound = controller.bound(self)
        adapted = bound.adapted(block_call)
        if block_call.int8 and not (adapted.is_traced or torch.compiler.is_compiling()):
            packing = saved_in_int8(self, _fewest_values(spec, block_call, hidden_states), (args, kwargs))
        earlier, now.running = now.running, adapted
        try:
            with (
                controller.scorer.watching(None if adapted.score is None or adapted.is_traced else spec.scores_from),
                packing as block_call.admit,
            ):
                output, left = bound.run(adapted, self._stock, hidden_states, args, kwargs, mix)
                block_call.note(left)
                return output
        finally:
            # a checkpoint holds the call, and the scores' graph holds the checkpoint: neither would ever be freed
            now.running, block_call.token_scores = earlier, None

    @torch.compiler.assume_constant_result
    def traced_readers(self) -> tuple[str, str, str]:
        """See `half_readers`; a constant in compiled code."""
        controller: BlockController = getattr(self, CONTROLLER)
        return half_readers(self, controller.spec, (controller, controller.scorer, controller.side_input_hooks))

    @torch.compiler.assume_constant_result
    def traced_aside(self, reader: str | None) -> None:
        """Record which parts of the plan are not active while a compiler traces the block.

        Args:
            reader: Why the last block computes all of its tokens, or None.
        """
        controller: BlockController = getattr(self, CONTROLLER)
        controller.aside = {} if reader is None else {"class token only": reader}
        plan = controller.block_plan
        if plan is not None and plan.lean is not None and controller.spec.block_spec is None:
            planned = {"attention": plan.lean.attention, "mlp": plan.lean.mlp}
            reason = "torch.compile traces a block that is not taken apart"
            controller.aside |= {half: reason for half, is_lean in planned.items() if is_lean}
        if plan is not None and plan.int8:
            controller.step_aside("int8", "torch.compile traces the block")
        warn_of_budget(self)

    @torch.compiler.assume_constant_result
    def traced_note(self, half: str, reason: str) -> None:
        """Record that a half keeps all that a compiler keeps of it."""
        getattr(self, CONTROLLER).aside[half] = reason

    @torch.compiler.assume_constant_result
    def traced_whole(self) -> None:
        """Record that all tokens carry gradients, because a compiler traces the block."""
        getattr(self, CONTROLLER).step_aside("gradient tokens", "torch.compile traces the block")

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        # the state without what `compile()` made: its code runs this block, not the copy
        return _new_controlled_block, (self.uncontrolled_class, isinstance(self, StandInBlock)), self.__getstate__()


class StandInBlock(ControlledBlock):
    """A block whose own forward finds other callables in the place of its modules; see `peft_bsr.engine.staged`."""

    def __getattr__(self, name: str) -> Any:
        """The child of that name, or what stands in for it in the call that runs in this thread."""
        found = super().__getattr__(name)
        controller: Any = self._modules[CONTROLLER]
        running = controller.context.now.running
        return found if running is None or not running.stand_ins else running.stand_ins.get(found, found)


@functools.cache
def controlled_class(block_class: type, stands_in: bool = False) -> type[ControlledBlock]:
    """The subclass of `block_class` that takes a route, with the same name; made once.

    Args:
        block_class: The block's own class.
        stands_in: Whether it is a `StandInBlock`.
    """
    namespace = {
        "uncontrolled_class": block_class,
        "__module__": block_class.__module__,
        "__doc__": block_class.__doc__,
    }
    return type(block_class.__name__, (StandInBlock if stands_in else ControlledBlock, block_class), namespace)


def _new_controlled_block(block_class: type, stands_in: bool = False) -> nn.Module:
    cls = controlled_class(block_class, stands_in)
    return cls.__new__(cls)


def attach_controller(model: nn.Module, controller: BlockController) -> None:
    """Put `controller` on its block of `model`. `detach_controller` undoes it."""
    spec = controller.spec
    block = model.get_submodule(spec.blocks[controller.index])
    setattr(block, CONTROLLER, controller)
    block_class: type = type(block)
    block.__class__ = controlled_class(block_class, bool(spec.stage_blocks or spec.whole_block))
    attention: Any = block.get_submodule(spec.attention)
    if not spec.stage_blocks:
        controller.side_input_hooks.attach(block, spec.attention)
    if spec.scores_from == "interface":
        attention.config = ScoringConfig(attention.config, controller.scorer)
    elif spec.scores_from == "weights":
        attention.register_forward_hook(controller.scorer.observe_weights)
    for module in _openers(model, controller):
        module.register_forward_pre_hook(controller.open_forward, prepend=True)
        module.register_forward_hook(controller.close_forward, always_call=True)
    for stage in _stages(model, controller):
        stage.register_forward_pre_hook(controller.enter_stage)
    controller.roots = [model]
    controller.attached(model)


def detach_controller(model: nn.Module, controller: BlockController) -> None:
    """Undo `attach_controller`."""
    controller.detached(model)
    spec = controller.spec
    block = cast("ControlledBlock", model.get_submodule(spec.blocks[controller.index]))
    attention: Any = block.get_submodule(spec.attention)
    if not spec.stage_blocks:
        controller.side_input_hooks.detach(block, spec.attention)
    if spec.scores_from == "interface":
        attention.config = attention.config.config
    elif spec.scores_from == "weights":
        remove_hooks(attention, controller.scorer)
    for module in (*_openers(model, controller), *_stages(model, controller)):
        remove_hooks(module, controller)
    block.__class__ = block.uncontrolled_class
    delattr(block, CONTROLLER)


def _openers(model: nn.Module, controller: BlockController) -> list[nn.Module]:
    """Modules whose forward hooks open and close a forward: the model and the caller of the blocks. Last block only."""
    spec = controller.spec
    if controller.index != spec.depth - 1:
        return []
    caller = model.get_submodule(_caller(spec.blocks))
    return [model] if caller is model else [model, caller]


def _stages(model: nn.Module, controller: BlockController) -> list[nn.Module]:
    """Modules between the one that calls all blocks and the blocks, for the last controller; else none."""
    spec = controller.spec
    if controller.index != spec.depth - 1 or not spec.stage_blocks:
        return []
    callers = dict.fromkeys(".".join(name.split(".")[:-2]) for name in spec.blocks)
    modules = [model.get_submodule(name) for name in callers if name != _caller(spec.blocks)]
    return [module for module in modules if not isinstance(module, nn.ModuleList)]


def _caller(blocks: tuple[str, ...]) -> str:
    """Name of the module that calls all blocks: what holds the lists that they are in."""
    first, last = blocks[0].split("."), blocks[-1].split(".")
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first) - 1)
    return ".".join(first[: max(0, shared - 1)])


def _fewest_values(spec: ModelSpec, call: BlockCall, hidden_states: Tensor) -> float:
    """Number of values in the block's smallest token tensor (kept or dropped tokens); at least 2 per token and head."""
    rate = 1.0 if call.plan.reduction is None else call.plan.reduction.keep_rate
    share = min(rate, 1 - rate) * 0.9 if rate < 1 else 1.0
    if call.splits:
        chosen = call.plan.gradient_tokens.share
        share *= min(chosen, 1 - chosen) * 0.9
    numbers = max(share * hidden_states.shape[-1], 2 * spec.num_heads)
    return hidden_states.shape[0] * call.route.num_tokens * numbers
