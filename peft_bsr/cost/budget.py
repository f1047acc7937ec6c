"""Finds training plans that fit into a memory budget."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from torch import nn

from peft_bsr.cost.block_contributions import Contributions
from peft_bsr.cost.estimation import Estimate
from peft_bsr.cost.plan_costs import MissingEstimateError, PlanCosts
from peft_bsr.cost.selection import choices
from peft_bsr.cost.setup import SAVING, Setup
from peft_bsr.cost.ways import RECOMMENDED, SMALLEST, ConfigFields, Setting, Way, settings_of, ways_of
from peft_bsr.errors import ConfigError
from peft_bsr.tuners import BSRConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", re.IGNORECASE)

_MARGIN = 1.05  # memory of kernels and the allocator; up to 3 % was measured
_WORTH = 0.05  # of the peak: options that save less are declined
_COMPILED = 0.75  # lowest measured memory of a compiled plan, as a fraction of the eager one
_CHECKPOINTING = {False: "", True: " + gradient checkpointing", "offload": " + gradient checkpointing, offloaded"}
_DEFAULT = Setup()


@dataclass(frozen=True)
class BudgetPlan:
    """A training plan that fits into the budget.

    Attributes:
        config: Configuration for `get_peft_model`, or None for full fine-tuning.
        setup: How to train; may differ from the requested setup, see `declined`.
        estimate: Predicted memory and compute.
        gives_up: What it gives up compared with standard full fine-tuning.
        declined: Options that were not used because they do not pay off, each with the reason.
        share: With contributions: its gain as a fraction of the gain of all blocks on all tokens in the same form
            (whole weights, or low-rank updates). None without contributions.
    """

    config: BSRConfig | None
    setup: Setup
    estimate: Estimate
    gives_up: str
    declined: tuple[str, ...] = ()
    share: float | None = None

    @property
    def is_recommended(self) -> bool:
        """Whether it is `BSRConfig(preset="balanced")`, at any `lean`: what did best in our benchmark for its cost."""
        return self.config is not None and all(getattr(self.config, k) == value for k, value in RECOMMENDED.items())

    def describe(self) -> str:
        """The plan in one line, and one more line for each declined option."""
        if self.config is None:
            what = "full fine-tuning"
        else:
            defaults = BSRConfig()
            given = [
                f"{name}={getattr(self.config, name)!r}"
                for name in get_type_hints(ConfigFields)
                if getattr(self.config, name) != getattr(defaults, name)
            ]
            what = f"BSRConfig({', '.join(given)})"
        what += _CHECKPOINTING[self.setup.gradient_checkpointing]
        size, flops = to_mib(self.estimate.total_bytes), self.estimate.training_flops / self.estimate.batch_size / 1e9
        what += "" if self.share is None else f"  {self.share:.0%} of the contributions"
        line = f"{size:8} MiB  {flops:6.1f} GFLOPs per image  {what}  (gives up: {self.gives_up})"
        return "\n".join([line, *(f"{'':14}declined: {reason}" for reason in self.declined)])


def to_mib(size: int) -> int:
    """Bytes in MiB, rounded up: a size that fits into a budget in MiB also does as it is printed."""
    return -(-size // 2**20)


def plan_for_budget(
    model: nn.Module | PlanCosts,
    memory: str | int,
    setup: Setup = _DEFAULT,
    *,
    limit: int | None = None,
    contributions: Contributions | None = None,
    **settings: Any,
) -> list[BudgetPlan]:
    """Training plans for `model` whose predicted peak plus 5 % fits, ordered by how little they give up.

    For every choice of trained blocks and tokens there is at most one plan: the one with the fewest FLOPs among those
    that fit (lean blocks, checkpointing, 8 bits; on accelerators also checkpoints offloaded to the CPU). Under bfloat16
    autocast frozen weights are stored in bfloat16, which does not change the step. Options of `setup` that do not pay
    off are not used, and `BudgetPlan.declined` gives the reason. With `compile`, each returned plan takes 10 to 30
    seconds. Plans are ordered by how much trains and how many tokens are kept, not by accuracy: train to find out which
    of two plans is better on your images.

    With `contributions`, blocks and tokens are searched for instead: for whole weights and for low-rank updates, at
    each lean level, the set of blocks that fits and has the largest gain (the gain of a block is multiplied by the
    fraction of tokens that it processes), largest share first. Shares of the two forms are not comparable. The search
    takes 10 to 40 dry runs.

    Args:
        model: See `estimate`; best without weights, on the meta device. To plan for several budgets, its `PlanCosts`.
        memory: Bytes, or a string such as `"2GB"` (10^9) or `"1.5GiB"` (2^30). It covers weights, optimizer, gradients
            and activations; Python and torch (about 0.4 GB on the CPU) come on top.
        setup: How the model is trained. Default `Setup()`. The planner chooses gradient checkpointing itself.
        limit: Maximum number of plans. Default None: all.
        contributions: Gains of each block on your images, see `contributions`. Default None.
        settings: Fields of `Setup` that override `setup`, such as `batch_size=8`.

    Returns:
        At least one plan.

    Raises:
        ConfigError: If nothing fits; the message describes the smallest plan. Or if the size cannot be parsed, `limit`
            is below 1, or no contribution is above 0.
        UnsupportedModelError: See `estimate`.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> with torch.device("meta"):
        ...     vit = ViTForImageClassification(ViTConfig(num_hidden_layers=4, num_labels=10))
        >>> plan_for_budget(vit, "0.3GB", batch_size=8, limit=1)[0].gives_up
        'nothing but low-rank updates of the blocks trains; first products are computed twice'
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"`limit={limit!r}` must be at least 1, or None for all plans.")
    setup = replace(setup, **settings)
    costs = model if isinstance(model, PlanCosts) else PlanCosts(model)
    planner = _Planner(costs, memory, setup)
    found = planner.walk(limit) if contributions is None else planner.search(contributions)[:limit]
    if not found:
        smallest = min(planner.tried, key=lambda plan: plan.estimate.total_bytes)
        least = smallest.estimate
        raise ConfigError(
            f"`memory={memory!r}` is too little for {type(costs.model).__name__} at "
            f"`batch_size={setup.batch_size}`. The smallest plan takes {to_mib(least.total_bytes)} MiB, "
            f"{least.weights_bytes / 2**20:.0f} MiB of it for weights; you gave {planner.budget // 2**20} MiB:\n"
            f"{smallest.describe()}\n"
            "Use a smaller batch, half precision or a smaller model."
        )
    return found


def plan_setting(costs: PlanCosts, setting: Setting, memory: str | int, setup: Setup) -> BudgetPlan | None:
    """The plan of `plan_for_budget` for one choice of trained blocks and tokens, or None if it does not fit.

    Args:
        costs: Costs of the model.
        setting: Setting from `settings_of`.
        memory: See `plan_for_budget`.
        setup: See `plan_for_budget`.
    """
    return _Planner(costs, memory, setup).first_that_fits(setting)


def missing_estimate(
    costs: PlanCosts, setting: Setting, memory: str | int, setup: Setup
) -> tuple[BSRConfig | None, Setup] | None:
    """Arguments of the next estimate that `plan_setting` with the same arguments needs, or None: all are cached."""
    try:
        plan_setting(costs.cached_only(), setting, memory, setup)
    except MissingEstimateError as missing:
        return missing.config, missing.setup
    return None


class _Planner:
    """Plans for one model, budget and setup; `tried` collects those that do not fit, too."""

    def __init__(self, costs: PlanCosts, memory: str | int, setup: Setup) -> None:
        self.costs, self.budget, self.asked = costs, parse_size(memory), setup
        self.setup = replace(setup, gradient_checkpointing=False)  # the planner chooses it
        self.dtype = setup.dtype or costs.dtype
        self.tried: list[BudgetPlan] = []

    def walk(self, limit: int | None) -> list[BudgetPlan]:
        """The first way that fits, for every setting."""
        settings, found = settings_of(self.costs.spec), list[BudgetPlan]()
        for setting in settings:
            plan = self.first_that_fits(setting)
            if plan is not None:
                found.append(plan)
            elif setting is settings[0] and not any(map(self.first_that_fits, settings[SMALLEST])):
                break  # nothing fits: not even what takes the least
            if limit is not None and len(found) >= limit:
                break
        return found

    def first_that_fits(self, setting: Setting) -> BudgetPlan | None:
        """The plan of a setting with the fewest FLOPs among those that fit, or None."""
        declined: list[str] = []
        for way in ways_of(setting, self.setup, self.dtype, self.costs.allows):
            if isinstance(way, str):
                declined.append(way)
                continue
            plan = self.plan(way, declined)
            if self.fits(plan.estimate):
                return plan  # the others take more FLOPs
        return None

    def search(self, contributions: Contributions) -> list[BudgetPlan]:
        """The blocks and tokens with the largest gain, for each form and lean level."""

        def measure(way: Way, declined: list[str]) -> Estimate:
            return self.plan(way, declined).estimate

        found = [
            replace(next(plan for plan in self.tried if plan.config is choice.way.config), share=choice.share)
            for choice in choices(
                self.costs.model, contributions, self.setup, self.dtype, self.budget / _MARGIN, measure
            )
        ]
        return sorted(found, key=lambda plan: (-(plan.share or 0.0), plan.estimate.training_flops))

    def plan(self, way: Way, declined: list[str]) -> BudgetPlan:
        """The plan of a way, with the optimizer that pays off. Compiled only if it may fit: compiling is slow."""
        eager, reasons = replace(way.setup, compile=False), list(declined)
        if self.asked.gradient_checkpointing not in (False, way.setup.gradient_checkpointing):
            is_offloaded = self.asked.gradient_checkpointing == "offload"
            what = "offloaded checkpointing" if is_offloaded else "gradient checkpointing"
            how = "with the inputs on the device" if way.setup.gradient_checkpointing else "without"
            reasons.append(f"{what}: it fits {how}")
        cost = self.costs(way.config, eager)
        if eager.optimizer in SAVING:
            plain = self.costs(way.config, replace(eager, optimizer="adamw_fused"))
            share = plain.optimizer_bytes / plain.total_bytes
            if share < _WORTH and self.fits(plain):
                why = f"AdamW's state is {share:.1%} of the peak; adamw_fused is used instead"
                reasons.append(f"{eager.optimizer}: {why}")
                cost, eager = plain, replace(eager, optimizer="adamw_fused")
        setup = replace(eager, compile=way.setup.compile)
        if setup.compile and self.fits(cost, _COMPILED):
            cost = self.costs(way.config, setup)
        self.tried.append(BudgetPlan(way.config, setup, cost, way.gives_up, tuple(reasons)))
        return self.tried[-1]

    def fits(self, cost: Estimate, fraction: float = 1.0) -> bool:
        """Whether a fraction of the predicted peak fits."""
        return cost.total_bytes * _MARGIN <= self.budget / fraction


def parse_size(memory: str | int) -> int:
    """Parse a memory size such as `"2GB"`, `"512 MiB"` or `1000` to bytes.

    Raises:
        ConfigError: If it cannot be parsed.

    Examples:
        >>> parse_size("1.5GiB")
        1610612736
    """
    match = _SIZE.fullmatch(memory) if isinstance(memory, str) else None
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f'`memory={memory!r}` is not understood. Use bytes, or a string such as "2GB" or "1.5GiB".')
    return int(float(match[1]) * _UNITS[match[2].upper()])


__all__ = ["BudgetPlan", "missing_estimate", "parse_size", "plan_for_budget", "plan_setting"]
