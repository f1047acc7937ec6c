"""Configuration of BSR, and the plan that it means for a given model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig

from peft_bsr.backbones import Column
from peft_bsr.engine import Lean, Plan
from peft_bsr.errors import ConfigError
from peft_bsr.registration import extend_peft_type
from peft_bsr.tuners.reductions import (
    check_choice,
    check_indices,
    check_reductions,
    check_within,
    is_index_list,
    resolve_reductions,
)

Trainable = Literal["full", "lora"]
LeanLevel = Literal["off", "exact", "max"]
SavedActivations = Literal["full", "int8"]
_MODULE_LISTS = ("target_modules", "exclude_modules", "modules_to_save")
_BLOCK_RULE = re.compile(r"(every|last):([1-9]\d*)")


@dataclass
class BSRConfig(PeftConfig):
    """Configuration of Block Selective Reprogramming: train a few whole blocks, drop tokens by class attention.

    The final norm and the head are always trained and saved; `modules_to_save` is not needed for them. Blocks before
    the first trained one stay out of the graph and in evaluation mode, whatever the model's mode. Defaults are
    the paper's for 12 blocks (train {3, 7, 11}, reduce at {3, 6, 9}, keep half, fuse), scaled to the model's depth.

    Source: arXiv 2405.10951. Departures: kept tokens stay in the order of their positions (the paper's order is by
    score, the result is the same), in compact mode heads that average patches average the kept and the fused ones, and
    LayerScale vectors that the block itself holds (BEiT, Data2Vec, InternVL) stay frozen.

    What is left None is chosen for the model when the adapter is attached, and written into the adapter's own copy of
    the config.

    Args:
        trainable_blocks: Blocks that train: indices from 0, `"every:n"` (every n-th block ending at the last),
            `"last:n"` (the last n). Default `"every:4"`.
        reduction_blocks: Blocks that drop tokens: indices from 0, `[]` for none. Default None: a quarter, a half and
            three quarters into the depth ({3, 6, 9} of 12).
        keep_rate: Share of the tokens (prefix not counted) that a reduction keeps, in (0, 1]; one for all, or a list
            with one for each of `reduction_blocks`. 1.0 switches reduction off. Default 0.5.
        fuse_dropped: Append one token summed from the dropped ones, weighted by their scores. Default None: True in
            compact mode; in full view nothing is fused, as dropped tokens stay in the sequence.
        reduce_at: `"mid_block"` (after attention and its residual, the paper's) or `"after_block"`. Default None:
            mid-block where the parts of the model's blocks are known.
        mode: `"compact"` (the sequence gets shorter) or `"full_view"` (it keeps its length outside of the blocks, so
            heads that need the grid, mean heads that must see every token and hidden states of constant length work).
            Default None: compact where no output changes its shape by it.
        score: What tokens are ranked by: `"class"` (the class token's attention, the paper's), `"mean_query"` or
            `"received"` for models without one, see `peft_bsr.core.token_scores`. Default None: the class token's
            attention, or where there is none or the head reads other special tokens, the better of the two others.
        trainable: `"full"` trains copies of the blocks' weights, `"lora"` a low-rank update of their Linear modules.
        r: Rank of the update, `trainable="lora"` only.
        lora_alpha: The update is scaled by `lora_alpha / r`, `trainable="lora"` only.
        init_weights: False starts away from the base model (PEFT's convention for tests). Default True: the model
            starts as the base model, exactly at `keep_rate=1.0`.
        target_modules: Only these leaf modules of the trained blocks train: name endings, or a regular expression on
            the whole name. Default None: all of them.
        exclude_modules: These do not train, same forms; may also name the final norm or head.
        modules_to_save: Further modules to train and save whole, PEFT's way. They must lie behind the first trained
            block, because the gradient is cut there.
        lean: What blocks that gradients reach do not keep for backward. `"exact"`: nothing that one pass over the
            tokens restores, no matrix product is computed twice; `"max"`: first products of the halves are computed
            again too; `"off"`: the stock blocks. Gradients are the same. Parts that the self-test does not find equal
            stay stock. If the head reads only special tokens, the last block computes queries, output projection and
            MLP for those alone in training (not with `"off"`). Default `"exact"`.
        saved_activations: `"full"`, or `"int8"`: what those blocks do keep is kept in 8 bits, rounded stochastically.
            Gradients have an error of about 1 % then. Default `"full"`.
        layout: Canonical place -> name in the model of each trained module. Written when the adapter is attached; by
            it a file that was saved on another layout of the same model (other module names) is read.

    Raises:
        ConfigError: Naming every value that cannot be.

    Example:
        >>> BSRConfig(trainable_blocks="last:3", keep_rate=0.7).trainable_blocks
        'last:3'
    """

    trainable_blocks: list[int] | str = field(
        default="every:4", metadata={"help": "Blocks that train: indices, 'every:n' or 'last:n'."}
    )
    reduction_blocks: list[int] | None = field(
        default=None, metadata={"help": "Blocks that drop tokens; None = at 1/4, 1/2 and 3/4 of the depth, [] = none."}
    )
    keep_rate: float | list[float] = field(
        default=0.5,
        metadata={"help": "Share of tokens kept at each reduction, one for all or one per block; 1.0 = off."},
    )
    fuse_dropped: bool | None = field(
        default=None, metadata={"help": "Append one token fused from the dropped ones; None = in compact mode."}
    )
    reduce_at: str | None = field(
        default=None, metadata={"help": "'mid_block' (the paper's) or 'after_block'; None = chosen for the model."}
    )
    mode: str | None = field(
        default=None, metadata={"help": "'compact' or 'full_view'; None = chosen by what the head reads."}
    )
    score: str | None = field(
        default=None, metadata={"help": "'class', 'mean_query' or 'received'; None = chosen for the model."}
    )
    trainable: str = field(default="full", metadata={"help": "'full' (whole weights) or 'lora' (low-rank updates)."})
    r: int = field(default=8, metadata={"help": "Rank of the update, trainable='lora' only."})
    lora_alpha: float = field(default=16, metadata={"help": "The update is scaled by lora_alpha / r."})
    init_weights: bool = field(default=True, metadata={"help": "False starts away from the base model (for tests)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Only these leaf modules of trained blocks train; None = all."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "These leaf modules do not train."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole; final norm and head are anyway."}
    )
    lean: str = field(default="exact", metadata={"help": "'off', 'exact' or 'max': what is not kept for backward."})
    saved_activations: str = field(
        default="full", metadata={"help": "'full' or 'int8': how numbers are kept for backward."}
    )
    layout: dict[str, str] | None = field(
        default=None, metadata={"help": "Written at attach: canonical place -> module name of what trains."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("BSR")
        for name in ("trainable_blocks", "reduction_blocks", "keep_rate", *_MODULE_LISTS):
            value = getattr(self, name)
            if isinstance(value, (tuple, range, set, frozenset)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        problems = [*self._check_blocks(), *check_reductions(self), *self._check_choices()]
        if problems:
            raise ConfigError.from_problems("BSRConfig", problems)

    def _check_blocks(self) -> list[str]:
        problems = []
        if isinstance(self.trainable_blocks, str):
            if not _BLOCK_RULE.fullmatch(self.trainable_blocks):
                problems.append(
                    f"`trainable_blocks={self.trainable_blocks!r}` is not understood. "
                    'Use indices such as `[3, 7, 11]`, or "every:4", or "last:3".'
                )
        elif not is_index_list(self.trainable_blocks) or not self.trainable_blocks:
            problems.append(
                f"`trainable_blocks={self.trainable_blocks!r}` must be a non-empty list of block indices, "
                '"every:n" or "last:n".'
            )
        else:
            problems += check_indices(self, "trainable_blocks")
        return problems

    def _check_choices(self) -> list[str]:
        problems = []
        choices_of = {
            "trainable": get_args(Trainable),
            "lean": get_args(LeanLevel),
            "saved_activations": get_args(SavedActivations),
        }
        for name, choices in choices_of.items():
            problems += check_choice(self, name, choices)
        if not isinstance(self.init_weights, bool):
            problems.append(f"`init_weights={self.init_weights!r}` must be True or False.")
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            problems.append(f"`r={self.r!r}` must be a whole number of at least 1.")
        if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, (int, float)) or self.lora_alpha <= 0:
            problems.append(f"`lora_alpha={self.lora_alpha!r}` must be a number above 0.")
        if self.target_modules == "all-linear":
            problems.append(
                "`target_modules='all-linear'` is not needed: `trainable='lora'` adapts every Linear of the trained "
                "blocks. Leave it None, or name modules."
            )
        for name in _MODULE_LISTS:
            value = getattr(self, name)
            is_pattern = isinstance(value, str) and name != "modules_to_save"
            if value is None or value == "all-linear":
                continue
            if not is_pattern and not (isinstance(value, list) and all(map(_is_text, value))):
                forms = (
                    "a list of names or None"
                    if name == "modules_to_save"
                    else "a list of names, a regular expression or None"
                )
                problems.append(f"`{name}={value!r}` must be {forms}.")
                continue
            for pattern in [value] if is_pattern else value if name == "modules_to_save" else []:
                try:
                    re.compile(pattern)
                except re.error as error:
                    problems.append(f"`{name}={value!r}` is not a regular expression: {error}.")
        return problems


def build_plan(config: BSRConfig, column: Column) -> Plan:
    """The plan that `config` means for the model of `column`.

    Args:
        config: A checked configuration.
        column: The model's column.

    Raises:
        ConfigError: Naming everything that this model does not allow.
    """
    trainable = resolve_trainable_blocks(config, column.depth)
    instead = f' or "last:{min(len(trainable), column.depth)}"'
    reductions, not_allowed = resolve_reductions(config, column)
    problems = check_within(config, "trainable_blocks", trainable, column.depth, instead) + not_allowed
    if problems:
        raise ConfigError.from_problems("BSRConfig", problems)
    plan = Plan.static(column.depth, trainable, reductions, config.mode or "compact")  # type: ignore[arg-type]
    if config.lean != "off":
        plan = plan.with_lean(Lean(save_products=config.lean == "exact"))
    return plan.with_int8(config.saved_activations == "int8")


def resolve_trainable_blocks(config: BSRConfig, depth: int) -> list[int]:
    """Indices that `config.trainable_blocks` names in a model of `depth` blocks, ascending; may lie outside it."""
    blocks = config.trainable_blocks
    if not isinstance(blocks, str):
        return sorted(blocks)
    kind, number = blocks.split(":")
    if kind == "last":
        return list(range(depth - int(number), depth))
    return list(range(depth - 1, -1, -int(number)))[::-1]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
