"""Forwards that stop or begin in the middle of a model: what a cache of frozen blocks' outputs is made and fed by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.core import Forward, ResumePoint
from peft_bsr.engine.record import find_forward
from peft_bsr.errors import ForwardError


class StopForwardError(Exception):
    """Ends a forward that was to stop at a place; never leaves `run_until`."""


def run_until(model: nn.Module, index: int, inputs: dict[str, Any]) -> ResumePoint:
    """Run `model(**inputs)` up to block `index`, without gradients.

    Args:
        model: A model with one of our adapters.
        index: The block that does not run any more.
        inputs: Of the model.

    Returns:
        What stands in front of the block.
    """
    resume_point = ResumePoint(index)
    with _resume_point(find_forward(model), resume_point), torch.no_grad():
        try:
            model(**inputs)
        except StopForwardError:
            return resume_point
    raise ForwardError(f"the forward came to its end without block {index}; is the adapter disabled?")


@contextmanager
def run_from(model: nn.Module, resume_point: ResumePoint) -> Iterator[None]:
    """A forward inside begins at `resume_point`; earlier blocks do not run."""
    with _resume_point(find_forward(model), resume_point):
        yield


@contextmanager
def _resume_point(now: Forward, resume_point: ResumePoint) -> Iterator[None]:
    now.resume_point = resume_point
    try:
        yield
    finally:
        now.resume_point = now.route = now.running = now.reading = None


def stop_or_resume(now: Forward, hidden_states: Tensor) -> Tensor:
    """Stop before the resume point's block, or take its tokens and its route. Called by that block."""
    resume_point = now.resume_point
    assert resume_point is not None, "only the resume point's block calls this"
    route = now.route
    if resume_point.tokens is None:
        resume_point.tokens = hidden_states.detach()
        if route is not None:
            resume_point.origins, resume_point.num_reductions = route.origins, route.num_reductions
            resume_point.merged = route.merged
        raise StopForwardError
    now.resume(resume_point)
    return resume_point.tokens.to(hidden_states)


__all__ = ["ResumePoint", "StopForwardError", "run_from", "run_until", "stop_or_resume"]
