"""A Linear with a low-rank update: its output and gradients.

Shapes: M rows (images times tokens), D inputs, E outputs, r rank of the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_bsr.core import as_plain, in_dtype

_PLAIN = (Tensor, torch.nn.Parameter)  # not quantised
LinearGrads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of weight, bias, lora_A, lora_B


class LinearOp(NamedTuple):
    """`x W^T + b + scaling * (x A^T) B^T`. Gradients come in the order of the tensors.

    Attributes:
        weight: [E, D].
        bias: [E], or None.
        lora_A: [r, D], or None without an update.
        lora_B: [E, r], or None.
        scaling: Factor of the update.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None  # noqa: N815  (PEFT's name)
    lora_B: Tensor | None = None  # noqa: N815
    scaling: float = 1.0

    def cast(self, dtype: torch.dtype, all_of_it: bool) -> LinearOp:
        """The operator with tensors in `dtype`; itself if nothing has to be cast.

        Args:
            dtype: Autocast's dtype, or that of the tokens.
            all_of_it: Whether to cast every tensor, as autocast does. False: only quantised and narrower weights; wider
                ones compute in their own dtype, as fp32 tuner layers on a bf16 model do.
        """
        weight, bias, down, up, scaling = self
        is_plain = weight.dtype is dtype and type(weight) in _PLAIN and (bias is None or bias.dtype is dtype)
        if is_plain and (down is None or down.dtype is dtype):
            return self
        if not all_of_it and type(weight) in _PLAIN and torch.promote_types(weight.dtype, dtype) is weight.dtype:
            return self
        bias, down, up = [None if t is None else as_plain(t, dtype) for t in (bias, down, up)]
        return LinearOp(as_plain(weight, dtype), bias, down, up, scaling)

    def product(self, inputs: Tensor) -> Tensor:
        """[M, D] -> [M, E], in the dtype of the inputs."""
        weight, dtype = self.weight, inputs.dtype
        output = in_dtype(linear(in_dtype(inputs, weight.dtype), weight, self.bias), dtype)
        if self.lora_A is None or self.lora_B is None:
            return output
        hidden = linear(in_dtype(inputs, self.lora_A.dtype), self.lora_A)
        return output.add_(in_dtype(linear(hidden, self.lora_B).mul_(self.scaling), dtype))

    def lora_hidden_grad(self, gradient: Tensor) -> Tensor | None:
        """Gradient [M, r] of `x A^T` from that of the product [M, E]; None without an update."""
        return None if self.lora_B is None else in_dtype(gradient, self.lora_B.dtype) @ self.lora_B * self.scaling

    def input_grad(self, gradient: Tensor, hidden_grad: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """Gradient [M, D] of the inputs, added to `onto` [M, D] if that is given.

        Args:
            gradient: Gradient of the product, [M, E].
            hidden_grad: From `lora_hidden_grad`.
            onto: Sum of other gradients of the same inputs; a fused multiply-add saves a pass over the tokens.
        """
        weight, dtype = self.weight, gradient.dtype
        if weight.dtype is not dtype:
            own = (gradient.to(weight.dtype) @ weight).to(dtype)
            grad = own if onto is None else onto + own
        else:
            grad = gradient @ weight if onto is None else onto.addmm(gradient, weight)
        if hidden_grad is None or self.lora_A is None:
            return grad
        if hidden_grad.dtype is not dtype:
            return grad.add_((hidden_grad @ self.lora_A).to(dtype))
        return grad.addmm_(hidden_grad, self.lora_A)

    def parameter_grads(
        self, gradient: Tensor, hidden_grad: Tensor | None, inputs: Tensor | None, needs: Sequence[bool]
    ) -> LinearGrads:
        """Gradients of the four tensors, None if not needed.

        Args:
            gradient: Gradient of the product, [M, E].
            hidden_grad: From `lora_hidden_grad`.
            inputs: [M, D]; may be None if only the bias needs a gradient.
            needs: Whether each of the four tensors needs a gradient.
        """
        weight = bias = down = up = None
        own = in_dtype(gradient, self.weight.dtype)
        if needs[0] and inputs is not None:
            weight = own.T @ in_dtype(inputs, own.dtype)
        if needs[1]:
            bias = own.sum(dim=0)
        if hidden_grad is not None and self.lora_A is not None and inputs is not None:
            seen = in_dtype(inputs, hidden_grad.dtype)
            down = hidden_grad.T @ seen if needs[2] else None
            up = in_dtype(gradient, seen.dtype).T @ (seen @ self.lora_A.T) * self.scaling if needs[3] else None
        return weight, bias, down, up
