"""Forwards that stop or begin in the middle of a column: what a cache of frozen blocks' outputs is made and fed by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.core import Entry, Forward
from peft_bsr.engine.record import find_forward
from peft_bsr.errors import ForwardError


class ReachedError(Exception):
    """Ends a forward that was to stop at a place; never leaves `run_until`."""


def run_until(model: nn.Module, index: int, inputs: dict[str, Any]) -> Entry:
    """Run `model(**inputs)` up to block `index`, without gradients.

    Args:
        model: A model with one of our adapters.
        index: The block that does not run any more.
        inputs: Of the model.

    Returns:
        What stands in front of the block.
    """
    entry = Entry(index)
    with _entry(find_forward(model), entry), torch.no_grad():
        try:
            model(**inputs)
        except ReachedError:
            return entry
    raise ForwardError(f"the forward came to its end without block {index}; is the adapter disabled?")


@contextmanager
def run_from(model: nn.Module, entry: Entry) -> Iterator[None]:
    """A forward inside begins at `entry`: earlier blocks do not run, and what comes before them does not matter."""
    with _entry(find_forward(model), entry):
        yield


@contextmanager
def _entry(now: Forward, entry: Entry) -> Iterator[None]:
    now.entry = entry
    try:
        yield
    finally:
        now.entry = now.route = now.running = now.reading = None


def meet_entry(now: Forward, hidden_states: Tensor) -> Tensor:
    """Stop in front of the entry's block, or take its tokens and its route. Called by that block."""
    entry = now.entry
    assert entry is not None, "only an entry's block meets it"
    route = now.route
    if entry.tokens is None:
        entry.tokens = hidden_states.detach()
        if route is not None:
            entry.origins, entry.num_reductions = route.origins, route.num_reductions
        raise ReachedError
    now.resume(entry.origins, entry.num_reductions)
    return entry.tokens.to(hidden_states)


__all__ = ["Entry", "ReachedError", "meet_entry", "run_from", "run_until"]
