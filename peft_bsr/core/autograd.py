"""The type of `ctx` in a `torch.autograd.Function`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class BackwardContext(Protocol):
    """`ctx` with what backward reads, for annotations. Subclasses add the attributes that a forward sets.

    Attributes:
        saved_tensors: The tensors of `save_for_backward`.
        needs_input_grad: Whether each argument of the forward needs a gradient.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """See `torch.autograd.function.FunctionCtx`."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """See `torch.autograd.function.FunctionCtx`."""

    def set_materialize_grads(self, value: bool) -> None:
        """See `torch.autograd.function.FunctionCtx`."""


__all__ = ["BackwardContext"]
