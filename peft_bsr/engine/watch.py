"""Detects changes of modules: their children, hooks, forwards and adapters. Cheap enough for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from operator import itemgetter

from torch import nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.compat.torch_api import MODULES, hook_dictionaries
from peft_bsr.compat.transformers_api import captured_outputs, is_capture_hook

STATE = "adapter_state"  # attribute of a tuner layer; another object after each change of its adapters
_SHARDING = ("torch.distributed.", "accelerate.")  # their hooks gather weights or move inputs, and read no values


class Watch:
    """A record of modules, to detect later changes.

    Args:
        modules: The modules.
        own: Objects whose hooks on the modules are ignored.
    """

    def __init__(self, modules: Iterable[nn.Module], own: tuple[object, ...] = ()) -> None:
        self._modules, self._own = list(modules), own
        self._kinds = [*map(type, self._modules)]
        holders = [getattr(module, MODULES) for module in self._modules]
        links = [(holder, name, child) for holder in holders for name, child in holder.items()]
        self._parents, self._names = [parent for parent, _, _ in links], [name for _, name, _ in links]
        self._children = [child for _, _, child in links]
        hooks = _hooks_of(self._modules)
        self._dictionaries: list[Sized] = [*hooks, *holders]
        self._count = sum(map(len, self._dictionaries))  # finds removals, which the comparisons in `is_current` miss
        self._filled = [dictionary for dictionary in hooks if dictionary]
        self._numbers = [*map(tuple, self._filled)]  # ids of the hooks; never used twice
        self._attributes: list[dict[str, object]] = [module.__dict__ for module in self._modules]
        self._forward = ["forward"] * len(self._modules)
        self._own_forwards = [*map(dict.get, self._attributes, self._forward)]
        self._holders = [vars(module) for module in self._modules if STATE in vars(module)]
        self._states = [*map(itemgetter(STATE), self._holders)]
        self._captures = self.captures(self._modules)
        self._foreign = self.foreign_hook(self._modules)

    def is_current(self) -> bool:
        """Whether the modules are as they were."""
        return (
            sum(map(len, self._dictionaries)) == self._count
            and [*map(dict.get, self._parents, self._names)] == self._children
            and [*map(tuple, self._filled)] == self._numbers
            and [*map(dict.get, self._attributes, self._forward)] == self._own_forwards
            and [*map(type, self._modules)] == self._kinds
            and [*map(itemgetter(STATE), self._holders)] == self._states
        )

    @property
    def hook(self) -> str | None:
        """Name of a foreign hook that runs on any of the modules in this forward, or None."""
        if self._foreign is None and self._captures and captured_outputs():
            return "output_capturing_hook"
        return self._foreign

    def foreign_hook(self, modules: Iterable[nn.Module]) -> str | None:
        """Name of a foreign hook on any of these modules, or None. Hooks for captured outputs do not count."""
        for hooks in _hooks_of(modules):
            for hook in hooks.values():
                if _is_foreign(hook, self._own):
                    function = getattr(hook, "func", hook)
                    return str(getattr(function, "__qualname__", type(function).__name__))
        return None

    def obstacle(self, modules: Iterable[nn.Module]) -> str | None:
        """Why these modules must run as they are: a foreign hook, or another forward set on one of them; or None."""
        modules = list(modules)
        if (hook := self.foreign_hook(modules)) is not None:
            return f"the hook {hook} looks at its modules"
        replaced = next((type(module).__name__ for module in modules if "forward" in vars(module)), None)
        return replaced and f"another `forward` was set on its {replaced}"

    @property
    def root(self) -> nn.Module:
        """The first of the modules."""
        return self._modules[0]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # copied modules get a new Watch
        return type(None), ()

    @staticmethod
    def captures(modules: Iterable[nn.Module]) -> bool:
        """Whether transformers has put its hooks for captured outputs on any of these modules."""
        return any(is_capture_hook(hook) for hooks in _hooks_of(modules) for hook in hooks.values())


@contextmanager
def without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager: foreign hooks on these modules do not run inside.

    Args:
        modules: Modules without hooks of this package.
    """
    kept = [(hooks, dict(hooks)) for hooks in _hooks_of(modules) if hooks]
    try:
        for hooks, own in kept:
            for number in [number for number, hook in own.items() if _is_foreign(hook, ())]:
                del hooks[number]
        yield
    finally:
        for hooks, own in kept:
            hooks.clear()
            hooks.update(own)


def around_blocks(model: nn.Module, spec: ModelSpec) -> list[nn.Module]:
    """Modules that may see the last block's output: the model first, then those that contain or follow its blocks.

    Args:
        model: The model. For the module in it that calls the blocks, the list is empty: any caller sees the output.
        spec: Description of the whole model.
    """
    names = dict(model.named_modules())
    if spec.blocks[0] not in names:
        return []
    after = tuple(f"{head}." for head in (*spec.head, *spec.unread))
    around = spec.blocks[0].rpartition(".")[0]
    return [
        module
        for name, module in names.items()
        if name == "" or f"{around}.".startswith(f"{name}.") or f"{name}.".startswith(after)
    ]


def is_called_again(model: nn.Module, name: str, block: nn.Module) -> bool:
    """Whether a block's call is checkpointed, not its forward: by timm, or by a wrapper such as torch's.

    Args:
        model: The model.
        name: Name of the block, or of its wrapper.
        block: The block.
    """
    is_wrapped = type(model.get_submodule(name)) is not type(block)
    return is_wrapped or any(getattr(child, "grad_checkpointing", False) for child in model.children())


def _is_foreign(hook: Callable[..., object], own: tuple[object, ...]) -> bool:
    """Whether a hook is not of `own`, of a sharding library or of transformers' output capture."""
    function = getattr(hook, "func", hook)
    is_own = any(getattr(function, "__self__", None) is owner for owner in own)
    module = f"{getattr(function, '__module__', '')}."
    return not is_own and not module.startswith(_SHARDING) and not is_capture_hook(hook)


def _hooks_of(modules: Iterable[nn.Module]) -> list[dict[int, Callable[..., object]]]:
    """The dictionaries in which the modules hold their hooks."""
    return [hooks for module in modules for hooks in hook_dictionaries(module)]


__all__ = ["STATE", "Watch", "around_blocks", "is_called_again", "without_hooks"]
