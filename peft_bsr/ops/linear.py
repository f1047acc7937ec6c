"""A Linear with a low-rank update next to it: its product and the gradients of it.

Shapes: M rows (images times tokens), D inputs, E outputs, r rank of the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from peft_bsr.core import as_plain, is_quantized


class LinearOp(NamedTuple):
    """`x W^T + b + scaling * (x A^T) B^T`. The slots also name the gradients, and which of them are needed.

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

    def cast(self, dtype: object) -> LinearOp:
        """The same operator to compute in `dtype`; itself where nothing has to be cast."""
        if all(tensor is None or (tensor.dtype is dtype and not is_quantized(tensor)) for tensor in self[:4]):
            return self
        return LinearOp(*(tensor if tensor is None else as_plain(tensor, dtype) for tensor in self[:4]), self.scaling)

    def product(self, inputs: Tensor) -> Tensor:
        """[M, D] -> [M, E]."""
        output = linear(inputs, self.weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return output
        return output.add_(linear(linear(inputs, self.lora_A), self.lora_B).mul_(self.scaling))

    def lora_hidden_grad(self, gradient: Tensor) -> Tensor | None:
        """Gradient [M, r] of `x A^T` from that of the product [M, E]; None without an update."""
        return None if self.lora_B is None else gradient @ self.lora_B * self.scaling

    def input_grad(self, gradient: Tensor, hidden_grad: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """Gradient [M, D] of the inputs, added to `onto` [M, D] if that is given.

        Args:
            gradient: Of the product, [M, E].
            hidden_grad: From `lora_hidden_grad`.
            onto: Sum of other gradients of the same inputs; adding while multiplying spares a pass over the tokens.
        """
        found = gradient @ self.weight if onto is None else onto.addmm(gradient, self.weight)
        return found if hidden_grad is None or self.lora_A is None else found.addmm_(hidden_grad, self.lora_A)

    def parameter_grads(
        self, gradient: Tensor, hidden_grad: Tensor | None, inputs: Tensor | None, needs: Sequence[bool]
    ) -> LinearOp:
        """Gradients of the four tensors, None where one is not needed.

        Args:
            gradient: Of the product, [M, E].
            hidden_grad: From `lora_hidden_grad`.
            inputs: [M, D]; may be None if at most the bias needs a gradient.
            needs: One bool for each of the four tensors.
        """
        weight = bias = down = up = None
        if needs[0] and inputs is not None:
            weight = gradient.T @ inputs
        if needs[1]:
            bias = gradient.sum(dim=0)
        if hidden_grad is not None and self.lora_A is not None and inputs is not None:
            down = hidden_grad.T @ inputs if needs[2] else None
            up = gradient.T @ (inputs @ self.lora_A.T) * self.scaling if needs[3] else None
        return LinearOp(weight, bias, down, up)  # type: ignore[arg-type]
