"""FLOPs of what really runs, with true token counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in `run()` (FLOPs = 2 x MACs).

    torch's counter does not know the CPU's fused attention; without it the attention of a ViT would count as nothing.
    And it cannot run a module that is given a parameter while gradients are off.

    Examples:
        >>> import torch
        >>> count_flops(lambda: torch.randn(2, 3) @ torch.randn(3, 5))
        60
    """
    with _FlopCounter() as counter:
        run()
    return counter.total


def flops_by_module(run: Callable[[], Any]) -> dict[str, int]:
    """`count_flops` by module; what runs inside of a module, its backward too, counts to it.

    Args:
        run: Calls one model, once; and its backward, if that shall count.

    Returns:
        Name in the model that is called -> FLOPs, for all that have any; `""` is the whole.

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


def flops_of(function: Any, args: Any, kwargs: dict[str, Any], output: Any) -> int:
    """Those of one operation, from inside of a dispatch mode.

    `FlopCounterMode` beside another mode would keep recomputed blocks alive, by the hooks with which it tells modules.
    """
    formula = flop_formula(function, _CPU_ATTENTION)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=output))


class _FlopCounter(TorchDispatchMode):
    """Adds up what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode a Linear arrives whole; its parts come back here
            output = function.decompose(*args, **(kwargs or {}))
        if output is not NotImplemented:
            return output
        output = function(*args, **(kwargs or {}))
        self.total += flops_of(function, args, kwargs or {}, output)
        return output


def _attention(query: Any, key: Any, value: Any, *_args: Any, out_val: Any = None, **_kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_CPU_ATTENTION = {
    CPU_ATTENTION: takes_tensors(_attention),
    CPU_ATTENTION_BACKWARD: takes_tensors(_attention_backward),
}
