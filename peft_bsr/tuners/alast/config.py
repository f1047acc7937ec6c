"""Configuration of ALaST, and the plan on which each step is based."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from peft_bsr.backbones import ModelSpec
from peft_bsr.core import DELTA_REDUCTIONS, SELECTIONS
from peft_bsr.core.checks import (
    NOT_NEGATIVE,
    check_choice,
    check_flags,
    check_numbers,
    check_whole,
    is_number,
    is_whole,
)
from peft_bsr.engine import BlockPlan, Plan, Reduction
from peft_bsr.errors import ConfigError
from peft_bsr.registration import extend_peft_type
from peft_bsr.tuners.base.reductions import as_list, check_score, check_ways, resolve_score
from peft_bsr.tuners.blocks.config import BlockConfig, saving_less

_PRESETS: dict[str | None, dict[str, object]] = {
    None: {
        "initial_budget": 0.95,
        "alpha": 0.5,
        "delta_reduction": "relative",
        "selection": "prefix",
        "train_embeddings": False,
        "token_multiple": 8,
    },
    "paper": {
        "initial_budget": 0.9,
        "alpha": "lr",
        "delta_reduction": "paper",
        "selection": "sample",
        "train_embeddings": True,
        "token_multiple": 1,
    },
}


@dataclass
class ALaSTConfig(BlockConfig):
    """Configuration of Adaptive Layer Selection: budgets set, for each step, which blocks train and on how many tokens.

    Each block has a budget. In each step K blocks train: the last K by default, or K drawn by budget. After each block,
    `int(budget * N)` of its N patch tokens are kept, ranked by the class token's attention; special tokens are always
    kept. A block's budget follows its importance: how much the block changes the class token. In evaluation all tokens
    are kept, so the trained model is a plain model and `merge_and_unload` is exact. The final norm and the head always
    train.

    Source: arXiv 2408.08670. Differences from the paper: an updated budget applies from the next step on, because
    applying it in the same forward would need a device synchronization in every block. A model without a class token
    ranks its tokens another way (`score`), and the mean token replaces the class token in the importance. Five defaults
    differ, and `preset="paper"` restores them: importance is relative to the size of the class token, the frozen blocks
    are the first ones, the embeddings are frozen, budgets start higher, and sequence lengths are multiples of 8.

    `mode`, `score`, `trainable`, `r`, `lora_alpha`, `init_weights`, `target_modules`, `exclude_modules`,
    `modules_to_save`, `lean`, `saved_activations`, `gradient_tokens`, `gradient_tokens_by`, `layout` and `labels` are
    those of `BSRConfig`.

    Args:
        trainable_blocks_per_step: Number of blocks that train in each step, K. Default None: three quarters of the
            blocks (9 of 12).
        initial_budget: Budget of every block at the start. 0.9, as in the paper, keeps a third less for backward, but
            models are less accurate, because evaluation uses all tokens. Default 0.95.
        budget_range: Smallest and largest budget. Default (0.5, 1.0).
        alpha: Step size of the budgets: the factor from a change of importance to a change of the budget. `"lr"` uses
            the learning rate, which `peft_bsr.training.ALaSTCallback` sets, or your loop:
            `model.base_model.schedule().learning_rate = ...`. 0.0 keeps the budgets constant. Default 0.5.
        delta_reduction: How importance is computed. `"relative"`: the change of each image's class token, divided by
            the token's size, mean over images; `"mean"`: the same without dividing; `"paper"`: without dividing, sum
            over images. Default `"relative"`.
        selection: Which blocks train. `"prefix"`: the last K; the frozen blocks before them are not in the graph, which
            saves the most memory; `"sample"`: a random draw weighted by budget, as in the paper; `"topk"`: those with
            the largest budgets. Default `"prefix"`.
        train_embeddings: Whether to train the embeddings, too. Every block is in the graph then. Default False.
        token_multiple: Sequence lengths are rounded to multiples of this, so that few lengths occur: kernels and
            compiled code are specialized to each. The exact length is the first block's tokens times all budgets up to
            the block. 1 rounds down block by block, as in the paper. Default 8.
        seed: Seed of the draws. A draw depends only on the seed and the step. Default 0.
        preset: `"paper"` sets initial_budget 0.9, alpha `"lr"`, delta_reduction `"paper"`, selection `"sample"`,
            train_embeddings True and token_multiple 1, unless they are given. Default None.

    Raises:
        ConfigError: If values are invalid; the message names all of them.

    Examples:
        >>> ALaSTConfig(preset="paper").alpha
        'lr'
    """

    trainable_blocks_per_step: int | None = field(
        default=None, metadata={"help": "Blocks that train in each step; None = three quarters of them."}
    )
    initial_budget: float = field(  # None until the preset is applied
        default=None,  # type: ignore[assignment]
        metadata={"help": "Budget of every block at the start; None = 0.95."},
    )
    budget_range: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Smallest and largest budget."}
    )
    alpha: float | str | None = field(
        default=None, metadata={"help": "Step size of the budgets, or 'lr' for the learning rate; None = 0.5."}
    )
    delta_reduction: str | None = field(
        default=None, metadata={"help": "'relative', 'mean' or 'paper'; None = 'relative'."}
    )
    selection: str | None = field(default=None, metadata={"help": "'prefix', 'sample' or 'topk'; None = 'prefix'."})
    train_embeddings: bool | None = field(default=None, metadata={"help": "Train the embeddings, too; None = False."})
    token_multiple: int | None = field(
        default=None, metadata={"help": "Sequence lengths are multiples of this; 1 = the paper's rule, None = 8."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    preset: str | None = field(default=None, metadata={"help": "'paper' sets the paper's values."})

    def __post_init__(self) -> None:
        self.peft_type = extend_peft_type("ALAST")
        self.budget_range = as_list(self.budget_range)
        for name, value in _PRESETS[self.preset if _is_preset(self.preset) else None].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()

    def _problems(self) -> list[str]:
        problems = []
        if not _is_preset(self.preset):
            return [f"`preset={self.preset!r}` is unknown. Use 'paper' or None."]
        count, low_high = self.trainable_blocks_per_step, self.budget_range
        if count is not None and not is_whole(count, 1):
            problems.append(f"`trainable_blocks_per_step={count!r}` must be an integer of at least 1, or None.")
        if not (isinstance(low_high, list) and len(low_high) == 2 and all(map(is_number, low_high))):
            problems.append(f"`budget_range={low_high!r}` must be two numbers, the smallest and the largest budget.")
        elif not 0 < low_high[0] <= low_high[1] <= 1:
            problems.append(f"`budget_range={low_high!r}` must lie in (0, 1], the smallest budget first.")
        elif not is_number(self.initial_budget) or not low_high[0] <= self.initial_budget <= low_high[1]:
            problems.append(f"`initial_budget={self.initial_budget!r}` must lie in `budget_range={low_high!r}`.")
        if self.alpha != "lr":
            problems += check_numbers(self, "alpha", within=NOT_NEGATIVE, instead=", or 'lr' (the learning rate)")
        problems += check_choice(self, "delta_reduction", DELTA_REDUCTIONS)
        problems += check_choice(self, "selection", SELECTIONS)
        problems += check_flags(self, "train_embeddings", instead="True, False or None")
        if self.frozen_weights in ("int8", "bfloat16"):
            problems.append(
                f"`frozen_weights={self.frozen_weights!r}` is for blocks that never train; here every block may. "
                'Leave it "full".'
            )
        problems += check_whole(self, "token_multiple", instead=", or None")
        if not is_whole(self.seed):
            problems.append(f"`seed={self.seed!r}` must be an integer.")
        return [*problems, *check_ways(self), *super()._problems()]

    def plan_for(self, spec: ModelSpec) -> Plan:
        """The plan on which each step is based: all blocks train, each drops tokens by the initial budget.

        Raises:
            ConfigError: If the model does not allow the configuration; the message names every problem.
        """
        score = resolve_score(self, spec)
        problems, count = check_score(score, spec), self.trainable_blocks_per_step
        if count is not None and count > spec.depth:
            problems.append(
                f"`trainable_blocks_per_step={count}` asks for more than this model's {spec.depth} blocks. Use at "
                f"most {spec.depth}."
            )
        if problems:
            raise ConfigError.from_problems("ALaSTConfig", problems)
        budget, multiple = self.initial_budget, int(self.token_multiple or 1)
        plain = Reduction(budget, fuse=False, position="after_block", score=score, of_all=True, multiple=multiple)
        cut = not self.train_embeddings
        blocks = tuple(
            BlockPlan(True, cut and index == 0, budgeted(plain, budget, budget ** (index + 1)))
            for index in range(spec.depth)
        )
        return saving_less(Plan(blocks, self.mode or "compact"), self, spec)


def budgeted(reduction: Reduction, budget: float, share: float) -> Reduction:
    """A block's reduction with its budget; `share` is the product of all budgets up to and including it."""
    return replace(reduction, keep_rate=budget, share=share if reduction.multiple > 1 else None)


def _is_preset(value: object) -> bool:
    return value is None or (isinstance(value, str) and value in _PRESETS)


__all__ = ["ALaSTConfig", "budgeted"]
