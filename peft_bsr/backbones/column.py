"""The Column: an immutable description of a vision transformer, found by probing and free of tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Anatomy:
    """Names of a pre-norm block's direct children in the order in which they run, and of its parameter owners.

    A block computes `x = x + after_attention(attention(norm1(x)))`, then `x = x + after_mlp(mlp(norm2(x)))`, where
    the `after_*` are LayerScale, DropPath or Dropout modules.
    """

    norm1: str
    attention: str
    after_attention: tuple[str, ...]
    norm2: str
    mlp: str
    after_mlp: tuple[str, ...]
    leaves: tuple[str, ...]
    """Every module inside the block that holds parameters, relative to the block: `"attention.q_proj"`, ..."""


@dataclass(frozen=True)
class Column:
    """What a vision transformer is made of, as far as training and token reduction care.

    Attributes:
        blocks: Module names of the transformer blocks, first to last.
        anatomy: Parts of a block; all blocks share it.
        head: Names of the modules behind the last block that hold parameters and change the output (final norm,
            pooler, classifiers).
        width: D, channels of a token.
        num_prefix: P, tokens at the front that do not depend on the image (class, distillation, registers).
        image_shape: (channels, height, width) of the image that was probed.
        grid: (rows, columns) of patches of that image.
        reads_prefix: Prefix positions of the last block's output that change the model's output.
        reads_patches: Whether patch tokens of the last block's output do (a mean-pooling head, say).
    """

    blocks: tuple[str, ...]
    anatomy: Anatomy
    head: tuple[str, ...]
    width: int
    num_prefix: int
    image_shape: tuple[int, int, int]
    grid: tuple[int, int]
    reads_prefix: tuple[int, ...]
    reads_patches: bool

    @property
    def depth(self) -> int:
        """Number of blocks (L)."""
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        """Tokens of the probed image, prefix included (N)."""
        return self.num_prefix + self.grid[0] * self.grid[1]

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return self.image_shape[1] // self.grid[0], self.image_shape[2] // self.grid[1]
