"""The ModelSpec: an immutable description of a vision transformer, found by probing and free of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft_bsr.core import SideInput
from peft_bsr.errors import UnsupportedModelError

ScoreSource = Literal["interface", "sdpa", "weights"]


@dataclass(frozen=True)
class BlockSpec:
    """Names of a pre-norm block's direct children in the order in which they run.

    A block computes `x = x + after_attention(attention(norm1(x)))`, then `x = x + after_mlp(mlp(norm2(x)))`, where
    the `after_*` are LayerScale, DropPath or Dropout modules, or vectors that the block itself holds.
    """

    norm1: str
    attention: str
    after_attention: tuple[str, ...]
    norm2: str
    mlp: tuple[str, ...]
    after_mlp: tuple[str, ...]
    mlp_adds_residual: bool = False
    """The last of `mlp` takes the residual as its second argument and adds it itself."""
    block_inputs: tuple[str, ...] = ()
    """Names of what a block's forward takes by position behind the hidden states."""
    attention_inputs: tuple[str, ...] | None = None
    """Those that it hands to its attention, by the same names; None = all."""


@dataclass(frozen=True)
class ModelSpec:
    """What a vision transformer is made of, as far as training and token reduction care.

    Attributes:
        blocks: Module names of the transformer blocks, first to last.
        param_modules: Modules inside a block that hold its parameters, relative to the block: `"attention.q_proj"`, ...
        canonical_names: Name of each of them that does not depend on the model's own names: `"attention.query"`, ...
        attention: Name inside a block of the module that owns the query, key and value projections.
        block_spec: Parts of a block, or None where it is not a plain pre-norm block; all blocks share it.
        head: Names of the modules behind the last block that hold parameters and change the output (final norm,
            pooler, classifiers).
        unread: Names of those there that the output does not depend on (a pooler that a classifier goes round).
        width: D, channels of a token.
        num_prefix: P, tokens at the front that do not depend on the image (class, distillation, registers).
        num_patches: M, tokens of the probed image itself.
        num_suffix: S, tokens at the end that do not depend on the image (detection tokens).
        image_shape: Shape of the probed input without the batch: (channels, height, width) of an image.
        grid: (rows, columns) of its patches, (frames, rows, columns) of a video; None where the tokens are no grid.
        last_read: Index of the last block whose output changes the model's: depth - 1, but for heads that read earlier
            blocks (dense heads, backbones with `out_indices`).
        reads_prefix: Prefix positions of that block's output that change the model's output.
        reads_patches: Whether patch tokens of that block's output do (a mean-pooling head, say).
        reads_suffix: Whether suffix tokens do.
        is_chained: Whether every block's input is the output of the one before it.
        returns_tuple: Whether a block returns (hidden states, ...) and not the hidden states alone.
        uses_positions: Whether blocks use a token's position, through side inputs that follow the kept tokens.
        side_inputs: (name, kind) of what a block's attention gets next to the hidden states; see `Route.gather`.
        scores_from: How token scores are had: from the query and key that pass through transformers'
            `AttentionInterface` (`"interface"`) or torch's `scaled_dot_product_attention` (`"sdpa"`), from the
            `"weights"` that the attention returns, or not at all (None).
        num_heads: H, of the attention; 0 where it is not seen.
        scaling: Factor on the products of queries and keys; 0 where it is not seen.
    """

    blocks: tuple[str, ...]
    param_modules: tuple[str, ...]
    canonical_names: tuple[str, ...]
    attention: str
    block_spec: BlockSpec | None
    head: tuple[str, ...]
    unread: tuple[str, ...]
    width: int
    num_prefix: int
    num_patches: int
    num_suffix: int
    image_shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    last_read: int
    reads_prefix: tuple[int, ...]
    reads_patches: bool
    reads_suffix: bool
    is_chained: bool
    returns_tuple: bool
    uses_positions: bool
    side_inputs: tuple[tuple[str, SideInput], ...]
    scores_from: ScoreSource | None
    num_heads: int
    scaling: float

    @property
    def depth(self) -> int:
        """Number of blocks (L)."""
        return len(self.blocks)

    @property
    def paths(self) -> dict[str, str]:
        """Canonical name -> module name inside a block, of each module that holds parameters."""
        return dict(zip(self.canonical_names, self.param_modules, strict=True))

    @property
    def num_special(self) -> int:
        """P + S, tokens that are never dropped."""
        return self.num_prefix + self.num_suffix

    @property
    def num_tokens(self) -> int:
        """Tokens of the probed image, special ones included (N)."""
        return self.num_special + self.num_patches

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of an image's patch in pixels.

        Raises:
            UnsupportedModelError: If the model does not cut one image into a grid.
        """
        if self.grid is None or len(self.grid) != 2 or len(self.image_shape) != 3:
            raise UnsupportedModelError("this model's tokens are not a grid of patches of one image")
        return self.image_shape[1] // self.grid[0], self.image_shape[2] // self.grid[1]
