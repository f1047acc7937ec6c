"""Configuration of SynQT, and its plan for a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from peft_bsr.backbones import ModelSpec
from peft_bsr.core import ScoreKind
from peft_bsr.core.checks import EITHER_SIGN, RATE, check_choice, check_numbers, check_whole
from peft_bsr.engine import BlockPlan, KeptTokens, Mode, Plan, ReduceAt
from peft_bsr.errors import ConfigError
from peft_bsr.registration import extend_peft_type
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.frozen_weights import FROZEN_WEIGHTS_HELP, FrozenWeights
from peft_bsr.tuners.base.reductions import (
    check_indices,
    check_reductions,
    check_within,
    resolve_reductions,
)

_SIZES = ("num_queries", "bottleneck", "attention_bottleneck")
_SCALES = ("feature_scale", "attention_scale", "ffn_scale")
_RATES = ("dropout", "drop_path")


@dataclass
class SynQTConfig(SavedConfig):
    """Configuration of Synthesized Query Tuning: learned queries read a frozen backbone, a fusing head classifies.

    The backbone runs without gradients. Prompts, small adapters that turn them into queries, and a head that replaces
    the model's classifier train. An adapter cannot be merged, because the queries are not part of the model's weights.

    Source: arXiv 2407.06964. Interpretations and differences: docs/synqt.md.

    Args:
        num_queries: Learned prompts per layer, T. Default 4.
        bottleneck: Width of the adapters of prompts and head. Default 48.
        attention_bottleneck: Width of the adapters that replace the projections of the queries' self-attention.
            Default 8.
        feature_scale: Initial value of the learned scale of the previous layer's feature in the next layer's queries.
            Default 0.1.
        attention_scale: Initial value of the learned scale of the queries' self-attention. Default 0.1.
        ffn_scale: Initial value of the learned scale of the adapter after it. Default 0.1.
        dropout: Dropout rate in the adapters, on the queries and on the head's weights, in [0, 1). Default 0.1.
        drop_path: Drop-path rate of the head's adapter, per image and feature, in [0, 1). Default 0.3.
        layers: Blocks that are read, indices from 0. Blocks after the last one do not run. Default None: all.
        keep_rate: Share of the image tokens that a reduction keeps, see `BSRConfig`. Default 1.0: no reduction.
        reduction_blocks: Blocks that drop image tokens. Those after which no block is read are skipped. Default None: a
            quarter, a half and three quarters into the depth.
        reduction: `"drop"` or `"merge"`, see `BSRConfig`. Default `"drop"`.
        fuse_dropped: See `BSRConfig`.
        reduce_at: See `BSRConfig`.
        mode: See `BSRConfig`.
        score: See `BSRConfig`.
        kept_tokens: Precision of the one token tensor that each layer keeps for backward: `"full"` (its own dtype),
            `"bfloat16"`, `"float16"` or `"int8"` (stochastic rounding). The forward does not change. Default `"full"`.
        frozen_weights: `"full"`, or the precision to which Linear weights of the blocks are permanently rounded in the
            model: `"int8"` (needs torchao) or `"bfloat16"`, see `BSRConfig`. Keys and values are not rounded, because
            they are absorbed. Disabled and unloaded models run with the rounded weights. Default `"full"`.
        target_modules: Must be None; choose the blocks to read with `layers`.
        labels: Class names. Written when the adapter is attached, for `peft_bsr.load`.

    Raises:
        ConfigError: If values are invalid; the message names all of them.

    Examples:
        >>> SynQTConfig(num_queries=16, layers=[2, 5, 8, 11]).num_queries
        16
    """

    num_queries: int = field(default=4, metadata={"help": "Learned prompts per layer."})
    bottleneck: int = field(default=48, metadata={"help": "Width of the adapters of prompts and head."})
    attention_bottleneck: int = field(default=8, metadata={"help": "Width of the adapters in the self-attention."})
    feature_scale: float = field(default=0.1, metadata={"help": "Initial scale of the previous layer's feature."})
    attention_scale: float = field(default=0.1, metadata={"help": "Initial scale of the self-attention."})
    ffn_scale: float = field(default=0.1, metadata={"help": "Initial scale of the adapter after it."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout rate in adapters, on queries and on head weights."})
    drop_path: float = field(default=0.3, metadata={"help": "Drop-path rate of the head's adapter."})
    layers: list[int] | None = field(default=None, metadata={"help": "Blocks that are read; None = all."})
    keep_rate: float | list[float] = field(
        default=1.0, metadata={"help": "Share of tokens kept at each reduction, one for all or one per block."}
    )
    reduction_blocks: list[int] | None = field(
        default=None, metadata={"help": "Blocks that drop tokens; None = at 1/4, 1/2 and 3/4 of the depth."}
    )
    reduction: str = field(default="drop", metadata={"help": "'drop' tokens or 'merge' the most similar."})
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
    target_modules: None = field(default=None, metadata={"help": "Not used: see `layers`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("SYNQT")
        for name in ("layers", "reduction_blocks", "keep_rate"):
            value = getattr(self, name)
            if isinstance(value, (tuple, range, set, frozenset)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        problems = check_whole(self, *_SIZES)
        problems += check_numbers(self, *_SCALES, within=EITHER_SIGN)
        problems += check_numbers(self, *_RATES, within=RATE)
        problems += [*check_indices(self, "layers"), *check_reductions(self)]
        if self.layers == []:
            problems.append("`layers=[]` reads no block. Name some, or leave it None for all.")
        problems += check_choice(self, "kept_tokens", get_args(KeptTokens))
        problems += check_choice(self, "frozen_weights", get_args(FrozenWeights))
        if self.target_modules is not None:
            problems.append(f"`target_modules={self.target_modules!r}`: choose the blocks to read with `layers`.")
        if self.task_type is not None:
            problems.append(
                f"`task_type={self.task_type!r}` would make PEFT train a copy of the classifier, which has no effect: "
                "the head of SynQT replaces it. Leave it None."
            )
        if problems:
            raise ConfigError.from_problems("SynQTConfig", problems)

    def sizes(self) -> dict[str, tuple[int | None, ...]]:
        """See `AdapterFiles.sizes`."""
        return {
            "prompts": (self.num_queries,),
            "prompt_adapter.down.weight": (self.bottleneck,),
            "query.down.weight": (self.attention_bottleneck,),
        }


def build_plan(config: SynQTConfig, spec: ModelSpec) -> tuple[Plan, list[int]]:
    """The plan of `config` for the model of `spec`, and the blocks that are read, ascending.

    Args:
        config: A checked configuration.
        spec: Description of the model.

    Raises:
        ConfigError: If the model does not allow the configuration; the message names every problem.
    """
    layers = list(range(spec.depth)) if config.layers is None else sorted(config.layers)
    reductions, problems = resolve_reductions(config, spec)
    problems = check_within(config, "layers", layers, spec.depth) + problems
    if problems:
        raise ConfigError.from_problems("SynQTConfig", problems)
    blocks = tuple(
        BlockPlan(cut_gradient=True, reduction=reductions.get(i) if i < layers[-1] else None) for i in range(spec.depth)
    )
    return Plan(blocks, config.mode or "compact"), layers
