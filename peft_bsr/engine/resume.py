"""Forwards that stop or start in the middle of a model, to fill and use a cache of frozen blocks' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_bsr.core import Forward, ResumePoint
from peft_bsr.engine.record import find_forward
from peft_bsr.errors import ForwardError


class StopForwardError(Exception):
    """Ends a forward at a resume point; caught in `run_until`."""


def run_until(model: nn.Module, index: int, inputs: Mapping[str, object]) -> ResumePoint:
    """Run `model(**inputs)` up to block `index`, without gradients.

    Args:
        model: A model with an adapter of this package.
        index: Index of the first block that does not run.
        inputs: Keyword arguments of the model.

    Returns:
        The block's input tokens and their route.

    Raises:
        AdapterError: If the model has no adapter of this package.
        ForwardError: If the forward ended without reaching the block.
    """
    resume_point = ResumePoint(index)
    with _resume_point(find_forward(model), resume_point), torch.no_grad():
        try:
            model(**inputs)
        except StopForwardError:
            return resume_point
    raise ForwardError(f"the forward ended without reaching block {index}; is the adapter disabled?")


@contextmanager
def run_from(model: nn.Module, resume_point: ResumePoint) -> Iterator[None]:
    """Context manager: forwards inside start at `resume_point`; earlier blocks do not run."""
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
    """Stop before the resume point's block, or return its tokens and set its route. Called by that block."""
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
