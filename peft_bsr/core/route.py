"""The Route: which tokens are left in the current forward. Immutable, and passed from block to block.

Shapes: B images, N tokens of the full sequence `[P prefix | M patches | S suffix]`, A alive tokens between prefix and
suffix, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_bsr.core.reduction import pick_tokens
from peft_bsr.deprecation import warn_renamed
from peft_bsr.errors import ForwardError

SideInput = Literal["mask", "table", "rotary_tables", "items", "other"]
"""Kind of an attention input other than the hidden states; see `Route.gather`."""
NAMED_KINDS: Mapping[str, SideInput] = {"attention_mask": "mask"}
"""Kinds known by name, for arguments that the probe does not see but later calls may pass."""


@dataclass(eq=False)
class TaskCall:
    """The tasks of one forward of a model with tasks, and what its blocks collect until the forward ends.

    Attributes:
        tasks: Index of the batch's task, or one index per image, [B] int64.
        is_open: Whether the forward is running. Blocks that are recomputed in backward collect nothing.
        balance: Block index -> balance loss of its mixture.
        usage: Block index -> number of tokens per task and expert, [T, E]. None = not collected.
        keeps_tokens: Whether a head reads the last block's tokens.
        tokens: Tokens of the last block, [B, N, D], if a head reads them.
    """

    tasks: int | Tensor
    is_open: bool = True
    balance: dict[int, Tensor] = field(default_factory=dict)
    usage: dict[int, Tensor] | None = None
    keeps_tokens: bool = False
    tokens: Tensor | None = None

    def close(self) -> None:
        """End the forward, and release the tensors: a checkpoint holds the call, and their graphs the checkpoint."""
        self.is_open, self.balance, self.tokens = False, {}, None


@dataclass(frozen=True)
class Route:
    """The tokens that are left at a point of one forward ("alive" tokens).

    Attributes:
        num_prefix: Number of tokens at the front that are never dropped, P.
        num_patches: Number of patches before any reduction, M.
        num_suffix: Number of tokens at the end that are never dropped (detection tokens), S.
        is_full_view: Whether the sequence keeps its length outside of the blocks.
        origins: For each alive token the index of its patch in row-major order, or `num_patches + j` if it was fused by
            reduction j, [B, A] int64, ascending. None = all patches and no fused tokens.
        merged: For each patch the origin of the token that contains it, [B, M] int64. None = nothing was merged.
        num_reductions: Number of reductions so far.
        call: Tasks of the forward, in a model with tasks.
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
        """Number of tokens before any reduction, N."""
        return self.num_prefix + self.num_patches + self.num_suffix

    @property
    def num_tokens(self) -> int:
        """Number of alive tokens, including special and fused ones."""
        alive = self.num_patches if self.origins is None else self.origins.shape[1]
        return self.num_prefix + alive + self.num_suffix

    @property
    def fused_origin(self) -> int:
        """Origin of the next fused token."""
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
        """The route after a reduction that keeps `origins` and drops the other tokens, or merges them."""
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
        """Give each patch the value of the token that contains it, [B, P + A + S, D] -> [B, P + M + S, D].

        Args:
            tokens: The alive tokens of this route. It must have merged tokens.
        """
        assert self.origins is not None and self.merged is not None, "nothing was merged on this route"
        batch, alive, device = *self.origins.shape, tokens.device
        places = torch.arange(self.num_prefix + alive + self.num_suffix, device=device).expand(batch, -1)
        prefix, kept, suffix = places.split([self.num_prefix, alive, self.num_suffix], dim=1)
        of_patches = torch.zeros_like(self.merged).scatter(1, self.origins, kept).gather(1, self.merged)
        return pick_tokens(tokens, torch.cat([prefix, of_patches, suffix], dim=1))

    def alive(self) -> Tensor:
        """Whether each patch is still a separate token, [B, num_patches] bool, on the device of `origins`.

        Raises:
            ForwardError: If nothing was reduced, because the batch size is unknown then.
        """
        if self.origins is None:
            raise ForwardError("nothing was reduced on this route: every patch is alive")
        alive = self.origins.new_zeros(self.origins.shape[0], self.num_patches + self.num_reductions, dtype=torch.bool)
        return alive.scatter(1, self.origins, True)[:, : self.num_patches]

    def places(self) -> Tensor:
        """Index of each alive token in the full sequence, [B, P + A + S] int64. Fused tokens come after its end."""
        origins = self.origins
        assert origins is not None, "only a reduced route has places"
        batch, device = origins.shape[0], origins.device
        prefix = torch.arange(self.num_prefix, device=device).expand(batch, -1)
        suffix_start = self.num_prefix + self.num_patches
        fused = torch.where(origins < self.num_patches, origins, origins + self.num_suffix)
        suffix = torch.arange(suffix_start, self.full_length, device=device).expand(batch, -1)
        return torch.cat([prefix, self.num_prefix + fused, suffix], dim=1)

    def readings(self, value: object) -> tuple[SideInput, ...]:
        """Kinds that an attention input of all tokens can have by its shape, most likely first, `"other"` last.

        Shapes are ambiguous: a bias [.., N, N] looks like a table of width N, and another axis may happen to have
        length N. The probe finds out which kind it is.
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
        """Select the alive tokens' part of an attention input. Inputs without a token axis are returned unchanged.

        Args:
            value: The input for all tokens.
            kind: Kind of the input. Default None: the most likely one, see `readings`.

                - `"mask"`: selects columns of a padding mask [B, N], or rows and columns of a mask or bias
                  [.., .., N or 1, N]. A fused token gets those of the first special token; without special tokens it
                  is visible and has no bias.
                - `"table"`: selects rows of [.., N or M, d]; the row of a fused token is 0.
                - `"rotary_tables"`: (cos, sin), two tables; a fused token is not rotated.
                - `"items"`: a list or tuple, gathered item by item.
                - `"other"`: has no token axis.

        Raises:
            NotImplementedError: If it is a mask of flex attention, which is not a tensor.
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

    def follow(self, value: object, kind: SideInput | None = None) -> object:
        """Old name of `gather`."""
        warn_renamed("Route.follow", "Route.gather")
        return self.gather(value, kind)

    def gather_side_inputs(
        self, arguments: dict[str, Any], kinds: Mapping[str, SideInput] = NAMED_KINDS, but: str = ""
    ) -> dict[str, Any]:
        """`gather` for every value of `arguments` except `but`.

        Args:
            arguments: Arguments of an attention, by name.
            kinds: Name -> kind. The kind of other arguments is inferred from their shape.
            but: Name of an argument that is returned unchanged.
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
            table: Table with one row per token or per patch, optionally with a batch axis in front.
            unrotated: Value of a fused token's row. Default 0.
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
    """A block before which a forward stops, or at which it starts.

    Attributes:
        index: Index of the block.
        tokens: Input of this block, [B, N, D]. With `lengths`, the tokens of the blocks that a side network reads
            before it, concatenated, [B, sum(lengths), D]. None = the forward stops here and fills in all fields.
        origins: `Route.origins` at this point; with `lengths`, those of each block that is read.
        num_reductions: `Route.num_reductions` at this point.
        lengths: Number of tokens of each block that a side network reads before it.
        merged: `Route.merged` at this point.
    """

    index: int
    tokens: Tensor | None = None
    origins: Tensor | None = None
    num_reductions: int = 0
    lengths: tuple[int, ...] = ()
    merged: Tensor | None = None

    @property
    def starts(self) -> bool:
        """Whether a forward starts here. False: it stops here."""
        return self.tokens is not None

    def fill(self, parts: Sequence[Tensor]) -> None:
        """Set the tokens [B, N, D] of each block that a side network reads."""
        self.tokens, self.lengths = torch.cat(list(parts), dim=1), tuple(part.shape[1] for part in parts)

    def part(self, place: int) -> Tensor:
        """Tokens [B, N, D] of one of the blocks that a side network reads; the inverse of `fill`."""
        assert self.tokens is not None, "a forward that stops here has not filled it yet"
        return self.tokens.split(self.lengths, dim=1)[place]
