"""Records the routes of a model's forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from peft_bsr.core import Forward, ForwardContext, Route, outliving
from peft_bsr.errors import AdapterError


@contextmanager
def record_routes(model: nn.Module) -> Iterator[list[tuple[int, Route]]]:
    """Collect `(block index, route after it)` of every reduction that runs inside the `with` block.

    Args:
        model: A model with an adapter of this package.

    Yields:
        The list, filled as forwards run. Routes share no memory with the forward and do not hold its tasks.

    Raises:
        AdapterError: If the model has no adapter of this package.

    Examples:
        >>> with record_routes(model) as routes:  # doctest: +SKIP
        ...     model(pixel_values)
        >>> routes[-1][1].alive()  # which patches the last reduction left  # doctest: +SKIP
    """
    now = find_forward(model)
    log: list[tuple[int, Route]] = []

    def record(index: int, route: Route) -> None:
        assert route.origins is not None, "a recorder is called after a reduction"
        merged = None if route.merged is None else outliving(route.merged)
        log.append((index, replace(route, origins=outliving(route.origins), merged=merged, call=None)))

    now.recorders.append(record)
    try:
        yield log
    finally:
        now.recorders.remove(record)


def find_forward(model: nn.Module) -> Forward:
    """The state that the blocks of `model` share during a forward, of this thread.

    Raises:
        AdapterError: If the model has no adapter of this package.
    """
    contexts = [getattr(module, "context", None) for module in model.modules()]
    context = next((c for c in contexts if isinstance(c, ForwardContext)), None)
    if context is None:
        raise AdapterError(
            f"{type(model).__name__} has no adapter of peft_bsr. Call get_peft_model(model, BSRConfig())."
        )
    return context.now
