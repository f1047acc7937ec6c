"""The modules inside a block's halves, and what currently runs in the place of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_bsr.backbones import BlockSpec
from peft_bsr.compat.torch_api import PARAMETERS
from peft_bsr.ops import Activation, FrozenLinear, Gate, NoNormOp, NormOp, norm_kind

NormSource = tuple[type[NormOp], float, dict[str, Tensor | None]]  # operator, epsilon and parameters by name


class LinearSource(NamedTuple):
    """Where the tensors of a Linear are read at each call, because parameters may be replaced or sharded in between.

    Attributes:
        module: The Linear that runs.
        tensors: Its parameters by name.
        update: Parameters of the low-rank update next to it; empty without one.
        scaling: Factor of the update.
        out_features: Output width.
    """

    module: nn.Linear
    tensors: dict[str, Tensor | None]
    update: dict[str, Tensor | None]
    scaling: float
    out_features: int

    def read(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, lora_A, lora_B."""
        update = self.update
        return self.tensors["weight"], self.tensors.get("bias"), update.get("lora_A"), update.get("lora_B")


def linear_source(module: nn.Module | None) -> LinearSource | str:
    """The source of the Linear that `module` is or holds, or why there is none."""
    if module is None:
        return "a projection is in no module of its own, or has a bias outside of it"
    leaf, update = running_module(module)
    if not isinstance(leaf, nn.Linear) or type(leaf) not in (nn.Linear, FrozenLinear):
        return f"{type(leaf or module).__name__} runs in the place of a Linear"
    tensors, scaling = own_tensors(leaf), getattr(update, "scaling", 1.0)
    return LinearSource(leaf, tensors, {} if update is None else own_tensors(update), scaling, leaf.out_features)


def norm_source(module: nn.Module | None) -> NormSource | str:
    """The source of the norm that `module` is or holds, or why there is none. None = no norm."""
    if module is None:
        return NoNormOp, 0.0, {"weight": None}
    leaf, update = running_module(module)
    kind = norm_kind(leaf) if update is None else None
    if kind is None or leaf is None:
        return f"{type(leaf or module).__name__} is not a LayerNorm or RMSNorm"
    return *kind, own_tensors(leaf)


def running_module(module: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The module that runs in the place of `module`, None if it is not a single one; its low-rank update or None."""
    if hasattr(module, "active_module"):
        leaf, update = module.active_module()
        return leaf, update
    return module, None


def own_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """Parameters of the module itself, by name. In a replica of nn.DataParallel they are plain attributes."""
    parameters: dict[str, Tensor | None] = getattr(module, PARAMETERS)
    return parameters if parameters else vars(module)


@dataclass(frozen=True)
class MLPParts:
    """An MLP of Linears and one activation.

    Attributes:
        first: One Linear D -> F, or the two of a gated MLP, gate first, or one D -> 2 F for both.
        activation: Activation module.
        last: Linear F -> D.
        is_gated: Whether the activation of one product multiplies the other.
        hidden_dropout: Dropout modules between the activation and `last`.
        output_dropout: Dropout modules after `last`.
    """

    first: tuple[nn.Module, ...]
    activation: nn.Module
    last: nn.Module
    is_gated: bool = False
    hidden_dropout: tuple[nn.Dropout, ...] = ()
    output_dropout: tuple[nn.Dropout, ...] = ()

    @property
    def operator(self) -> Activation | None:
        """Function from the first products to the hidden states, or None if the activation is not known."""
        found = Activation.of(self.activation)
        return Gate(found.forward, found.backward) if found is not None and self.is_gated else found


def find_mlp(block: nn.Module, block_spec: BlockSpec) -> MLPParts | str:
    """The parts of a block's MLP, or why they are not known. The self-test compares them with the block."""
    param_modules = [leaf for name in block_spec.mlp for leaf in _param_modules(name, getattr(block, name))]
    param_modules = [(name, module) for name, module in param_modules if not isinstance(module, nn.Identity)]
    linears = [(i, name, module) for i, (name, module) in enumerate(param_modules) if hasattr(module, "in_features")]
    others = [m for _, m in param_modules if not hasattr(m, "in_features") and not isinstance(m, nn.Dropout)]
    if len(others) != 1 or len(linears) not in (2, 3):
        kinds = ", ".join(type(module).__name__ for _, module in param_modules)
        return f"the MLP is not two or three Linears with one activation, but {kinds}"
    modules = [module for _, _, module in linears]
    closing = next(((i, module) for i, _, module in reversed(linears) if _closes(module, modules)), None)
    if closing is None:
        return "no Linear of the MLP projects the hidden states back"
    place, last = closing
    dropouts = [(i, module) for i, (_, module) in enumerate(param_modules) if isinstance(module, nn.Dropout)]
    first = [(name, module) for i, name, module in linears if i != place]
    first.sort(key=lambda leaf: "gate" not in leaf[0] and not leaf[0].endswith("_g"))
    return MLPParts(
        first=tuple(module for _, module in first),
        activation=others[0],
        last=last,
        is_gated=len(first) == 2 or _features(first[0][1])[1] == 2 * _features(last)[0],
        hidden_dropout=tuple(module for i, module in dropouts if i < place),
        output_dropout=tuple(module for i, module in dropouts if i > place),
    )


def plain_mlp(block: nn.Module, block_spec: BlockSpec) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """First Linear, activation and second Linear of an MLP without a gate or dropout; None for any other MLP."""
    parts = find_mlp(block, block_spec)
    if isinstance(parts, str) or parts.is_gated or any(m.p for m in (*parts.hidden_dropout, *parts.output_dropout)):
        return None
    return parts.first[0], parts.activation, parts.last


def attention_dropouts(attention: nn.Module, outer: nn.Module) -> tuple[list[Callable[[], float]], list[nn.Dropout]]:
    """Functions that read the dropout rate of the attention weights, and the dropouts after the output projection.

    They are told apart by name; the self-test compares them with the block if a rate is above zero.

    Args:
        attention: The module with the projections.
        outer: The module that the block calls: `attention`, or one that contains it.
    """
    inside = set(attention.modules())
    after = [m for m in outer.modules() if isinstance(m, nn.Dropout) and m not in inside]
    rates: list[Callable[[], float]] = []
    for name, module in attention.named_children():
        if isinstance(module, nn.Dropout):
            is_after = any(part in name for part in ("proj", "out_", "output", "resid"))
            if is_after:
                after.append(module)
            else:
                rates.append(partial(getattr, module, "p"))
    own = vars(attention)
    names = [n for n, rate in own.items() if "drop" in n and isinstance(rate, (int, float))]
    rates += [partial(own.__getitem__, name) for name in names]
    return rates, after


def _param_modules(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Leaf modules with their names; a tuner layer counts as a leaf."""
    children = list(module.named_children())
    if isinstance(module, nn.ModuleList) and not children:
        return
    if not children or hasattr(module, "active_module"):
        yield name, module
    else:
        for child_name, child in children:
            yield from _param_modules(f"{name}.{child_name}", child)


def _features(linear: Any) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def _closes(module: nn.Module, linears: Sequence[nn.Module]) -> bool:
    """Whether this Linear is F -> D and the others are D -> F, or one D -> 2 F."""
    width, out_width = _features(module)
    others = [_features(other) for other in linears if other is not module]
    return set(others) == {(out_width, width)} or (len(others) == 1 and others[0][1] == 2 * width)


__all__ = [
    "LinearSource",
    "MLPParts",
    "NormSource",
    "attention_dropouts",
    "find_mlp",
    "linear_source",
    "norm_source",
    "own_tensors",
    "plain_mlp",
    "running_module",
]
