"""Runs a block by its plan, on the running forward's route."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import AttentionScorer, FamilyRule, ModelSpec, SideInputHooks, hidden_first
from peft_bsr.core import BLOCKS, BlockCall, ForwardContext, Route, TaskCall
from peft_bsr.engine.binding import Bound, bind
from peft_bsr.engine.bound import BlockOutput
from peft_bsr.engine.compiled import Compiler, halves_obstacle
from peft_bsr.engine.gradient_cut import cut_gradient, inputs_of_stage
from peft_bsr.engine.plan import BlockPlan, Lean, Plan
from peft_bsr.engine.resume import stop_or_resume
from peft_bsr.engine.traced import TracedBlock
from peft_bsr.engine.watch import Watch, around_blocks, is_called_again
from peft_bsr.errors import LeanBlockWarning

if TYPE_CHECKING:
    from peft_bsr.engine.runner import ControlledBlock

_PART = "a part of the model was called by itself"
CONTROLLER = "token_router"  # name of a block's controller among its children


class BlockController(nn.Module):
    """Runs a block by its plan. Has no parameters.

    Args:
        index: Index of the block.
        spec: Description of the model.
        context: Shared by the controllers of one model.
        rule: Exceptions of the model's family.
        plan: The plan. Controllers of tuners have one per adapter instead.

    Attributes:
        builds_graph: Whether gradients may flow through the blocks. If not, they always run under `no_grad`.
        is_dynamic: Whether the plan changes from step to step.
        mixes: Whether `mix` replaces the MLP of blocks whose plan has a mixture.
        observes: Whether `observe` is called after the block.
        refines: Whether `refine` replaces the block's output.
        aside: Half -> why it ran as the original in the latest training forward, although it was planned lean.
        roots: The model, in a list so that it is not registered as a child.
        compiler: How the block's halves are compiled as functions, or None.
    """

    builds_graph = True
    is_dynamic = False
    mixes = False
    observes = False
    refines = False

    def __init__(
        self, index: int, spec: ModelSpec, context: ForwardContext, rule: FamilyRule, plan: Plan | None = None
    ) -> None:
        super().__init__()
        self.index, self.spec, self._plan = index, spec, plan
        self.context, self.rule = context, rule
        self.scorer = AttentionScorer(context)
        self.side_input_hooks = SideInputHooks(context, rule, dict(spec.side_inputs))
        self.aside: dict[str, str] = {}
        self.roots: list[nn.Module] = []
        self.compiler: Compiler | None = None
        self._bound: Bound | None = None

    @property
    def plan(self) -> Plan | None:
        """The active plan, or None to run the model unchanged."""
        return self._plan

    def begin(self) -> None:
        """Called on the first block's controller when a forward begins, before the plan is read."""

    def observe(self, before: Tensor, after: Tensor) -> None:
        """Called with the block's tokens before it, [B, N, D], and after it, [B, N', D]."""

    def refine(self, block: nn.Module, tokens: Tensor, route: Route | None) -> Tensor:
        """Replace the block's output tokens. Hooks on the block and captured outputs get the replacement.

        Args:
            block: The block.
            tokens: Output of the block, [B, N, D].
            route: Route after the block, or None if the plan has no reduction.
        """
        raise NotImplementedError(f"{type(self).__name__} does not refine tokens")

    def side_effect_free(self) -> AbstractContextManager[None]:
        """Context manager: forwards inside do not change the controller's state."""
        return nullcontext()

    def mix(self, block: nn.Module, call: TaskCall | None, tokens: Tensor) -> Tensor:
        """Run the mixture that replaces the MLP, if the block's plan has one.

        Args:
            block: The block.
            call: Tasks of the forward.
            tokens: Tokens after the norm, [B, N, D].
        """
        raise NotImplementedError(f"{type(self).__name__} has no mixture")

    def attached(self, model: nn.Module) -> None:
        """Called after the controller was attached to its block of `model`."""

    def detached(self, model: nn.Module) -> None:
        """Called after the controller was detached."""

    @property
    def block_plan(self) -> BlockPlan | None:
        """This block's part of the active plan."""
        plan = self.plan
        return None if plan is None else plan.blocks[self.index]

    def start_route(self, hidden_states: Tensor, plan: Plan | None = None) -> Route:
        """The route of a forward that starts with these tokens [B, N, D]."""
        spec, plan = self.spec, plan or self.plan
        num_patches = hidden_states.shape[1] - spec.num_special
        is_full_view = plan is not None and plan.mode == "full_view"
        return Route(spec.num_prefix, num_patches, spec.num_suffix, is_full_view, call=self.context.now.call)

    def instead(
        self, block: nn.Module, hidden_states: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor | None:
        """A replacement for the block's output if the block need not run, or None to run it. Called first.

        Args:
            block: The block.
            hidden_states: Input of the block, [B, N, D].
            args: Further arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        resume_point = self.context.now.resume_point
        starts_later = resume_point is not None and resume_point.starts and self.index < resume_point.index
        return hidden_states if starts_later else None

    def bound(self, block: nn.Module) -> Bound:
        """The block's halves, looked up again if anything in the block has changed."""
        bound = self._bound
        if torch.compiler.is_compiling():
            return TracedBlock(block, self.spec, self.side_input_hooks)
        if bound is None or bound.block is not block or not bound.watch.is_current():
            bound = self._bound = bind(block, self)
        return bound

    def halves_obstacle(self) -> str | None:
        """Why the block's halves cannot be compiled as functions, or None."""
        block = self.roots[0].get_submodule(self.spec.blocks[self.index])
        return halves_obstacle(block, self.spec, self.side_input_hooks, (self, self.scorer))

    def compile_halves(self, compiler: Compiler) -> None:
        """Compile the block's halves as functions, see `peft_bsr.engine.compiled`."""
        self.compiler, self._bound = compiler, None

    def step_aside(self, part: str, reason: str) -> None:
        """Record that a part of the plan is not active, so that more is kept for backward. Warns once.

        Args:
            part: A half that runs as the original; `"class token only"`; `"int8"`; or `"gradient tokens"`.
            reason: The reason.
        """
        self.aside[part] = reason
        now = self.context.now
        if now.has_warned or part == "class token only":
            return
        now.has_warned = True
        warnings.warn(
            f"block {self.index} "
            + (
                "keeps activations in full, not in 8 bits as planned"
                if part == "int8"
                else "has gradients of all its tokens, not of some as planned"
                if part == "gradient tokens"
                else f"runs its {part} half as stock modules and keeps more for backward than planned"
            )
            + f": {reason}. `model.base_model.explain()` lists all blocks.",
            LeanBlockWarning,
            stacklevel=2,
        )

    def open_forward(self, model: nn.Module, args: tuple[object, ...]) -> None:
        """Forward pre-hook of the last block's controller, on the model and on the modules that call its blocks."""
        now = self.context.now
        if now.open(model) and not torch.compiler.is_compiling():  # `traced_reader` looks for hooks then
            outside = now.outside
            if outside is None or outside.root is not model or not outside.is_current():
                around = around_blocks(model, self.spec)
                now.outside = Watch(around, (self,)) if around else None

    def enter_stage(self, stage: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        """Forward pre-hook of the last block's controller, on modules that call some of the blocks."""
        return None if self.plan is None else inputs_of_stage(stage, args, self.roots[0], self.spec, self.plan)

    def close_forward(self, model: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Forward hook of the same modules, called after an exception, too."""
        self.context.now.close(model)

    def call(
        self, block: ControlledBlock, run: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> BlockOutput:
        """Call the block on the route of the current forward.

        Args:
            block: The block.
            run: The block's own call.
            args: Arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        now, index = self.context.now, self.index
        if index == 0:
            now.open(BLOCKS)
            self.begin()
        plan = self.plan
        if plan is None:
            return run(*args, **kwargs)
        (hidden_states, *others), kwargs = hidden_first(args, kwargs)
        if index == 0:
            now.route = self.start_route(hidden_states, plan) if plan.reduces else None
            now.split = None
        given = self.instead(block, hidden_states, tuple(others), kwargs)
        if given is not None:
            self._leave(None)
            return self.spec.as_output(self.index, given)
        own = plan.blocks[index]
        if now.resume_point is not None and index == now.resume_point.index:
            hidden_states = stop_or_resume(now, hidden_states)
        if own.cut_gradient and block.training:
            hidden_states = cut_gradient(block, own, hidden_states)
        call = self._block_call(block, plan, own, hidden_states)
        if call is not None:
            kwargs = {**kwargs, "block_call": call}
            if call.is_traced:
                now.running = call
        output = run(hidden_states, *others, **kwargs)
        if call is not None and call.is_traced:
            now.running = None
            if own.reduction is not None:
                count = 2 if own.reduction.merges else 1
                call.note(output[-count:])
                output = output[:-count] if self.spec.returns_tuple else output[0]
        if self.observes:
            self.observe(hidden_states, output[0] if isinstance(output, tuple) else output)
        if call is not None and call.splits:
            now.split = call.split_after
        self._leave(call)
        return output

    def _block_call(
        self, block: ControlledBlock, plan: Plan, own: BlockPlan, hidden_states: Tensor
    ) -> BlockCall | None:
        """Settings for the block's forward. None = run the original block on its whole input."""
        lean, int8 = self._saving(block, own) if own.saves_less else (None, False)
        route = self.context.now.current() if plan.reduces else None
        splits = own.gradient_tokens is not None and self._splits(block, own)
        is_special = lean is not None or int8 or own.mixture or splits
        if not is_special and (route is None or (own.reduction is None and route.origins is None)):
            return None
        score = None if own.reduction is None else own.reduction.score
        if splits and not own.in_graph and own.gradient_tokens is not None:
            score = own.gradient_tokens.score
        is_traced = torch.compiler.is_compiling() and self.spec.block_spec is not None
        route = route or self.start_route(hidden_states, plan)
        split = self.context.now.current_split() if splits else None
        return BlockCall(route, score, own, lean, int8, is_traced, splits=splits, split=split)

    def _splits(self, block: ControlledBlock, plan: BlockPlan) -> bool:
        """Whether some tokens carry no gradients in this forward: only in training, and not under a compiler."""
        if not (block.training and torch.is_grad_enabled()):
            return False
        if torch.compiler.is_compiling():
            if plan.in_graph:
                block.traced_whole()
            return False
        if not plan.saves_less:
            self.aside = {}
        if isinstance(self.bound(block), TracedBlock):
            self.step_aside("gradient tokens", "its halves are compiled")
            return False
        return True

    def _saving(self, block: ControlledBlock, plan: BlockPlan) -> tuple[Lean | None, bool]:
        """How the halves run lean, and whether activations are packed in 8 bits. Neither without a backward.

        Decided outside of gradient checkpointing, because its first forward runs without gradients and its second with
        them. Inside, activations are not packed: the hooks would replace those of checkpointing.
        """
        if not (block.training and plan.in_graph and torch.is_grad_enabled()):
            return None, False
        lean, is_traced = plan.lean, torch.compiler.is_compiling()
        if is_traced and block.gradient_checkpointing:
            return None, False
        reason = None if lean is None or lean.num_queries is None else self.other_reader(block)
        if lean is not None and reason is not None:
            lean = replace(lean, num_queries=None)
        if is_traced:
            block.traced_aside(reason)
            return None if self.spec.block_spec is None else lean, False
        self.aside = {}
        if reason is not None:
            self.step_aside("class token only", reason)
        int8 = plan.int8 and not block.gradient_checkpointing
        int8 = int8 and not is_called_again(self.roots[0], self.spec.blocks[self.index], block)
        if int8 and isinstance(self.bound(block), TracedBlock):
            self.step_aside("int8", "its halves are compiled")
            int8 = False
        return lean, int8

    def other_reader(self, block: Any) -> str | None:
        """What other than the head may read the tokens of the last block, or None."""
        now = self.context.now
        if torch.compiler.is_compiling():
            around = self.traced_reader() if any(now.owner is root for root in self.roots) else self.called_reader()
            if around is None:
                return _PART
            hook = block.traced_readers()[0] or around
        else:
            outside = now.outside
            if outside is None or outside.root is not now.owner:
                return _PART
            if is_called_again(self.roots[0], self.spec.blocks[self.index], block):
                return "gradient checkpointing around its call runs it again outside of the forward"
            hook = self.bound(block).watch.hook or outside.hook
        return f"the hook {hook} reads its output" if hook else None

    @torch.compiler.assume_constant_result
    def traced_reader(self) -> str:
        """Name of a hook around the blocks, empty for none; a constant in compiled code."""
        return Watch(around_blocks(self.roots[0], self.spec), (self,)).hook or ""

    @torch.compiler.assume_constant_result
    def called_reader(self) -> str | None:
        """`traced_reader` for blocks compiled one by one, maybe in a copy of the model; None = a part was called."""
        now = self.context.now
        return None if now.outside is None or now.outside.root is not now.owner else now.outside.hook or ""

    def _leave(self, call: BlockCall | None) -> None:
        now = self.context.now
        if call is not None and call.origins is not None:
            now.reduced(self.index, call.origins, call.merged)
        if self.index == self.spec.depth - 1:
            now.route = None
            now.close(BLOCKS)


__all__ = ["CONTROLLER", "BlockController"]
