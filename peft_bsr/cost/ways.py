"""The ways to train that the planner tries: what is trained, on which tokens, and how the step is run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, cast

import torch
from transformers import PreTrainedModel

from peft_bsr.backbones import ModelSpec
from peft_bsr.cost.setup import Setup
from peft_bsr.tuners import BSRConfig


class ConfigFields(TypedDict, total=False):
    """Fields of `BSRConfig` that the planner sets."""

    reduction_blocks: list[int]
    keep_rate: float
    reduction: str
    trainable_blocks: str | list[int]
    trainable: str
    target_modules: list[str]
    lean: str
    saved_activations: str
    frozen_weights: str


_HALVES, _THREE_TENTHS = "half of the tokens go, 3 times", "3 tokens of 10 go, 3 times"
_MERGED = "half of the tokens merge into others, 3 times"
_AGAIN = "first products are computed twice"


def _fields_of(preset: str, *names: str) -> ConfigFields:
    """Fields of a preset; `lean` is left out, because it depends on the memory."""
    return cast(ConfigFields, {name: getattr(BSRConfig(preset=preset), name) for name in names})


_UPPER = _fields_of("balanced", "trainable_blocks", "trainable")
_MERGE = _fields_of("balanced", "keep_rate", "reduction")
RECOMMENDED = _UPPER | _MERGE
LORA = _fields_of("lora", "trainable_blocks", "trainable", "target_modules")
SMALLEST = slice(-1, -3, -1)
"""Which of `settings_of` take the least memory: the last two, of the last block alone."""

_LORA_MODULES = frozenset(LORA["target_modules"])


@dataclass(frozen=True)
class Way:
    """One way to train a model.

    Attributes:
        config: Configuration for `get_peft_model`, or None for full fine-tuning.
        setup: How the model is trained.
        gives_up: What it gives up compared with standard full fine-tuning.
    """

    config: BSRConfig | None
    setup: Setup
    gives_up: str


@dataclass(frozen=True)
class Allows:
    """What a model allows.

    Attributes:
        int8: Whether saved activations can be in 8 bits, which group numbers by token.
        checkpointing: Whether transformers can checkpoint its blocks.
    """

    int8: bool = True
    checkpointing: bool = True

    @classmethod
    def by(cls, model: PreTrainedModel, spec: ModelSpec) -> Allows:
        """What the model with this description allows."""
        return cls(spec.no_reduction is None, model.supports_gradient_checkpointing)


Setting = tuple[ConfigFields | None, str]
_Part = tuple[ConfigFields, str]


def settings_of(spec: ModelSpec) -> tuple[Setting, ...]:
    """What is trained and which tokens are kept (fields of `BSRConfig`, None = everything), and what that gives up.

    Args:
        spec: Description of the model. If no token can be dropped, all are kept everywhere.

    Returns:
        Settings, ordered by how little they give up; `SMALLEST` of them take the least memory.
    """
    late, three_quarters = max(1, 2 * spec.depth // 3), max(1, round(0.75 * spec.depth))
    tokens = tokens_of(spec)
    whole, at_late, seven, half = tokens if len(tokens) == 4 else tokens * 4
    merged = (_MERGE, _MERGED) if spec.no_reduction is None else whole
    every: ConfigFields = {"trainable_blocks": "every:1"}
    low_rank: ConfigFields = {"trainable": "lora"}
    only = "nothing but low-rank updates of"
    fourths: _Part = ({"trainable_blocks": "every:4"}, "3 blocks of 4 stay frozen")
    last_3: _Part = ({"trainable_blocks": "last:3"}, "all but the last 3 blocks stay frozen")
    upper: _Part = (_UPPER, f"{only} the last {three_quarters} blocks trains")
    parts: list[tuple[_Part, _Part]] = [
        ((every, "the embeddings stay frozen"), whole),
        ((every | low_rank, f"{only} the blocks trains"), whole),
        ((LORA, f"{only} queries and values trains"), whole),
        (fourths, whole),
        (({"trainable_blocks": f"last:{late}", **low_rank}, f"{only} the last {late} blocks trains"), at_late),
        (last_3, at_late),
        (upper, seven),
        (fourths, seven),
        (upper, merged),
        (fourths, half),
        (last_3, half),
        (({"trainable_blocks": "last:1"}, "all but the last block stay frozen"), half),
        (({"trainable_blocks": "last:1", **low_rank}, "nothing but a low-rank update of the last block trains"), half),
    ]
    if not all(_LORA_MODULES & spec.paths_of(index).keys() for index in range(spec.depth)):
        parts = [part for part in parts if part[0][0] is not LORA]
    found: dict[str, ConfigFields | None] = {"nothing: every weight trains on every token": None}
    for (what, given_up), (kept, price) in parts:
        found.setdefault("; ".join(filter(None, (given_up, price))), what | kept)
    return tuple((fields, given_up) for given_up, fields in found.items())


def tokens_of(spec: ModelSpec) -> tuple[_Part, ...]:
    """Where tokens may be dropped (fields of `BSRConfig`), and what that gives up; the first keeps all tokens.

    Args:
        spec: Description of the model.

    Returns:
        Four, or the first alone if no token can be dropped.
    """
    whole: _Part = ({"reduction_blocks": []}, "")
    if spec.no_reduction is not None:
        return (whole,)
    late = 2 * spec.depth // 3
    return (
        whole,
        ({"reduction_blocks": [late]}, f"half of the tokens go, at block {late}"),
        ({"keep_rate": 0.7}, _THREE_TENTHS),
        ({"keep_rate": 0.5}, _HALVES),
    )


def ways_of(setting: Setting, setup: Setup, dtype: torch.dtype, allows: Allows = Allows()) -> Iterator[Way | str]:
    """Ways to run a setting, ordered by FLOPs; a string in the place of a way is the reason why it is not used.

    Args:
        setting: Setting from `settings_of`.
        setup: How the model is trained; gradient checkpointing is chosen here.
        dtype: Dtype of the model's weights.
        allows: What the model allows. Default: everything.
    """
    fields, given_up = setting
    frozen, reason = _frozen_weights(fields, setup, dtype)
    if reason:
        yield reason

    def way(level: ConfigFields, price: str, checkpointing: bool | Literal["offload"] = False) -> Way:
        config = None if fields is None else BSRConfig(**(fields | level | frozen))
        prices = (given_up, "frozen weights are in bfloat16" if frozen else "", price)
        return Way(config, replace(setup, gradient_checkpointing=checkpointing), "; ".join(filter(None, prices)))

    if fields is None:
        yield way({}, "")
    else:
        yield way({"lean": "exact"}, "")
        yield way({"lean": "max"}, _AGAIN)
        if setup.compile:
            yield "saved activations in int8: they have no effect under torch.compile"
        elif not allows.int8:
            yield "saved activations in int8: they group numbers by token, which the blocks of this model do not have"
        else:
            yield way({"lean": "max", "saved_activations": "int8"}, f"{_AGAIN}; gradients off by 1 %")
    if not allows.checkpointing:
        yield "gradient checkpointing: this model of transformers does not support it"
        return
    twice = "every block runs twice" if fields is None else "blocks that gradients reach run twice"
    yield way({}, twice, True)
    if setup.kind != "cpu":
        yield _why_not_offloaded(setup) or way({}, f"{twice}, their inputs are offloaded to the CPU", "offload")


def _frozen_weights(fields: ConfigFields | None, setup: Setup, dtype: torch.dtype) -> tuple[ConfigFields, str]:
    """Fields that store frozen weights in bfloat16 if that does not change the step, or the reason why not."""
    if fields is None or setup.autocast is None or dtype is not torch.float32:
        return {}, ""
    if setup.autocast is not torch.bfloat16:
        return {}, "frozen weights in bfloat16: the step is the same under bfloat16 autocast only"
    if fields["trainable_blocks"] == "every:1":
        return {}, "frozen weights in bfloat16: every block trains"
    return {"frozen_weights": "bfloat16"}, ""


def _why_not_offloaded(setup: Setup) -> str:
    if setup.compile:
        return "offloaded checkpointing: not predicted under torch.compile"
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    if "offload" not in inspect.signature(enable).parameters:
        return "offloaded checkpointing: this version of transformers does not have it"
    return ""


__all__ = [
    "LORA",
    "RECOMMENDED",
    "SMALLEST",
    "Allows",
    "ConfigFields",
    "Setting",
    "Way",
    "settings_of",
    "tokens_of",
    "ways_of",
]
