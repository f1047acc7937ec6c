"""Token reduction settings, shared by all configurations: checks without a model, then resolution for a model."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol, get_args

from peft_bsr.backbones import ModelSpec
from peft_bsr.core import CLASS_FREE_SCORE, SCORE_KINDS, ScoreKind
from peft_bsr.core.checks import check_choice, is_whole
from peft_bsr.engine import Mode, Plan, ReduceAt, Reduction

if TYPE_CHECKING:
    from peft_bsr.tuners.base.config import SavedConfig

REDUCTIONS = ("drop", "merge")


class ScoreSettings(Protocol):
    """The field of a configuration that ranks tokens; see `BSRConfig`."""

    score: ScoreKind | None


class ReductionSettings(ScoreSettings, Protocol):
    """The fields of a configuration that control token reduction; see `BSRConfig`."""

    reduction_blocks: list[int] | None
    keep_rate: float | list[float]
    reduction: str
    fuse_dropped: bool | None
    reduce_at: ReduceAt | None
    mode: Mode | None


def check_reductions(config: ReductionSettings) -> list[str]:
    """Values that are invalid for every model, one sentence per problem."""
    problems = check_indices(config, "reduction_blocks")
    rates = config.keep_rate if isinstance(config.keep_rate, list) else [config.keep_rate]
    problems += [
        f"`keep_rate={config.keep_rate!r}` holds {rate!r}; a rate is a number in (0, 1], 1.0 = keep all."
        for rate in rates
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1
    ][:1]
    blocks = config.reduction_blocks
    if isinstance(config.keep_rate, list) and isinstance(blocks, list) and len(rates) != len(blocks):
        problems.append(
            f"`keep_rate={config.keep_rate!r}` has {len(rates)} rates for the {len(blocks)} blocks of "
            f"`reduction_blocks={blocks!r}`. Give one rate, or one for each block."
        )
    problems += check_ways(config)
    if config.fuse_dropped is not None and not isinstance(config.fuse_dropped, bool):
        problems.append(f"`fuse_dropped={config.fuse_dropped!r}` must be True, False or None.")
    if config.fuse_dropped and config.mode == "full_view":
        problems.append(
            "`fuse_dropped=True` needs a place for the fused token, but in `mode='full_view'` the sequence keeps "
            "its length and the dropped tokens their place. Leave one of them None."
        )
    problems += check_choice(config, "reduction", REDUCTIONS)
    if config.reduction == "merge":
        unread = {"fuse_dropped": config.fuse_dropped is True, "score": config.score is not None}
        problems += [
            f"`{name}={getattr(config, name)!r}` applies to dropped tokens, but `reduction='merge'` drops none: it "
            "averages the most similar ones. Leave one of the two out."
            for name, is_given in unread.items()
            if is_given
        ]
    return problems


def check_ways(config: object) -> list[str]:
    """Problems of the fields about dropping tokens. Fields that the configuration does not have are skipped."""
    ways = {"reduce_at": get_args(ReduceAt), "mode": get_args(Mode), "score": SCORE_KINDS}
    given = {name: choices for name, choices in ways.items() if getattr(config, name, None) is not None}
    return [problem for name, choices in given.items() for problem in check_choice(config, name, choices)]


def check_indices(config: object, name: str) -> list[str]:
    """Problems of an optional list of block indices."""
    blocks = getattr(config, name)
    if blocks is None:
        return []
    if not is_index_list(blocks):
        return [f"`{name}={blocks!r}` must be a list of block indices or None."]
    problems = []
    if negative := [i for i in blocks if i < 0]:
        problems.append(f"`{name}={blocks!r}` has negative indices {negative}. Count blocks from 0.")
    if repeated := sorted(i for i, number in Counter(blocks).items() if number > 1):
        problems.append(f"`{name}={blocks!r}` names {repeated} more than once. Name each block once.")
    return problems


def resolve_reductions(config: ReductionSettings, spec: ModelSpec) -> tuple[dict[int, Reduction], list[str]]:
    """Block index -> reduction in the model of `spec`, and problems: what this model does not allow."""
    reducing = config.reduction_blocks
    if reducing is None:
        reducing = sorted({spec.depth * k // 4 for k in (1, 2, 3)})
    problems = check_within(config, "reduction_blocks", reducing, spec.depth)
    rates = config.keep_rate if isinstance(config.keep_rate, list) else [config.keep_rate] * len(reducing)
    if len(rates) != len(reducing):
        problems.append(
            f"`keep_rate={config.keep_rate!r}` has {len(rates)} rates, but this model reduces at the "
            f"{len(reducing)} blocks {reducing}. Give one rate, or one for each block."
        )
    score = None if config.reduction == "merge" else resolve_score(config, spec)
    reduce_at = config.reduce_at
    reduces = bool(reducing) and any(rate < 1 for rate in rates)
    problems += check_score(score, spec) if reduces and score is not None else []
    if reduces and reduce_at == "mid_block" and spec.block_spec is None:
        problems.append(
            "`reduce_at='mid_block'` needs blocks of norm, attention, norm and MLP with two residuals, which this "
            "model does not have. Use `reduce_at='after_block'`, or leave it None."
        )
    if problems:
        return {}, problems
    fuse = score is not None and config.fuse_dropped is not False and config.mode != "full_view"
    position: ReduceAt = reduce_at or ("after_block" if spec.block_spec is None else "mid_block")
    return {
        index: Reduction(float(rate), fuse, position, score)
        for index, rate in zip(reducing, rates, strict=True)
        if rate < 1
    }, []


def check_within(config: object, name: str, blocks: list[int], depth: int, instead: str = "") -> list[str]:
    """Problems of block indices that are not in the model.

    Args:
        config: The configuration.
        name: Name of the field.
        blocks: Indices that the field stands for.
        depth: Number of the model's blocks.
        instead: Another form to suggest, appended to the message.
    """
    outside = [i for i in blocks if not 0 <= i < depth]
    if not outside:
        return []
    return [
        f"`{name}={getattr(config, name)!r}` asks for block {', '.join(map(str, outside))}, but this model has "
        f"{depth} blocks (0 to {depth - 1}). Use indices up to {depth - 1}{instead}."
    ]


def check_score(score: str, spec: ModelSpec) -> list[str]:
    """Problems of ranking this model's tokens by `score`."""
    if score == "class" and spec.num_prefix == 0:
        return [
            f"`score='class'` ranks tokens by the class token's attention, but this model has no class token. Use "
            f"`score={CLASS_FREE_SCORE!r}`, or leave it None."
        ]
    if score == "mean_query" and spec.scores_from == "weights":
        return [
            "`score='mean_query'` needs the queries, but this model's attention shows only its weights. Use "
            "`score='received'`, or `'class'` where there is a class token."
        ]
    return []


def resolve_score(config: ScoreSettings, spec: ModelSpec) -> ScoreKind:
    """The score that ranks tokens: the configuration's, or the best one that the model supports."""
    if config.score is not None:
        return config.score
    if spec.num_prefix and not spec.reads_suffix:
        return "class"
    return "received" if spec.scores_from == "weights" else CLASS_FREE_SCORE


def allowed_modes(config: SavedConfig) -> tuple[Mode, ...]:
    """Modes to try, best first."""
    if config.mode is not None:
        return (config.mode,)
    if config.has_dense_tasks:
        return ("full_view",)
    return ("compact",) if getattr(config, "fuse_dropped", None) else ("compact", "full_view")


def record(config: object, plan: Plan) -> None:
    """Set the fields of `config` to what was chosen for the model."""
    reductions = [block.reduction for block in plan.blocks if block.reduction is not None]
    if reductions:
        first = reductions[0]
        chosen = {"mode": plan.mode, "score": first.score, "reduce_at": first.position, "fuse_dropped": first.fuse}
        for name in chosen.keys() & vars(config).keys():
            setattr(config, name, chosen[name])


def is_index_list(value: object) -> bool:
    """Whether it is a list of integers."""
    return isinstance(value, list) and all(map(is_whole, value))


def as_list(value: object) -> Any:
    """Tuples, ranges and sets as lists; anything else unchanged."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, (tuple, range)) else value
