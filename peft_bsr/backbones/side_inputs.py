"""Hooks that gather an attention's side inputs (all inputs other than the hidden states) for the alive tokens.

An attention gets position tables, biases and masks of the whole image as arguments. A hook on it selects the alive
tokens' part by the route of the running block. The route comes with the block's call, so a recomputed block (gradient
checkpointing) uses its own route, not the latest one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from peft_bsr.backbones.registry import Arguments, Call, FamilyRule
from peft_bsr.compat.torch_api import remove_hooks
from peft_bsr.core import NAMED_KINDS, ForwardContext, Route, SideInput


class SideInputHooks:
    """The hooks on one block.

    Args:
        context: Context of the forward, which holds the running block's call and route.
        rule: Exceptions of the model family.
        kinds: Kinds of the attention's arguments by name, as found by the probe; see `Route.gather`.
    """

    def __init__(self, context: ForwardContext, rule: FamilyRule, kinds: Mapping[str, SideInput]) -> None:
        self.context = context
        self.rule = rule
        self.kinds = {**NAMED_KINDS, **kinds}
        self.names: tuple[str, ...] = ()

    def attach(self, block: nn.Module, attention_name: str) -> None:
        """Add the hooks. They are methods of this object, so a deep copy of the model gets its own."""
        attention = block.get_submodule(attention_name)
        self.names = input_names(attention)
        attention.register_forward_pre_hook(self.enter_attention, with_kwargs=True)
        for bias in self.biases(block):
            bias.register_forward_pre_hook(self.enter_bias, with_kwargs=True)
        for bias in self.biases(attention):
            bias.register_forward_hook(self.leave_bias)

    def detach(self, block: nn.Module, attention_name: str) -> None:
        """Remove the hooks."""
        attention = block.get_submodule(attention_name)
        for module in (attention, *self.biases(block)):
            remove_hooks(module, self)

    @property
    def route(self) -> Route | None:
        """The running block's route, or None if its attention's arguments need no gathering."""
        call = self.context.now.running
        return None if call is None or call.is_gathered or call.route.origins is None else call.route

    def enter_attention(self, attention: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Call | None:
        """Select the alive tokens' part of every argument except the hidden states."""
        route = self.route
        if route is None:
            return None
        named = named_inputs(self.names, args, kwargs)
        tokens = {} if args else {"hidden_states": named.pop("hidden_states")}
        return args[:1], {**tokens, **self.gather(named)}

    def gather(self, arguments: Arguments) -> Arguments:
        """The alive tokens' part of an attention's arguments, by the running block's route."""
        return self.gather_on(self.route, arguments)

    def gather_on(self, route: Route | None, arguments: Arguments) -> Arguments:
        """The same by the given route; None = nothing was dropped."""
        gather = self.rule.gather_side_inputs
        if route is None or route.origins is None:
            return arguments
        return gather(route, arguments) if gather is not None else route.gather_side_inputs(arguments, self.kinds)

    def enter_bias(self, bias: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Call | None:
        """Make the bias module compute the bias of all tokens."""
        route = self.route
        return None if route is None else (args, {**kwargs, "dim_size": route.full_length})

    def leave_bias(self, bias: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor | None:
        """Select the alive tokens' part of a bias that is computed inside the attention."""
        route = self.route
        return None if route is None else route.gather(output, "mask")

    def biases(self, module: nn.Module) -> list[nn.Module]:
        """The modules in `module` that compute a position bias of all tokens."""
        name = self.rule.position_bias
        return [] if name is None else [m for path, m in module.named_modules() if path.split(".")[-1] == name]


def named_inputs(names: tuple[str, ...], args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
    """A module's arguments by name, without the first positional one; see `input_names`."""
    return {**dict(zip(names, args[1:], strict=False)), **kwargs}


def input_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward after the first."""
    layer = getattr(module, "base_layer", module)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(layer).forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)[2:]


def takes_any_keyword(module: nn.Module) -> bool:
    """Whether the module's forward has `**kwargs`."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
