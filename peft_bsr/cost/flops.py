"""Counts the FLOPs of the operations that run, with the real number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peft_bsr.compat.torch_api import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    TorchDispatchMode,
    flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    takes_tensors,
)


class Operator(Protocol):
    """An operator as a dispatch mode gets it, `torch.ops.aten.mm.default`."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run it."""

    def decompose(self, *args: object, **kwargs: object) -> object:
        """Run the operators that it consists of, or return `NotImplemented`."""


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in `run()` (FLOPs = 2 x MACs).

    torch's own counter does not know the fused attention of the CPU, and would count the attention of a ViT as 0. It
    also fails if a parameter is passed to a module while gradients are disabled.

    Examples:
        >>> import torch
        >>> count_flops(lambda: torch.randn(2, 3) @ torch.randn(3, 5))
        60
    """
    with _FlopCounter() as counter:
        run()
    return counter.total


def flops_by_module(run: Callable[[], object]) -> dict[str, int]:
    """`count_flops` for each module, including its submodules and its backward.

    Args:
        run: Calls one model once; and its backward, if that is to be counted.

    Returns:
        Name of a module -> FLOPs, for modules with any FLOPs; `""` is the whole model.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> flops_by_module(lambda: model(torch.randn(3, 4)).sum().backward())  # the first needs no input gradient
        {'': 132, '0': 96, '2': 36}
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    whole = {"": counts.pop("Global", 0)}
    return whole | {name.partition(".")[2]: flops for name, flops in counts.items() if "." in name}


def flops_of(function: Operator, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> int:
    """FLOPs of one operation, for use in a dispatch mode.

    `FlopCounterMode` next to another mode would keep recomputed blocks in memory through its module hooks.
    """
    formula = flop_formula(function, _CPU_ATTENTION)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=output))


class _FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        function: Operator,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        with self:  # in inference mode a Linear is one operation; its parts are dispatched here again
            output = function.decompose(*args, **(kwargs or {}))
        if output is not NotImplemented:
            return output
        output = function(*args, **(kwargs or {}))
        self.total += flops_of(function, args, kwargs or {}, output)
        return output


def _attention(query: Tensor, key: Tensor, value: Tensor, *_args: object, **_kwargs: object) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_args: object, **_kwargs: object
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_CPU_ATTENTION = {
    CPU_ATTENTION: takes_tensors(_attention),
    CPU_ATTENTION_BACKWARD: takes_tensors(_attention_backward),
}
