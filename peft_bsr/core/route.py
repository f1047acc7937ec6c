"""The Route: which tokens are alive in this very forward. Immutable, and carried with the call.

Shapes: B images, N tokens of the full sequence `[P prefix | M patches | S suffix]`, A alive tokens between prefix and
suffix, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_bsr.core.reduction import pick_tokens
from peft_bsr.deprecation import warn_renamed
from peft_bsr.errors import ForwardError

SideInput = Literal["mask", "table", "rotary_tables", "items", "other"]
"""What enters an attention next to the hidden states; see `Route.gather`."""
NAMED_KINDS: Mapping[str, SideInput] = {"attention_mask": "mask"}
"""Those that their name tells: what the probe sees none of may come later."""


@dataclass(eq=False)
class TaskCall:
    """What one forward of a model with tasks is asked, and what its blocks leave for the end of that forward.

    Attributes:
        tasks: Index of the batch's task, or one for each image, [B] int64.
        is_open: Whether the forward runs. What a recomputation of a block finds out does not count again.
        balance: Balance loss of each mixture, by block.
        usage: Tokens of each task and expert [T, E] in each mixture, by block; None = nobody asks.
        keeps_tokens: Whether a head reads the last block's tokens.
        tokens: Of the last block, [B, N, D], if so.
    """

    tasks: int | Tensor
    is_open: bool = True
    balance: dict[int, Tensor] = field(default_factory=dict)
    usage: dict[int, Tensor] | None = None
    keeps_tokens: bool = False
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Route:
    """Tokens alive at some point of one forward.

    Attributes:
        num_prefix: P, tokens at the front that are never dropped.
        num_patches: M, patches of the image before any reduction.
        num_suffix: S, tokens at the end that are never dropped (detection tokens).
        is_full_view: Whether the sequence keeps its length outside of the blocks.
        origins: [B, A] int64, ascending: the patch in row-major grid order, or `num_patches + j` for the token fused
            by the j-th reduction. None = every patch, none fused.
        merged: [B, M] int64: for each patch, the origin of the token that it is part of. None = nothing was merged.
        num_reductions: Reductions so far.
        call: What the forward is asked, in a model with tasks.
    """

    num_prefix: int
    num_patches: int
    num_suffix: int = 0
    is_full_view: bool = False
    origins: Tensor | None = None
    num_reductions: int = 0
    call: TaskCall | None = None
    merged: Tensor | None = None

    @property
    def full_length(self) -> int:
        """N, tokens before any reduction."""
        return self.num_prefix + self.num_patches + self.num_suffix

    @property
    def num_tokens(self) -> int:
        """Alive tokens, special and fused ones included."""
        alive = self.num_patches if self.origins is None else self.origins.shape[1]
        return self.num_prefix + alive + self.num_suffix

    @property
    def fused_origin(self) -> int:
        """Origin that the next fused token gets."""
        return self.num_patches + self.num_reductions

    def origins_like(self, hidden_states: Tensor) -> Tensor:
        """`origins` as a tensor, for hidden states [B, ..., D] on their device."""
        if self.origins is not None:
            return self.origins
        grid = torch.arange(self.num_patches, device=hidden_states.device)
        return grid.expand(hidden_states.shape[0], -1)

    def merged_like(self, hidden_states: Tensor) -> Tensor:
        """`merged` as a tensor, for hidden states [B, ..., D] on their device."""
        return self.merged if self.merged is not None else replace(self, origins=None).origins_like(hidden_states)

    def reduced(self, origins: Tensor, merged: Tensor | None = None) -> Route:
        """The route after a reduction that left `origins`, and merged the others into them or dropped them."""
        return Route(
            self.num_prefix,
            self.num_patches,
            self.num_suffix,
            self.is_full_view,
            origins,
            self.num_reductions + 1,
            self.call,
            merged,
        )

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Give each patch the value of the token that it is part of, [B, P + A + S, D] -> [B, P + M + S, D].

        Args:
            tokens: Of this route, on which tokens were merged.
        """
        assert self.origins is not None and self.merged is not None, "only merged tokens can be told apart again"
        batch, alive, device = *self.origins.shape, tokens.device
        places = torch.arange(self.num_prefix + alive + self.num_suffix, device=device).expand(batch, -1)
        prefix, kept, suffix = places.split([self.num_prefix, alive, self.num_suffix], dim=1)
        of_patches = torch.zeros_like(self.merged).scatter(1, self.origins, kept).gather(1, self.merged)
        return pick_tokens(tokens, torch.cat([prefix, of_patches, suffix], dim=1))

    def alive(self) -> Tensor:
        """[B, num_patches] bool, True where a patch is still there by itself. CPU or device as `origins`.

        Raises:
            ForwardError: If nothing was reduced: there is no batch to speak of.
        """
        if self.origins is None:
            raise ForwardError("nothing was reduced on this route: every patch is alive")
        alive = self.origins.new_zeros(self.origins.shape[0], self.num_patches + self.num_reductions, dtype=torch.bool)
        return alive.scatter(1, self.origins, True)[:, : self.num_patches]

    def places(self) -> Tensor:
        """[B, P + A + S] int64: place of every alive token in the full sequence; fused ones come after its end."""
        origins = self.origins
        assert origins is not None, "only a reduced route has places"
        batch, device = origins.shape[0], origins.device
        prefix = torch.arange(self.num_prefix, device=device).expand(batch, -1)
        suffix_start = self.num_prefix + self.num_patches
        fused = torch.where(origins < self.num_patches, origins, origins + self.num_suffix)
        suffix = torch.arange(suffix_start, self.full_length, device=device).expand(batch, -1)
        return torch.cat([prefix, self.num_prefix + fused, suffix], dim=1)

    def readings(self, value: Any) -> tuple[SideInput, ...]:
        """What an attention input of all tokens can be by its shape, the likeliest first, `"other"` last.

        A bias [.., N, N] has the shape of a table whose rows are N wide, and another axis may happen to be as long as
        there are tokens: which it is, the probe finds out.
        """
        if isinstance(value, (tuple, list)):
            is_pair = len(value) == 2 and all("table" in self.readings(item) for item in value)
            return ("rotary_tables", "items") if is_pair else ("items",)
        if not isinstance(value, Tensor):
            return ("other",)
        found: list[SideInput] = []
        shape, length = value.shape, self.full_length
        if value.ndim == 2 and shape[-1] == length and not value.is_floating_point():
            found.append("mask")
        if value.ndim >= 3 and shape[-1] == length and shape[-2] in (1, length):
            found.append("mask")
        if value.is_floating_point() and value.ndim >= 2 and shape[-2] in (length, self.num_patches):
            found.append("table")
        return (*found, "other")

    def gather(self, value: Any, kind: SideInput | None = None) -> Any:
        """Select the alive tokens' part of an attention input; what does not speak of single tokens stays as it is.

        Args:
            value: What all tokens would get.
            kind: What it is; default its likeliest reading, see `readings`.

                - `"mask"`: a padding mask [B, N] loses columns, a mask or bias [.., .., N or 1, N] rows and columns; a
                  fused token takes those of the first special token, and is visible without a bias where there is none.
                - `"table"`: [.., N or M, d] loses rows; a fused token's row is 0.
                - `"rotary_tables"`: (cos, sin), two tables; a fused token is not rotated.
                - `"items"`: a list or tuple, followed item by item.
                - `"other"`: speaks of no single token.

        Raises:
            NotImplementedError: On a mask of flex attention, which is not a tensor.
        """
        if self.origins is None or value is None:
            return value
        if type(value).__name__ == "BlockMask":
            raise NotImplementedError("token reduction cannot follow a mask of flex attention; use sdpa or eager")
        if kind is None:
            kind = self.readings(value)[0]
        if kind == "mask":
            if value.shape[-1] != self.full_length:
                return value  # one column for all tokens
            return self.gather_mask(value) if value.ndim > 2 else self.gather_mask(value[:, None, None])[:, 0, 0]
        if kind == "table":
            return self.gather_table(value)
        if kind == "rotary_tables":
            cos, sin = value
            return self.gather_table(cos, unrotated=1.0), self.gather_table(sin)
        return tuple(self.gather(item) for item in value) if kind == "items" else value

    def follow(self, value: Any, kind: SideInput | None = None) -> Any:
        """Old name of `gather`."""
        warn_renamed("Route.follow", "Route.gather")
        return self.gather(value, kind)

    def gather_side_inputs(
        self, arguments: dict[str, Any], kinds: Mapping[str, SideInput] = NAMED_KINDS, but: str = ""
    ) -> dict[str, Any]:
        """`gather` on every value of `arguments`, less the one called `but`.

        Args:
            arguments: What an attention is called with, by name.
            kinds: What they are; those that are not named are taken for what their shape says.
            but: The name of one that stays as it is.
        """
        return {
            name: value if name == but else self.gather(value, kinds.get(name)) for name, value in arguments.items()
        }

    def gather_mask(self, mask: Tensor) -> Tensor:
        """A mask or bias [H, N, N] or [B or 1, H or 1, N or 1, N] for the alive tokens, [B, .., alive or 1, alive]."""
        if mask.ndim == 3:
            mask = mask[None]
        places = self.places().to(mask.device)
        if self.num_prefix:
            places = torch.where(places < self.full_length, places, 0)
        else:
            visible = 0.0 if mask.is_floating_point() else 1
            rows = self.num_reductions if mask.shape[2] > 1 else 0
            mask = nn.functional.pad(mask, (0, self.num_reductions, 0, rows), value=visible)
        mask = mask.expand(places.shape[0], -1, -1, -1)
        mask = mask.gather(3, places[:, None, None, :].expand(-1, *mask.shape[1:3], -1))
        if mask.shape[2] == 1:
            return mask
        return mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))

    def gather_table(self, table: Tensor, unrotated: float = 0.0) -> Tensor:
        """A table of positions [.., N or M, d] for the alive tokens: [B, 1, alive, d] from 2-D, else with its own axes.

        Args:
            table: One row a token, or one a patch; a leading axis of images may be there.
            unrotated: What a fused token's row is filled with.
        """
        assert self.origins is not None, "only a reduced route has a table to shorten"
        rows = self.origins if table.shape[-2] == self.num_patches else self.places()
        rows = rows.to(table.device)
        padded = nn.functional.pad(table, (0, 0, 0, self.num_reductions), value=unrotated)
        if table.ndim == 2:
            return padded[rows][:, None]
        padded = padded.expand(rows.shape[0], *padded.shape[1:])
        index = rows.view(rows.shape[0], *(1,) * (table.ndim - 3), -1, 1)
        return padded.gather(-2, index.expand(*padded.shape[:-2], -1, padded.shape[-1]))


@dataclass
class ResumePoint:
    """A place in the middle of a column where a forward stops, or from where it begins.

    Attributes:
        index: The block in front of which the place is.
        tokens: What this block gets, [B, N, D] as it comes; with `lengths`, what is read of blocks before the place,
            side by side, [B, sum(lengths), D]. None = stop there, and put all this here.
        origins: Of the route there, see `Route`; with `lengths`, those of each block that is read.
        num_reductions: Of the route there.
        lengths: Tokens of each block that is read, where a side network reads blocks on the way.
        merged: Of the route there.
    """

    index: int
    tokens: Tensor | None = None
    origins: Tensor | None = None
    num_reductions: int = 0
    lengths: tuple[int, ...] = ()
    merged: Tensor | None = None
