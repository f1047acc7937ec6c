"""Dropout that keeps the random state for backward instead of the mask; backward draws the same mask again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from peft_bsr.core import BackwardContext


def generator_state(device: torch.device) -> Tensor:
    """State of the device's default generator, a small tensor on the CPU."""
    state: Tensor = _generator(device).get_rng_state(*_place(device))
    return state


@contextmanager
def generator_at(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Context manager: use an earlier random state, and restore the current one afterwards. None: do nothing."""
    if state is None:
        yield
        return
    present = generator_state(device)
    _generator(device).set_rng_state(state, *_place(device))
    try:
        yield
    finally:
        _generator(device).set_rng_state(present, *_place(device))


def draw_mask(like: Tensor, rate: float) -> Tensor:
    """0 or `1 / (1 - rate)` for each number of `like`, as `torch.nn.functional.dropout` draws them."""
    return dropout(torch.ones(like.shape, dtype=like.dtype, device=like.device), rate)


def lean_dropout(tokens: Tensor, rate: float) -> Tensor:
    """`torch.nn.functional.dropout(tokens, rate)` in training, with the same numbers, but without keeping the mask."""
    output: Tensor = _LeanDropout.apply(tokens, rate)
    return output


class _DropoutContext(BackwardContext):
    state: Tensor
    rate: float


class _LeanDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _DropoutContext, tokens: Tensor, rate: float) -> Tensor:
        ctx.state, ctx.rate = generator_state(tokens.device), rate
        return tokens * draw_mask(tokens, rate)

    @staticmethod
    def backward(ctx: _DropoutContext, gradient: Tensor) -> tuple[Tensor, None]:
        with generator_at(ctx.state, gradient.device):
            return gradient * draw_mask(gradient, ctx.rate), None


def _generator(device: torch.device) -> Any:
    return torch.random if device.type == "cpu" else torch.get_device_module(device)


def _place(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type in ("cpu", "mps") else (device,)


__all__ = ["draw_mask", "generator_at", "generator_state", "lean_dropout"]
