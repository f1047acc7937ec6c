"""Base configuration of methods that train blocks: how blocks train, and what they keep for backward."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft_bsr.backbones import ModelSpec
from peft_bsr.core import ScoreKind
from peft_bsr.core.checks import POSITIVE, SHARE, check_choice, check_flags, check_numbers, check_whole
from peft_bsr.engine import GradientTokens, Lean, Mode, Plan
from peft_bsr.errors import ConfigError
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.frozen_weights import FROZEN_WEIGHTS_HELP, FrozenWeights
from peft_bsr.tuners.base.reductions import as_list, check_score, resolve_score

Trainable = Literal["full", "lora"]
LeanLevel = Literal["off", "exact", "max"]
SavedActivations = Literal["full", "int8"]
ChosenBy = Literal["score", "random"]
_MODULE_LISTS = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass
class BlockConfig(SavedConfig):
    """Base of the configurations of methods that train blocks under a plan; `BSRConfig` documents what they share."""

    mode: Mode | None = field(
        default=None, metadata={"help": "'compact' or 'full_view'; None = chosen by what the head reads."}
    )
    score: ScoreKind | None = field(
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
        default=None, metadata={"help": "Further modules to train and save; final norm and head always are."}
    )
    lean: str = field(default="exact", metadata={"help": "'off', 'exact' or 'max': what is not kept for backward."})
    saved_activations: str = field(
        default="full", metadata={"help": "'full' or 'int8': precision of activations that are kept for backward."}
    )
    gradient_tokens: float = field(
        default=1.0, metadata={"help": "Share of the tokens that carry gradients in training; all run forward."}
    )
    gradient_tokens_by: str = field(
        default="score", metadata={"help": "'score' (those that rank highest) or 'random', gradient_tokens < 1 only."}
    )
    frozen_weights: str = field(default="full", metadata={"help": FROZEN_WEIGHTS_HELP})
    layout: dict[str, str] | None = field(
        default=None, metadata={"help": "Written at attach: canonical place -> module name of what trains."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _MODULE_LISTS:
            setattr(self, name, as_list(getattr(self, name)))
        if problems := self._problems():
            raise ConfigError.from_problems(type(self).__name__, problems)

    def sizes(self) -> dict[str, tuple[int | None, ...]]:
        """See `AdapterFiles.sizes`."""
        places = [p for p in self.layout or ("blocks.",) if p.startswith("blocks.") and not p.endswith(".mixture")]
        return {"lora_A": (self.r,)} if self.trainable == "lora" and places else {}

    def plan_for(self, spec: ModelSpec) -> Plan:
        """The plan of this configuration for the model of `spec`.

        Raises:
            ConfigError: If the model does not allow the configuration; the message names every problem.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement `plan_for`")

    def recorded(self, resolution: Any) -> SavedConfig:
        """A copy with the values that were chosen for the model, and the layout."""
        config = super().recorded(resolution)
        config.layout = dict(resolution.layout)
        return config

    def trains(self, role: str) -> bool:
        """Whether trained blocks have weights of their own for that role's module, such as `"mlp.first"`."""
        return True

    def _problems(self) -> list[str]:
        """Invalid values and what to use instead, one sentence each."""
        problems = []
        for name, choices in (
            ("trainable", Trainable),
            ("lean", LeanLevel),
            ("saved_activations", SavedActivations),
            ("gradient_tokens_by", ChosenBy),
            ("frozen_weights", FrozenWeights),
        ):
            problems += check_choice(self, name, get_args(choices))
        problems += check_flags(self, "init_weights")
        problems += check_numbers(self, "gradient_tokens", within=SHARE)
        problems += check_whole(self, "r")
        problems += check_numbers(self, "lora_alpha", within=POSITIVE)
        layout = self.layout
        if layout is not None and not (isinstance(layout, dict) and all(map(_is_text, (*layout, *layout.values())))):
            problems.append(f"`layout={layout!r}` must map each place to a module name, or be None.")
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


def saving_less(plan: Plan, config: BlockConfig, spec: ModelSpec) -> Plan:
    """The plan with the settings for lean blocks, int8 activations and gradient tokens.

    Raises:
        ConfigError: If the model's tokens cannot be ranked as the config asks.
    """
    if config.lean != "off":
        plan = plan.with_lean(Lean(save_products=config.lean == "exact"))
    plan = plan.with_int8(config.saved_activations == "int8")
    if config.gradient_tokens == 1:
        return plan
    score = None if config.gradient_tokens_by == "random" else resolve_score(config, spec)
    if score is not None and (problems := check_score(score, spec)):
        raise ConfigError.from_problems(type(config).__name__, problems)
    return plan.with_gradient_tokens(GradientTokens(float(config.gradient_tokens), score))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


__all__ = ["BlockConfig", "saving_less"]
