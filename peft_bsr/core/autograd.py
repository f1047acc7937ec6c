"""The type of `ctx` in a `torch.autograd.Function`."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import FunctionCtx


class BackwardContext(FunctionCtx):
    """`ctx` as backward sees it. For annotations; subclasses add the attributes that a forward sets.

    Attributes:
        saved_tensors: The tensors of `save_for_backward`.
        needs_input_grad: Whether each argument of the forward needs a gradient.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


__all__ = ["BackwardContext"]
