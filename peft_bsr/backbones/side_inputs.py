"""Makes what enters a block's attention beside the hidden states follow the alive tokens.

Position tables, biases and masks of the whole image reach an attention as arguments. A hook on the attention selects
the alive tokens' part by the route of the block that runs; the route comes with the block's call, so a recomputed block
(gradient checkpointing) selects by its own route, not by the latest one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_bsr.backbones.registry import FamilyRule
from peft_bsr.compat.torch_api import remove_hooks
from peft_bsr.core import NAMED_KINDS, ForwardContext, Route, SideInput


class SideInputHooks:
    """The hooks on one block.

    Args:
        context: Knows the block that runs, and its route.
        rule: Exceptions of the family.
        kinds: What the attention's arguments are, by name, as the probe found; see `Route.gather`.
    """

    def __init__(self, context: ForwardContext, rule: FamilyRule, kinds: Mapping[str, SideInput]) -> None:
        self.context = context
        self.rule = rule
        self.kinds = {**NAMED_KINDS, **kinds}
        self.names: tuple[str, ...] = ()

    def attach(self, block: nn.Module, attention_name: str) -> None:
        """Put the hooks on. They are methods of this object, so a deep copy of the model gets its own."""
        attention = block.get_submodule(attention_name)
        self.names = input_names(attention)
        attention.register_forward_pre_hook(self.enter_attention, with_kwargs=True)
        for bias in self.biases(block):
            bias.register_forward_pre_hook(self.enter_bias, with_kwargs=True)
        for bias in self.biases(attention):
            bias.register_forward_hook(self.leave_bias)

    def detach(self, block: nn.Module, attention_name: str) -> None:
        """Take the hooks off."""
        attention = block.get_submodule(attention_name)
        for module in (attention, *self.biases(block)):
            remove_hooks(module, self)

    @property
    def route(self) -> Route | None:
        """The running block's route, if anything was dropped on it that its attention's arguments still speak of."""
        call = self.context.now.running
        return None if call is None or call.is_gathered or call.route.origins is None else call.route

    def enter_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Select the alive tokens' part of every argument but the hidden states."""
        route = self.route
        if route is None:
            return None
        named = named_inputs(self.names, args, kwargs)
        tokens = {} if args else {"hidden_states": named.pop("hidden_states")}
        return args[:1], {**tokens, **self.gather(named)}

    def gather(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The alive tokens' part of what an attention is called with, on the running block's route."""
        return self.gather_on(self.route, arguments)

    def gather_on(self, route: Route | None, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same on this route; None = nothing was dropped."""
        gather = self.rule.gather_side_inputs
        if route is None or route.origins is None:
            return arguments
        return gather(route, arguments) if gather is not None else route.gather_side_inputs(arguments, self.kinds)

    def enter_bias(self, bias: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A bias is made for all tokens, however few are alive."""
        route = self.route
        return None if route is None else (args, {**kwargs, "dim_size": route.full_length})

    def leave_bias(self, bias: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        """Inside an attention, nobody else selects the alive tokens' part."""
        route = self.route
        return None if route is None else route.gather(output, "mask")

    def biases(self, module: nn.Module) -> list[nn.Module]:
        """The modules in it that make a position bias of all tokens."""
        name = self.rule.position_bias
        return [] if name is None else [m for path, m in module.named_modules() if path.split(".")[-1] == name]


def named_inputs(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is called with by name, the first argument left out; see `input_names`."""
    return {**dict(zip(names, args[1:], strict=False)), **kwargs}


def input_names(module: nn.Module) -> tuple[str, ...]:
    """Names of what the module's forward takes by position, behind the first."""
    layer = getattr(module, "base_layer", module)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(layer).forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)[2:]


def takes_any_keyword(module: nn.Module) -> bool:
    """Whether the module's forward takes keywords that it does not name."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
