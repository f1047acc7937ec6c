"""Recording which experts are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from peft_bsr.engine import find_forward


@contextmanager
def record_usage(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Count the tokens that each expert computes for each task, over all forwards inside the `with` block.

    Args:
        model: A model with an adapter that has mixtures.

    Yields:
        Block -> counts [T, E] int64, tasks in the order of the config; filled as forwards run.

    Raises:
        AdapterError: If the model has no adapter of ours.

    Examples:
        >>> with record_usage(model) as usage:  # doctest: +SKIP
        ...     model(pixel_values, task="cifar10")
        >>> usage[11][0]  # of the first task in block 11  # doctest: +SKIP
    """
    now = find_forward(model)
    earlier, now.usage = now.usage, {}
    try:
        yield now.usage
    finally:
        now.usage = earlier


__all__ = ["record_usage"]
