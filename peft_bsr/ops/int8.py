"""8-bit quantisation: each group of numbers on a grid of 256 steps, with stochastic rounding.

Stochastic rounding gives an error of mean zero. Random numbers come from torch's generator, so a resumed run is the
same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = 48  # most numbers on a common grid; a real ViT-Ti's gradients are off by 2.1 % with 64, 1.4 % with 48
_CHUNK = 2**20  # numbers rounded at a time on a CPU, so that the noise takes little memory

_BF16_ROUNDING = 2.0**-8  # a bf16 is that near to what it was rounded from, twice over
_STEPS_OF_RANGE = (1 + 2 * _BF16_ROUNDING) / 255


@dataclass(frozen=True)
class PackedTensor:
    """Numbers as `smallest + codes * step`.

    Attributes:
        codes: uint8 [rows, group].
        smallest: bf16 [rows, 1], at most the smallest number of a row.
        step: bf16 [rows, 1], at least a 255th of the row's range.
        dtype: Dtype of the numbers.
    """

    codes: Tensor
    smallest: Tensor
    step: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, numbers: Tensor) -> PackedTensor:
        """Pack [rows, group], rounding up with the probability of the remainder."""
        low, high = torch.aminmax(numbers, dim=1, keepdim=True)
        smallest, step = low, torch.empty_like(low, dtype=torch.bfloat16)
        if low.dtype is not torch.bfloat16:
            smallest = torch.sub(low, low.abs(), alpha=_BF16_ROUNDING, out=torch.empty_like(step))
        torch.mul(high - smallest, _STEPS_OF_RANGE, out=step)  # 0 if all numbers are 0: any code is right then
        size = max(1, _CHUNK // numbers.shape[1]) if numbers.device.type == "cpu" else len(numbers)
        parts = zip(numbers.split(size), smallest.split(size), step.split(size), strict=True)
        codes = [_rounded(*part) for part in parts]
        return cls(codes[0] if len(codes) == 1 else torch.cat(codes), smallest, step, numbers.dtype)

    def unpack(self) -> Tensor:
        """The numbers, [rows * group]."""
        return torch.addcmul(self.smallest.float(), self.codes, self.step.float()).to(self.dtype).flatten()


def _rounded(numbers: Tensor, smallest: Tensor, step: Tensor) -> Tensor:
    """Codes [rows, group] of numbers: the number of steps, rounded down after noise from 0 to 1 was added."""
    above = numbers.to(torch.promote_types(numbers.dtype, torch.float32)) - smallest
    return torch.addcdiv(torch.rand_like(above), above, step).to(torch.uint8)


def group_size(tensor: Tensor) -> int:
    """A divisor of the innermost dimension, close to `_GROUP`, so that no two tokens share a grid."""
    sizes = [size for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if stride == 1 and size > 1]
    innermost = sizes[0] if sizes else 1
    return next((size for size in range(_GROUP, 15, -1) if innermost % size == 0), innermost)


__all__ = ["PackedTensor", "group_size"]
