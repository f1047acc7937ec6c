"""Lean parts of a block that is not taken apart: its own forward runs, and calls them in the place of its modules.

Windows, pooling and convolutions lie around a block's attention, not around its MLP. So the norm before the MLP gives
its input unchanged, and the MLP computes norm and MLP in one. The attention can run a second time in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_bsr.backbones import ModelSpec, SideInputHooks, StageBlock
from peft_bsr.core import BlockCall
from peft_bsr.engine.bound import BoundBlock, modules_of, norm_inputs_kept
from peft_bsr.engine.halves import LeanMLP, NotLeanError
from peft_bsr.engine.parts import attention_dropouts, norm_source, running_module
from peft_bsr.engine.plan import Lean
from peft_bsr.engine.watch import Watch

_NOT_APART = "the block is not taken apart: its norms or dropouts are not where those of pre-norm blocks are"


class StagedBlock:
    """What `BoundBlock` is for blocks that are taken apart.

    Args:
        block: The block.
        spec: Description of the model.
        parts: Names of its parts.
        own: Objects whose hooks on the block are ignored, because they are this package's.
        aside: Called with (half, reason) if a half that was planned lean runs as the original.

    Attributes:
        reasons: `"attention"` or `"mlp"` -> why this half cannot run lean.
        watch: Detects changes after which the block must be looked up again.
    """

    def __init__(
        self,
        block: nn.Module,
        spec: ModelSpec,
        parts: StageBlock,
        own: tuple[Any, ...],
        aside: Callable[[str, str], None],
    ) -> None:
        self.block, self.parts, self.aside = block, parts, aside
        self.reasons: dict[str, str] = {}
        self._made: dict[Lean, tuple[Mapping[nn.Module, Callable[..., Any]], dict[str, str]]] = {}
        self.watch = Watch(modules_of(block, own), own)
        self.reader = self.watch.foreign_hook(m for child in block.children() for m in modules_of(child, own))
        self.norm = self._known_norm()
        self.mlp: LeanMLP | None = None
        try:
            self.mlp = self._find_mlp(replace(spec, block_spec=replace(self.parts.block_spec, norm2=self.norm)))
        except NotLeanError as reason:
            self.reasons["mlp"] = str(reason)
        if not self.parts.attention:
            self.reasons["attention"] = "the block has none"
        elif (obstacle := self._obstacle(self.parts.block_spec.attention)) is not None:
            self.reasons["attention"] = obstacle

    def _known_norm(self) -> str:
        """Name of the norm that the MLP computes with it, or `""` where it runs as a module."""
        name = self.parts.norm
        return "" if not name or isinstance(norm_source(getattr(self.block, name)), str) else name

    def _find_mlp(self, spec: ModelSpec) -> LeanMLP:
        if not self.parts.mlp:
            raise NotLeanError("no MLP is known in the block")
        for name in filter(None, (self.norm, *self.parts.mlp)):
            if (obstacle := self._obstacle(name)) is not None:
                raise NotLeanError(obstacle)
        return LeanMLP(self.block, spec)

    def _obstacle(self, name: str) -> str | None:
        return self.watch.obstacle(modules_of(getattr(self.block, name), ()))

    def adapted(self, call: BlockCall) -> BlockCall:
        """The call, with what runs in the place of the block's modules."""
        if (lean := call.lean) is not None:
            if lean not in self._made:
                self._made[lean] = self._make(lean)
            call.stand_ins, asides = self._made[lean]
            for half, reason in asides.items():
                self.aside(half, reason)
        return call

    def run(
        self,
        call: BlockCall,
        stock: Callable[..., Any],
        hidden_states: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mix: object,
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Run the block's own forward; see `BoundBlock.run`."""
        lean = call.lean
        if lean is None or not (lean.attention and lean.save_products) or torch.compiler.is_compiling():
            return stock(hidden_states, *args, **kwargs), ()
        with norm_inputs_kept(self.block, (*self.parts.other_attentions, self.parts.attention), self.aside):
            return stock(hidden_states, *args, **kwargs), ()

    def _make(self, lean: Lean) -> tuple[Mapping[nn.Module, Callable[..., Any]], dict[str, str]]:
        """Module of the block -> what the block's forward calls in its place; and halves that run stock, with why."""
        found: dict[nn.Module, Callable[..., Any]] = {}
        asides = dict[str, str]()
        if lean.attention:
            reason = self.reasons.get("attention")
            if reason is None and not lean.save_products:
                for name in (*self.parts.other_attentions, self.parts.attention):
                    attention: nn.Module = getattr(self.block, name.split(".")[0])
                    found[attention] = _Again(attention, self.block.get_submodule(name))
            elif reason is not None:
                asides["attention"] = reason
        if lean.mlp and self.mlp is None:
            asides["mlp"] = self.reasons["mlp"]
        elif lean.mlp and self.mlp is not None:
            *first, last = [getattr(self.block, name) for name in (self.norm, *self.parts.mlp) if name]
            found |= dict.fromkeys(first, _unchanged)
            found[last] = _MLP(self.mlp, lean)
        return found, asides

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the block looks its own parts up
        return type(None), ()


class WholeBlock(BoundBlock):
    """A block that reduces tokens and is not taken apart, such as a post-norm block: its MLP alone can be lean.

    A post-norm block's attention projects what the residual keeps anyway. See `BoundBlock` for the arguments.
    """

    def __init__(
        self,
        block: nn.Module,
        spec: ModelSpec,
        side_input_hooks: SideInputHooks,
        own: tuple[object, ...],
        aside: Callable[[str, str], None],
    ) -> None:
        super().__init__(block, spec, side_input_hooks, own, aside)
        assert spec.whole_block is not None, "only these blocks are bound in this way"
        self.inside = StagedBlock(block, spec, spec.whole_block, (side_input_hooks, *own), aside)
        self.reasons = {**self.inside.reasons, "attention": _NOT_APART}
        self.inside.reasons = self.reasons

    def adapted(self, call: BlockCall) -> BlockCall:
        """The call, with what runs in the place of the block's modules."""
        return self.inside.adapted(call)


class _MLP:
    """Norm and MLP of the tokens that the norm was called with."""

    def __init__(self, half: LeanMLP, lean: Lean) -> None:
        self.half, self.lean = half, lean

    def __call__(self, tokens: Tensor, *args: object, **kwargs: object) -> Tensor:
        rows = tokens.reshape(1, -1, tokens.shape[-1])
        return self.half.expanded(rows, self.lean).view(*tokens.shape[:-1], -1)


class _Again:
    """An attention of which the inputs alone are kept."""

    def __init__(self, attention: nn.Module, inner: nn.Module) -> None:
        self.attention = attention
        self.rates, self.dropouts = attention_dropouts(running_module(inner)[0] or inner, attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_random = any(rate() for rate in self.rates) or any(module.p for module in self.dropouts)
        return checkpoint(self.attention, *args, use_reentrant=False, preserve_rng_state=is_random, **kwargs)

    def __getattr__(self, name: str) -> Any:  # a block may read numbers of its attention, as timm's Hiera does
        if name == "attention":  # a copy, before it has one
            raise AttributeError(name)
        return getattr(self.attention, name)


def _unchanged(tokens: Tensor, *args: object, **kwargs: object) -> Tensor:
    return tokens


__all__ = ["StagedBlock", "WholeBlock"]
