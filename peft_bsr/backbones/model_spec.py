"""The ModelSpec: an immutable description of a vision transformer, found by probing, without tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from peft_bsr.core import SideInput
from peft_bsr.errors import UnsupportedModelError

ScoreSource = Literal["interface", "sdpa", "weights"]


@dataclass(frozen=True)
class BlockSpec:
    """Names of a pre-norm block's direct children in the order in which they run.

    A block computes `x = x + after_attention(attention(norm1(x)))`, then `x = x + after_mlp(mlp(norm2(x)))`, where
    the `after_*` are LayerScale, DropPath or Dropout modules, or vectors that are parameters of the block itself.
    """

    norm1: str
    attention: str
    after_attention: tuple[str, ...]
    norm2: str
    mlp: tuple[str, ...]
    after_mlp: tuple[str, ...]
    mlp_adds_residual: bool = False
    """Whether the last module of `mlp` takes the residual as its second argument and adds it."""
    block_inputs: tuple[str, ...] = ()
    """Names of the positional arguments of the block's forward after the hidden states."""
    attention_inputs: tuple[str, ...] | None = None
    """Those that the block passes to its attention by the same names. None = all."""


@dataclass(frozen=True)
class StageBlock:
    """One block of a model without token reduction. Its own forward runs; only modules in it are replaced.

    Attributes:
        stage: Number of its stage, from 1, as transformers counts them: a new one starts with a new list of blocks, or
            with another number of channels.
        width: Channels of what it gives, D.
        attention: Name of the module with the query, key and value projections, the last that runs, or `""` without.
        norm: Name of the child whose output the MLP reads and nothing else does, or `""` without one.
        mlp: Names of the children that run as MLP, in order. Empty if there are none.
        param_modules: See `ModelSpec`.
        canonical_names: See `ModelSpec`.
        shapes: Shapes of its parameters. Blocks that agree in all fields but `stage` compute alike.
        num_outputs: Length of the tuple that it returns; 0 if it returns a tensor.
        before: Names of the modules with parameters that run between the block before and this one.
        other_attentions: Names of such modules that run before `attention`.
    """

    stage: int
    width: int
    attention: str
    norm: str
    mlp: tuple[str, ...]
    param_modules: tuple[str, ...]
    canonical_names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    num_outputs: int = 0
    before: tuple[str, ...] = ()
    other_attentions: tuple[str, ...] = ()

    @property
    def block_spec(self) -> BlockSpec:
        """The MLP half as part of a pre-norm block; its residual and what follows the MLP are the block's own."""
        return BlockSpec("", self.attention.split(".")[0], (), self.norm, self.mlp, ())


@dataclass(frozen=True)
class ModelSpec:
    """Description of a vision transformer: what training and token reduction need to know.

    Attributes:
        blocks: Module names of the transformer blocks, first to last.
        param_modules: Names of the modules with parameters in a block, relative to the block: `"attention.q_proj"`, ...
        canonical_names: The same modules under names that do not depend on the model: `"attention.query"`, ...
        attention: Name, relative to the block, of the module that contains the query, key and value projections.
        block_spec: Structure of a block, the same for all blocks. None if they are not plain pre-norm blocks.
        head: Names of the modules after the last block that have parameters and change the output (final norm, pooler,
            classifiers).
        unread: Names of modules after the last block that do not change the output (such as an unused pooler).
        width: Embedding dimension, D.
        num_prefix: Number of tokens at the front that do not depend on the image (class, distillation, registers), P.
        num_patches: Number of patch tokens of the probed image, M.
        num_suffix: Number of tokens at the end that do not depend on the image (detection tokens), S.
        image_shape: Shape of the probed input without the batch: (channels, height, width) for an image.
        grid: Patch grid: (rows, columns) of an image, (frames, rows, columns) of a video. None if there is no grid.
        last_read: Index of the last block whose output changes the model's output: depth - 1, unless the head reads
            only earlier blocks (dense heads, backbones with `out_indices`).
        reads_prefix: Indices of the prefix tokens in that block's output that change the model's output.
        reads_patches: Whether patch tokens in that block's output change it, such as with a mean-pooling head.
        reads_suffix: Whether suffix tokens in that block's output change it.
        is_chained: Whether the input of every block is the output of the block before it.
        returns_tuple: Whether a block returns a tuple that starts with the hidden states.
        uses_positions: Whether blocks use token positions, through side inputs that are gathered for the kept tokens.
        side_inputs: (name, kind) of the attention's inputs other than the hidden states; see `Route.gather`.
        scores_from: Source of token scores: queries and keys in transformers' `AttentionInterface` (`"interface"`) or
            in torch's `scaled_dot_product_attention` (`"sdpa"`), or the attention weights that the attention returns
            (`"weights"`). None = no scores.
        num_heads: Number of attention heads, H; 0 if unknown.
        scaling: Scale of the products of projected queries and keys; 0 if unknown.
        no_reduction: Why no token can be dropped or merged. None = tokens can be reduced. Otherwise the fields about
            tokens and the attention say nothing: there are no special tokens, `num_patches` counts places of the first
            block's input, and `width` is the last block's.
        stage_blocks: The parts of every block, if there is no token reduction; otherwise empty.
        whole_block: The parts of a block, if tokens can be reduced and `block_spec` is None: its own forward runs.
        part: Name of the vision model in a larger model, if the adapter or the probe was given the larger one. All
            other names are relative to it. None = the model itself.
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
    no_reduction: str | None = None
    stage_blocks: tuple[StageBlock, ...] = ()
    whole_block: StageBlock | None = None
    part: str | None = None

    def local_name(self, name: str) -> str:
        """A module's name relative to the part; `""` for the part itself and for modules outside of it."""
        if self.part is None:
            return name
        return name.removeprefix(f"{self.part}.") if name.startswith(f"{self.part}.") else ""

    def full_name(self, name: str) -> str:
        """The name, in the larger model, of a module of the part."""
        return name if self.part is None else f"{self.part}.{name}"

    @property
    def depth(self) -> int:
        """Number of blocks (L)."""
        return len(self.blocks)

    @property
    def paths(self) -> dict[str, str]:
        """Canonical name -> name relative to the block, of each module with parameters."""
        return dict(zip(self.canonical_names, self.param_modules, strict=True))

    def paths_of(self, index: int) -> dict[str, str]:
        """`paths` of block `index`: blocks of a model without token reduction differ."""
        if not self.stage_blocks:
            return self.paths
        block = self.stage_blocks[index]
        return dict(zip(block.canonical_names, block.param_modules, strict=True))

    def as_output(self, index: int, tokens: Any) -> Any:
        """What block `index` would return if it gave these tokens: alone, or as the first of as many values."""
        if self.stage_blocks:
            length = self.stage_blocks[index].num_outputs
            return (tokens, *[None] * (length - 1)) if length else tokens
        return (tokens,) if self.returns_tuple else tokens

    def stage(self, number: int) -> list[int]:
        """Indices of the blocks of a stage, from 1; empty if there is none of that number."""
        return [index for index, block in enumerate(self.stage_blocks) if block.stage == number]

    @property
    def num_special(self) -> int:
        """Number of tokens that are never dropped, P + S."""
        return self.num_prefix + self.num_suffix

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the probed image, including special tokens, N."""
        return self.num_special + self.num_patches

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels.

        Raises:
            UnsupportedModelError: If the tokens are not a patch grid of one image.
        """
        if self.grid is None or len(self.grid) != 2 or len(self.image_shape) != 3:
            raise UnsupportedModelError("this model's tokens are not a grid of patches of one image")
        return self.image_shape[1] // self.grid[0], self.image_shape[2] // self.grid[1]

    def grid_at(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image.

        Args:
            height: In pixels.
            width: In pixels.

        Raises:
            UnsupportedModelError: If the tokens are not a patch grid of one image.
        """
        return height // self.patch_size[0], width // self.patch_size[1]

    def at_size(self, height: int, width: int) -> ModelSpec:
        """The description for images of another size.

        Args:
            height: In pixels.
            width: In pixels.

        Raises:
            UnsupportedModelError: If the tokens are not a patch grid of one image.
        """
        shape = (self.image_shape[0], height, width)
        if self.no_reduction is not None:
            return replace(self, image_shape=shape)  # the other fields about tokens say nothing
        rows, columns = grid = self.grid_at(height, width)
        return replace(self, image_shape=shape, grid=grid, num_patches=rows * columns)
