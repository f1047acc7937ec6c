"""The Route: which tokens are alive in this very forward. Immutable, and carried with the call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Route:
    """Tokens alive at some point of one forward. Shapes: B images, M alive tokens behind the prefix.

    Attributes:
        num_prefix: P, tokens at the front that are never dropped.
        num_patches: Patches of the image, before any reduction.
        origins: [B, M] int64, ascending: the patch in row-major grid order, or `num_patches + j` for the token fused
            by the j-th reduction. None = every patch, none fused.
        num_reductions: Reductions so far.
    """

    num_prefix: int
    num_patches: int
    origins: Tensor | None = None
    num_reductions: int = 0

    def origins_like(self, hidden_states: Tensor) -> Tensor:
        """`origins` as a tensor on the device of `hidden_states` [B, P + M, D]."""
        if self.origins is not None:
            return self.origins
        grid = torch.arange(self.num_patches, device=hidden_states.device)
        return grid.expand(hidden_states.shape[0], -1)

    @property
    def num_tokens(self) -> int:
        """Alive tokens, prefix and fused ones included."""
        return self.num_prefix + (self.num_patches if self.origins is None else self.origins.shape[1])

    @property
    def fused_origin(self) -> int:
        """Origin that the next fused token gets."""
        return self.num_patches + self.num_reductions

    def reduced(self, origins: Tensor) -> Route:
        """The route behind a reduction that left `origins`."""
        return replace(self, origins=origins, num_reductions=self.num_reductions + 1)

    def alive(self) -> Tensor:
        """[B, num_patches] bool, True where a patch is still there by itself. CPU or device as `origins`.

        Raises:
            ValueError: If nothing was reduced: there is no batch to speak of.
        """
        if self.origins is None:
            raise ValueError("nothing was reduced on this route: every patch is alive")
        alive = self.origins.new_zeros(self.origins.shape[0], self.num_patches + self.num_reductions, dtype=torch.bool)
        return alive.scatter(1, self.origins, True)[:, : self.num_patches]

    def gather_mask(self, mask: Tensor) -> Tensor:
        """Select the kept tokens' rows and columns of an attention mask [B or 1, heads or 1, N or 1, N].

        Fused tokens are visible to and see everything that a padding mask lets be seen.
        """
        if self.origins is None or mask.shape[-1] != self.num_prefix + self.num_patches:
            return mask
        batch, alive = self.origins.shape[0], self.num_prefix + self.origins.shape[1]
        prefix = torch.arange(self.num_prefix, device=mask.device).expand(batch, -1)
        tokens = torch.cat([prefix, self.num_prefix + self.origins.to(mask.device)], dim=1)
        visible = True if mask.dtype == torch.bool else 0.0
        mask = nn.functional.pad(mask, (0, self.num_reductions), value=visible).expand(batch, -1, -1, -1)
        mask = mask.gather(3, tokens[:, None, None, :].expand(-1, *mask.shape[1:3], -1))
        if mask.shape[2] == 1:
            return mask
        mask = nn.functional.pad(mask, (0, 0, 0, self.num_reductions), value=visible)
        return mask.gather(2, tokens[:, None, :, None].expand(-1, mask.shape[1], -1, alive))


class RouteCarrier(threading.local):
    """Hands the route from one block's call to the next within a forward, one per thread (nn.DataParallel).

    The first block's call starts a new route and the last one's ends it. A recomputed block (gradient checkpointing)
    does not come by here: it gets the route that its own call was given.
    """

    route: Route | None = None
    log: list[tuple[int, Route]] | None = None

    def current(self) -> Route:
        """The running forward's route.

        Raises:
            RuntimeError: If a block was called on its own, outside of the model's forward.
        """
        if self.route is None:
            raise RuntimeError("a block of a model with an adapter ran outside of the model's forward; call the model")
        return self.route

    def __reduce__(self) -> tuple[type[RouteCarrier], tuple[()]]:  # copies and pickles start empty
        return RouteCarrier, ()


@contextmanager
def record_routes(model: nn.Module) -> Iterator[list[tuple[int, Route]]]:
    """Collect `(block index, route behind it)` of every reduction that runs inside the `with` block.

    Args:
        model: A model with one of our adapters.

    Yields:
        The list, filled as forwards run.

    Raises:
        ValueError: If the model carries none of our adapters.

    Example:
        >>> with record_routes(model) as routes:  # doctest: +SKIP
        ...     model(pixel_values)
        >>> routes[-1][1].alive()  # which patches the last reduction left  # doctest: +SKIP
    """
    carriers = [getattr(module, "carrier", None) for module in model.modules()]
    carrier = next((c for c in carriers if isinstance(c, RouteCarrier)), None)
    if carrier is None:
        raise ValueError(f"{type(model).__name__} has no adapter of peft_bsr. Call get_peft_model(model, BSRConfig()).")
    log: list[tuple[int, Route]] = []
    earlier, carrier.log = carrier.log, log
    try:
        yield log
    finally:
        carrier.log = earlier
