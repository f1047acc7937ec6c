"""Configuration of BSR, and its plan for a model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan, ReduceAt
from peft_bsr.errors import ConfigError
from peft_bsr.multitask import MoEConfig, TaskConfig, check_weights, read_moe, read_tasks
from peft_bsr.registration import extend_peft_type
from peft_bsr.tuners.base.reductions import (
    as_list,
    check_indices,
    check_reductions,
    check_within,
    is_index_list,
    resolve_reductions,
)
from peft_bsr.tuners.blocks.config import BlockConfig, saving_less

_BLOCK_RULE = re.compile(r"(every|last|stage):([1-9]\d{0,3})|last:([1-9]\d?|100)%")
_DEFAULTS = {"trainable_blocks": "every:4", "trainable": "full", "keep_rate": 0.5, "reduction": "drop", "lean": "exact"}
_BALANCED = {"trainable_blocks": "last:75%", "trainable": "lora", "keep_rate": 0.5, "reduction": "merge", "lean": "max"}
_LORA = {
    "trainable_blocks": "every:1",
    "trainable": "lora",
    "target_modules": ("attention.query", "attention.value", "attention.qkv"),  # the last where one Linear makes all
    "keep_rate": 1.0,
    "lean": "max",
}
_PAPER = {"keep_rate": 0.7, "reduction": "drop", "fuse_dropped": False}
_PRESETS: dict[object, dict[str, Any]] = {None: {}, "balanced": _BALANCED, "lora": _LORA, "paper": _PAPER}


@dataclass
class BSRConfig(BlockConfig):
    """Configuration of Block Selective Reprogramming: train a few whole blocks, drop tokens by class attention.

    The final norm and the head are always trained and saved; `modules_to_save` is not needed for them. Blocks before
    the first trained one are not in the graph and always run in evaluation mode. Defaults are the paper's for 12 blocks
    (train {3, 7, 11}, reduce at {3, 6, 9}, keep half, fuse), scaled to the model's depth.

    Source: arXiv 2405.10951. Differences from the paper: kept tokens stay in the order of their positions (the paper
    sorts them by score; the result is the same), in compact mode heads that average patches average the kept and the
    fused ones, and LayerScale vectors that are parameters of the block itself (BEiT, Data2Vec, InternVL) are frozen.

    Fields whose default is None are chosen for the model when the adapter is attached, and set in the adapter's copy of
    the configuration. An argument that is None counts as not given.

    Args:
        trainable_blocks: Blocks that train: indices from 0, `"every:n"` (every n-th block ending at the last that the
            model's output depends on), `"last:n"` (the last n up to it), `"last:n%"` (so much of the depth, rounded),
            `"stage:n"` (stage n of a model with stages, from 1). Default `"every:4"`.
        reduction_blocks: Blocks that drop tokens: indices from 0, `[]` for none. Default None: a quarter, a half and
            three quarters into the depth ({3, 6, 9} of 12).
        keep_rate: Share of the tokens that a reduction keeps, in (0, 1], not counting prefix tokens. One value for all
            reductions, or a list with one value for each of `reduction_blocks`. 1.0 disables reduction, and is needed
            for models in which no token can be dropped (Swin, SAM, ...). Default 0.5.
        reduction: What a reduction does with the other tokens. `"drop"` drops those with the lowest scores, as in the
            paper. `"merge"` averages the most similar tokens, weighted by the number of patches in each; it needs no
            scores, and in full view each patch has the value of its merged token, see `peft_bsr.core.merge_tokens`.
            Default `"drop"`.
        fuse_dropped: Whether to append the sum of the dropped tokens, weighted by their scores, as one token. Default
            None: True in compact mode; False in full view, where dropped tokens stay in the sequence. Not with
            `reduction="merge"`.
        reduce_at: `"mid_block"` (after the attention and its residual, as in the paper) or `"after_block"`. Default
            None: mid-block if the structure of the model's blocks is known, else after the block.
        mode: `"compact"` (the sequence gets shorter) or `"full_view"` (it keeps its length outside of the blocks, for
            heads that need the patch grid or the mean of all tokens, and for hidden states of constant length).
            Default None: compact if it does not change the shape of any output.
        score: How tokens are ranked: `"class"` (attention of the class token, as in the paper), `"mean_query"` or
            `"received"` (for models without a class token), see `peft_bsr.core.token_scores`. Default None: `"class"`;
            the better of the two others if there is no class token, or if the head reads other special tokens. Not with
            `reduction="merge"`.
        trainable: `"full"` trains copies of the blocks' weights, `"lora"` low-rank updates of their Linear modules.
            Default `"full"`.
        r: Rank of the updates, for `trainable="lora"`. Default 8.
        lora_alpha: The updates are scaled by `lora_alpha / r`, for `trainable="lora"`. Default 16.
        init_weights: Whether the adapter starts without effect: at `keep_rate=1.0` the outputs are exactly those of the
            base model. False starts away from it, for tests. Default True.
        target_modules: Leaf modules of the trained blocks that train: a list of suffixes of their names, or of
            canonical names, which are the same in every model (`"attention.query"`, `"attention.key"`,
            `"attention.value"`, `"attention.output"`, `"mlp.0"`, `"mlp.1"`; `"attention.qkv"` where one Linear makes
            all three); or a regular expression for the whole name. Default None: all.
        exclude_modules: Modules that do not train, in the same forms. May also name the final norm or the head. Default
            None.
        modules_to_save: Further modules to train and save, as in PEFT. They must run after the start of the first
            trained block, because the gradient is cut there. Default None.
        lean: Which activations the blocks with gradients do not keep for backward. `"exact"`: those that element-wise
            operations and norms can recompute, so no matrix product runs twice; `"max"`: also the outputs of the first
            matrix products in attention and MLP; `"off"`: the original blocks. Gradients are the same. Parts that fail
            the self-test run as the original. If the head reads only special tokens, the last block computes queries,
            output projection and MLP for those alone in training (not with `"off"`). Default `"exact"`.
        saved_activations: `"full"`, or `"int8"` to keep the remaining activations in int8 with stochastic rounding. The
            error of the gradients is about 1 % then. Default `"full"`.
        gradient_tokens: Share of the tokens that carry gradients in training, in (0, 1]; special tokens always do. All
            tokens run forward, but from the first trained block on the others run without a graph, and their keys and
            values are constants in backward. Tokens are selected in each forward by the attention of the block before
            the first trained one (or of block 0 itself), and again among the tokens that each reduction keeps. Default
            1.0.
        gradient_tokens_by: `"score"` (the tokens with the highest scores, see `score`) or `"random"`. Default
            `"score"`.
        frozen_weights: `"full"`, or the precision to which Linear weights of blocks that never train are permanently
            rounded in the model: `"int8"` (needs torchao) or `"bfloat16"` (with their biases). Under autocast to
            bfloat16, `"bfloat16"` changes only the memory; without autocast, products are computed in the dtype of the
            inputs. Disabled, unloaded and merged models run with the rounded weights. Default `"full"`.
        layout: Canonical place -> name in the model of each trained module. Written when the adapter is attached, so
            that the file can be loaded on a model with other module names.
        labels: Class names. Written when the adapter is attached, for `peft_bsr.load`.
        tasks: For several tasks: name -> number of classes or `TaskConfig`. Each gets a head in place of the
            classifier, and the model is called with `task=` or `task_ids=`. Stored as a list, because JSON files sort
            names. Default None.
        task_weights: Name -> weight of the task's loss. Default None: 1 for each.
        moe: Replace the MLPs of the trained blocks by mixtures of experts with a gate for each task. Default None:
            dense blocks.
        preset: Other defaults for fields that are not given. `"balanced"`: what did best in `docs/benchmarks.md` for
            half of the step or less, `trainable="lora"`, `trainable_blocks="last:75%"`, `keep_rate=0.5`,
            `reduction="merge"`, `lean="max"`. `"lora"`: what did best there for the step of LoRA, low-rank updates of
            queries and values in every block on all tokens, `trainable="lora"`, `trainable_blocks="every:1"`,
            `target_modules=["attention.query", "attention.value", "attention.qkv"]`, `keep_rate=1.0`, `lean="max"`.
            `"paper"`: the multitask release, `keep_rate=0.7`, `reduction="drop"`,
            `fuse_dropped=False`; it also sets `renormalize=False` in `moe`. Default None.

    Raises:
        ConfigError: If values are invalid; the message names all of them.

    Examples:
        >>> BSRConfig(trainable_blocks="last:3", keep_rate=0.7).trainable_blocks
        'last:3'
    """

    trainable_blocks: list[int] | str = field(  # None until the preset is applied, as the next fields
        default=None,  # type: ignore[assignment]
        metadata={"help": "Blocks that train: indices, 'every:n', 'last:n', 'last:n%' or 'stage:n'; None = 'every:4'."},
    )
    trainable: str = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "'full' (whole weights) or 'lora' (low-rank updates); None = 'full'."},
    )
    lean: str = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "'off', 'exact' or 'max': what is not kept for backward; None = 'exact'."},
    )
    reduction_blocks: list[int] | None = field(
        default=None,
        metadata={"help": "Blocks that reduce tokens; None = at 1/4, 1/2, 3/4 of the depth, [] = none."},
    )
    keep_rate: float | list[float] = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Share of tokens kept at each reduction, one for all or one per block; None = 0.5, 1.0 = off."
        },
    )
    reduction: str = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "'drop' the lowest ranked tokens (the paper's) or 'merge' the most similar; None = 'drop'."},
    )
    fuse_dropped: bool | None = field(
        default=None, metadata={"help": "Append one token fused from the dropped ones; None = in compact mode."}
    )
    reduce_at: ReduceAt | None = field(
        default=None, metadata={"help": "'mid_block' (the paper's) or 'after_block'; None = chosen for the model."}
    )

    tasks: list[TaskConfig] | None = field(
        default=None, metadata={"help": "Name -> classes or TaskConfig, each with a head of its own; None = one task."}
    )
    task_weights: dict[str, float] | None = field(default=None, metadata={"help": "Name -> weight of its loss."})
    moe: MoEConfig | None = field(
        default=None, metadata={"help": "Mixtures of experts in the place of the trained blocks' MLPs."}
    )
    preset: str | None = field(
        default=None, metadata={"help": "Other defaults: 'balanced', 'lora', or 'paper' (of the multitask release)."}
    )

    def __post_init__(self) -> None:
        self.peft_type = extend_peft_type("BSR")
        self.tasks, in_tasks = read_tasks(self.tasks)
        self.moe, in_moe = read_moe(self.moe)
        for name, value in (_DEFAULTS | (_PRESETS[self.preset] if self._has_known_preset else {})).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.preset == "paper" and self.moe is not None:
            self.moe = replace(self.moe, renormalize=False)
        self._misread = [*in_tasks, *in_moe]
        for name in ("trainable_blocks", "reduction_blocks", "keep_rate"):
            setattr(self, name, as_list(getattr(self, name)))
        super().__post_init__()

    def _problems(self) -> list[str]:
        return [*self._check_blocks(), *check_reductions(self), *super()._problems(), *self._check_tasks()]

    def _check_tasks(self) -> list[str]:
        problems = self.__dict__.pop("_misread")
        if problems:
            return problems
        problems += check_weights(self.task_weights, self.tasks)
        if self.moe is not None and self.gradient_tokens != 1:
            problems.append(
                f"`gradient_tokens={self.gradient_tokens!r}` splits the tokens, but a mixture of experts balances its "
                "load over all of them. Leave it 1.0, or leave `moe` None."
            )
        if self.reduction == "merge" and self.gradient_tokens != 1:
            problems.append(
                f"`gradient_tokens={self.gradient_tokens!r}` chooses tokens by their scores, which merging does not "
                'compute. Leave it 1.0, or use `reduction="drop"`.'
            )
        if self.moe is not None and self.tasks is None:
            problems.append("`moe` routes by task, but there are no `tasks`. Name them, one is enough.")
        if not self._has_known_preset:
            problems.append(f"`preset={self.preset!r}` is unknown. Use 'balanced', 'lora', 'paper' or None.")
        if self.preset == "paper" and self.moe is None:
            problems.append("`preset='paper'` is for mixtures of experts. Set `tasks` and `moe=MoEConfig()`, too.")
        if self.tasks is not None and self.task_type is not None:
            problems.append(
                f"`task_type={self.task_type!r}` would make PEFT train a copy of the classifier, which has no effect: "
                "the heads of `tasks` replace it. Leave it None."
            )
        if self.has_dense_tasks and (self.mode == "compact" or self.fuse_dropped):
            dense = [task.name for task in self.tasks or () if task.is_dense]
            problems.append(
                f"the tasks {dense} need an output for each patch, so the sequence must keep its length, without "
                'fused tokens. Leave `mode` None or "full_view", and `fuse_dropped` None or False.'
            )
        return problems

    @property
    def _has_known_preset(self) -> bool:
        return self.preset is None or (isinstance(self.preset, str) and self.preset in _PRESETS)

    @property
    def needs_tokens(self) -> dict[str, str]:
        """Settings that need tokens which can be dropped, ranked or read by heads -> the value without that need."""
        rates = self.keep_rate if isinstance(self.keep_rate, list) else [self.keep_rate]
        reduces = self.reduction_blocks != [] and any(rate < 1 for rate in rates)
        needs = {"keep_rate": (reduces, "1.0"), "gradient_tokens": (self.gradient_tokens < 1, "1.0")}
        needs |= {"saved_activations": (self.saved_activations == "int8", '"full"')}  # 8 bits group numbers by token
        needs |= {"tasks": (self.tasks is not None, "None"), "moe": (self.moe is not None, "None")}
        return {name: instead for name, (is_needed, instead) in needs.items() if is_needed}

    @property
    def has_dense_tasks(self) -> bool:
        """Whether a task needs an output for each patch."""
        return any(task.is_dense for task in self.tasks or ())

    def _check_blocks(self) -> list[str]:
        problems = []
        if isinstance(self.trainable_blocks, str):
            if not _BLOCK_RULE.fullmatch(self.trainable_blocks):
                problems.append(
                    f"`trainable_blocks={self.trainable_blocks!r}` is not understood. "
                    'Use indices such as `[3, 7, 11]`, "every:4", "last:3", "last:75%" or "stage:4".'
                )
        elif not is_index_list(self.trainable_blocks) or not self.trainable_blocks:
            problems.append(
                f"`trainable_blocks={self.trainable_blocks!r}` must be a non-empty list of block indices, "
                '"every:n", "last:n", "last:n%" or "stage:n".'
            )
        else:
            problems += check_indices(self, "trainable_blocks")
        return problems

    def trains(self, role: str) -> bool:
        """All except MLPs that are replaced by full experts."""
        return not (self.moe is not None and self.moe.expert_type == "full" and role.startswith("mlp."))

    def _labels(self, model: nn.Module, spec: ModelSpec) -> list[str] | None:
        """None with several tasks, which have their own class names."""
        return None if self.tasks else super()._labels(model, spec)

    def sizes(self) -> dict[str, tuple[int | None, ...]]:
        """See `AdapterFiles.sizes`."""
        sizes = super().sizes()
        for index, task in enumerate(self.tasks or ()):
            part = ".linear" if task.is_dense else ""
            sizes[f"heads.{index}{part}.weight"] = (task.num_outputs,)
        if self.moe is not None:
            sizes["gates"] = (len(self.tasks or ()), self.moe.num_experts)
            if self.moe.expert_type == "lora":
                sizes["experts.first_lora_A"] = (self.moe.num_experts, self.moe.r)
        return sizes

    def plan_for(self, spec: ModelSpec) -> Plan:
        """The plan of this configuration for the model of `spec`.

        Raises:
            ConfigError: If the model does not allow the configuration; the message names every problem.
        """
        trainable = resolve_trainable_blocks(self, spec)
        if not trainable:
            number = max((block.stage for block in spec.stage_blocks), default=0)
            has = f"its stages are 1 to {number}" if number else "it has no stages"
            raise ConfigError(
                f"BSRConfig: `trainable_blocks={self.trainable_blocks!r}` names a stage that this model does not have: "
                f'{has}. Use one of them, block indices, "every:n" or "last:n".'
            )
        instead = f' or "last:{min(len(trainable), spec.depth)}"'
        reductions, not_allowed = resolve_reductions(self, spec)
        problems = check_within(self, "trainable_blocks", trainable, spec.depth, instead) + not_allowed
        if problems:
            raise ConfigError.from_problems("BSRConfig", problems)
        plan = Plan.static(spec.depth, trainable, reductions, self.mode or "compact")
        return saving_less(plan.with_mixtures() if self.moe else plan, self, spec)


def resolve_trainable_blocks(config: BSRConfig, spec: ModelSpec) -> list[int]:
    """Indices that `config.trainable_blocks` names in the model of `spec`, ascending; may lie outside it."""
    blocks = config.trainable_blocks
    if not isinstance(blocks, str):
        return sorted(blocks)
    (kind, number), depth = blocks.split(":"), spec.last_read + 1
    count = max(1, round(depth * int(number[:-1]) / 100)) if number.endswith("%") else int(number)
    if kind == "stage":
        return spec.stage(count)
    if kind == "last":
        return list(range(depth - count, depth))
    return list(range(depth - 1, -1, -count))[::-1]
