"""Configuration of LoSA, and its plan for a model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from typing import Any, get_args

from peft_bsr.backbones import ModelSpec
from peft_bsr.core import ScoreKind
from peft_bsr.core.checks import check_choice, check_flags, check_whole, is_whole
from peft_bsr.engine import BlockPlan, KeptTokens, Mode, Plan, ReduceAt
from peft_bsr.errors import ConfigError
from peft_bsr.registration import extend_peft_type
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.frozen_weights import FROZEN_WEIGHTS_HELP, FrozenWeights
from peft_bsr.tuners.base.reductions import as_list, check_indices, check_reductions, check_within, resolve_reductions

_EVERY = re.compile(r"every:[1-9]\d{0,3}")
_MOST_PATCHES = 2**18


@dataclass
class LoSAConfig(SavedConfig):
    """Configuration of Low-rank Side Adaptation: a side network of small mixers refines a frozen backbone's tokens.

    The backbone runs without gradients. After each block that is read, a low-rank mixer across channels and one across
    positions are added to a side state. The head gets the last block's tokens plus that state, so any head works. The
    mixers, the final norm and the head train. An adapter cannot be merged, because the mixers are not part of the
    model's weights. A new adapter does not change the outputs.

    Source: arXiv 2402.02887, our reading of the abstract. Interpretations and differences: docs/losa.md.

    Args:
        r: Rank of the channel mixers. Default 16.
        token_r: Rank of the token mixers. Default 16.
        token_mixing: Whether to mix tokens across positions. Without it the adapter does not depend on the image size,
            and the method is close to E3VA. Default True.
        layers: Blocks that are read: indices from 0, or `"every:n"` (every n-th, counted back from the last one).
            Default `"every:1"`: all on which the head depends.
        keep_rate: Share of the image tokens that a reduction keeps, see `BSRConfig`. Default 1.0: no reduction.
        reduction_blocks: Blocks that drop image tokens. Default None: a quarter, a half and three quarters into the
            depth.
        fuse_dropped: See `BSRConfig`.
        reduce_at: See `BSRConfig`.
        mode: See `BSRConfig`.
        score: See `BSRConfig`.
        kept_tokens: Precision of the one token tensor that each layer keeps for backward: `"full"` (its own dtype),
            `"bfloat16"`, `"float16"` or `"int8"` (stochastic rounding). The forward does not change. Default `"full"`.
        frozen_weights: `"full"`, or the precision to which Linear weights of the blocks are permanently rounded in the
            model: `"int8"` (needs torchao) or `"bfloat16"`, see `BSRConfig`. Default `"full"`.
        init_weights: Whether the model starts as the base model; False starts away from it (for tests). Default True.
        grid: Patch grid of the token mixers, (rows, columns). Written when the adapter is attached; for images of
            another size the mixers are interpolated.
        layout: Canonical place -> name in the model of each trained module. Written when the adapter is attached.
        target_modules: Must be None; choose the blocks to read with `layers`.
        labels: Class names. Written when the adapter is attached, for `peft_bsr.load`.

    Raises:
        ConfigError: If values are invalid; the message names all of them.

    Examples:
        >>> LoSAConfig(layers="every:4", kept_tokens="int8").r
        16
    """

    r: int = field(default=16, metadata={"help": "Rank of the channel mixers."})
    token_r: int = field(default=16, metadata={"help": "Rank of the token mixers."})
    token_mixing: bool = field(default=True, metadata={"help": "Mix tokens across positions, too."})
    layers: list[int] | str = field(
        default="every:1", metadata={"help": "Blocks that are read: indices, or 'every:n' back from the last."}
    )
    keep_rate: float | list[float] = field(
        default=1.0, metadata={"help": "Share of tokens kept at each reduction, one for all or one per block."}
    )
    reduction_blocks: list[int] | None = field(
        default=None, metadata={"help": "Blocks that drop tokens; None = at 1/4, 1/2 and 3/4 of the depth."}
    )
    fuse_dropped: bool | None = field(default=None, metadata={"help": "Append one token fused from the dropped ones."})
    reduce_at: ReduceAt | None = field(default=None, metadata={"help": "'mid_block' or 'after_block'; None = chosen."})
    mode: Mode | None = field(default=None, metadata={"help": "'compact' or 'full_view'; None = chosen."})
    score: ScoreKind | None = field(
        default=None, metadata={"help": "'class', 'mean_query' or 'received'; None = chosen."}
    )
    kept_tokens: KeptTokens = field(
        default="full", metadata={"help": "'full', 'bfloat16', 'float16' or 'int8': how tokens are kept for backward."}
    )
    frozen_weights: str = field(default="full", metadata={"help": FROZEN_WEIGHTS_HELP})
    init_weights: bool = field(default=True, metadata={"help": "False starts away from the base model (for tests)."})
    grid: list[int] | None = field(
        default=None, metadata={"help": "Written at attach: rows and columns of patches of the token mixers."}
    )
    layout: dict[str, str] | None = field(
        default=None, metadata={"help": "Written at attach: canonical place -> module name of what trains."}
    )
    target_modules: None = field(default=None, metadata={"help": "Not used: see `layers`."})

    # final norm and head train as copies, tokens are only dropped; not annotated, so that these are not fields
    trainable, exclude_modules, modules_to_save, reduction = "full", None, None, "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("LOSA")
        for name in ("layers", "reduction_blocks", "keep_rate", "grid"):
            setattr(self, name, as_list(getattr(self, name)))
        problems = [*check_whole(self, "r", "token_r"), *check_flags(self, "token_mixing", "init_weights")]
        problems += [*self._check_layers(), *check_reductions(self), *self._check_written()]
        problems += check_choice(self, "kept_tokens", get_args(KeptTokens))
        problems += check_choice(self, "frozen_weights", get_args(FrozenWeights))
        if self.target_modules is not None:
            problems.append(f"`target_modules={self.target_modules!r}`: choose the blocks to read with `layers`.")
        if problems:
            raise ConfigError.from_problems("LoSAConfig", problems)

    def _check_layers(self) -> list[str]:
        if isinstance(self.layers, str):
            if _EVERY.fullmatch(self.layers):
                return []
            return [f'`layers={self.layers!r}` is not understood. Use indices such as `[3, 7, 11]`, or "every:4".']
        if not self.layers:
            return [f'`layers={self.layers!r}` reads no block. Name some, or use "every:1" for all.']
        return check_indices(self, "layers")

    def _check_written(self) -> list[str]:
        problems, grid, layout = [], self.grid, self.layout
        if grid is not None and not (
            isinstance(grid, list)
            and 1 <= len(grid) <= 3
            and all(is_whole(size, 1, _MOST_PATCHES) for size in grid)
            and prod(grid) <= _MOST_PATCHES
        ):
            problems.append(f"`grid={grid!r}` must be rows and columns of patches, {_MOST_PATCHES} at most, or None.")
        names = (*layout, *layout.values()) if isinstance(layout, dict) else (layout,)
        if layout is not None and not all(isinstance(name, str) and name for name in names):
            problems.append(f"`layout={layout!r}` must map each place to a module name, or be None.")
        return problems

    def sizes(self) -> dict[str, tuple[int | None, ...]]:
        """See `AdapterFiles.sizes`."""
        sizes: dict[str, tuple[int | None, ...]] = {"channel_down.weight": (self.r, None)}
        return sizes | ({"token_down.weight": (self.token_r, None)} if self.token_mixing else {})

    def read_layers(self, spec: ModelSpec) -> list[int]:
        """The blocks that are read, ascending; may lie outside of the model."""
        if isinstance(self.layers, str):
            return list(range(spec.last_read, -1, -int(self.layers.removeprefix("every:"))))[::-1]
        return sorted(self.layers)

    def plan_for(self, spec: ModelSpec) -> Plan:
        """The plan of this configuration for the model of `spec`: all blocks are frozen.

        Raises:
            ConfigError: If the model does not allow the configuration; the message names every problem.
        """
        layers = self.read_layers(spec)
        reductions, problems = resolve_reductions(self, spec)
        problems = check_within(self, "layers", layers, spec.depth) + problems
        if any(spec.last_read < index < spec.depth for index in layers):
            problems.append(
                f"`layers={self.layers!r}`: the model's output does not depend on blocks after {spec.last_read}. Use "
                f"indices up to {spec.last_read}."
            )
        if problems:
            raise ConfigError.from_problems("LoSAConfig", problems)
        blocks = tuple(BlockPlan(cut_gradient=True, reduction=reductions.get(i)) for i in range(spec.depth))
        return Plan(blocks, self.mode or "compact")

    def trains(self, role: str) -> bool:
        """No part of a block trains."""
        return False

    def recorded(self, resolution: Any) -> SavedConfig:
        """A copy with the values that were chosen for the model, the layout, and the patch grid."""
        config = super().recorded(resolution)
        config.layout = dict(resolution.layout)
        config.grid = list(patch_grid(config, resolution.spec))
        return config


def patch_grid(config: LoSAConfig, spec: ModelSpec) -> tuple[int, ...]:
    """Patch grid of the token mixers: the configuration's, or the model's."""
    return tuple(config.grid) if config.grid else spec.grid or (spec.num_patches,)


__all__ = ["LoSAConfig", "patch_grid"]
