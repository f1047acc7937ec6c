"""The tensors of a Linear or LayerNorm, with a low-rank update beside them, and the gradients of their product.

Shapes: M rows (images times tokens), D inputs, E outputs, r rank of the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_bsr.core import as_plain


@dataclass(frozen=True)
class Affine:
    """Weight and bias of a LayerNorm or Linear module, whichever tensors are in force, and the update beside it.

    Attributes:
        weight: [E, D] of a Linear.
        bias: [E], or None.
        down: [r, D] of a low-rank update, or None.
        up: [E, r] of it.
        scaling: Factor on it.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scaling: float = 1.0

    @classmethod
    def of(cls, module: Any, update: Any = None) -> Affine:
        """Those of `module`, and of an update with `lora_A`, `lora_B` and `scaling`."""
        if update is None:
            return cls(module.weight, module.bias)
        return cls(module.weight, module.bias, update.lora_A, update.lora_B, update.scaling)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The four, in their order."""
        return self.weight, self.bias, self.down, self.up

    def cast(self, dtype: torch.dtype) -> Affine:
        """The same to compute in `dtype`."""
        tensors = tuple(None if tensor is None else as_plain(tensor, dtype) for tensor in self.tensors)
        return next(affines_of(tensors, [self.scaling]))

    def product(self, inputs: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        output = linear(inputs, self.weight, self.bias)
        if self.down is None or self.up is None:
            return output
        return output.add_(linear(linear(inputs, self.down), self.up).mul_(self.scaling))

    def narrow(self, gradient: Tensor) -> Tensor | None:
        """Gradient [M, r] of what `down` gives, from that of the product [M, E]; None without an update."""
        return None if self.up is None else gradient @ self.up * self.scaling

    def of_inputs(self, gradient: Tensor, narrow: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """Gradient [M, D] of the inputs, from that of the product [M, E] and what `narrow` made of it, plus `onto`."""
        # adding while multiplying spares a pass over the tokens
        found = gradient @ self.weight if onto is None else torch.addmm(onto, gradient, self.weight)
        return found if narrow is None or self.down is None else found.addmm_(narrow, self.down)

    def of_tensors(
        self, gradient: Tensor, narrow: Tensor | None, inputs: Tensor | None, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the four, as far as they are needed.

        Args:
            gradient: Of the product, [M, E].
            narrow: What `narrow` made of it.
            inputs: [M, D], or None if bias alone needs one.
            needs: Of each.
        """
        found: list[Tensor | None] = [None] * 4
        if needs[0] and inputs is not None:
            found[0] = gradient.T @ inputs
        if needs[1]:
            found[1] = gradient.sum(dim=0)
        if narrow is not None and self.down is not None and inputs is not None:
            found[2] = narrow.T @ inputs if needs[2] else None
            found[3] = gradient.T @ (inputs @ self.down.T) * self.scaling if needs[3] else None
        return found


def affines_of(tensors: Sequence[Any], scalings: Sequence[float]) -> Iterator[Affine]:
    """Made of four tensors and a scaling each.

    Args:
        tensors: Weight, bias, down and up, again and again.
        scalings: One a Linear.
    """
    for i, scaling in enumerate(scalings):
        weight, bias, down, up = tensors[4 * i : 4 * i + 4]
        yield Affine(weight, bias, down, up, scaling)


__all__ = ["Affine", "affines_of"]
