"""The ways to train that the planner tries: what is trained, on which tokens, and how the step is run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, cast

import torch
from transformers import PreTrainedModel

from peft_bsr.cost.setup import Setup
from peft_bsr.tuners import BSRConfig


class TokenFields(TypedDict, total=False):
    """Fields of `BSRConfig`: which tokens are dropped."""

    reduction_blocks: list[int]
    keep_rate: float
    reduction: str


class ConfigFields(TokenFields, total=False):
    """Fields of `BSRConfig` that the planner sets."""

    trainable_blocks: str | list[int]
    trainable: str
    lean: str
    saved_activations: str
    frozen_weights: str


_HALVES, _THREE_TENTHS = "half of the tokens go, 3 times", "3 tokens of 10 go, 3 times"
_MERGED = "half of the tokens merge into others, 3 times"
_AGAIN = "first products are computed twice"
_EVERY: ConfigFields = {"trainable_blocks": "every:1", "reduction_blocks": []}
_PRESET = BSRConfig(preset="balanced")
RECOMMENDED = cast(  # the preset but for `lean`, which depends on the memory
    ConfigFields, {name: getattr(_PRESET, name) for name in ("trainable_blocks", "keep_rate", "reduction", "trainable")}
)


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


Setting = tuple[ConfigFields | None, str]


def settings_of(depth: int) -> tuple[Setting, ...]:
    """What is trained and which tokens are kept (fields of `BSRConfig`, None = everything), and what that gives up.

    Args:
        depth: Number of blocks of the model.

    Returns:
        Settings, ordered by how little they give up.
    """
    late, three_quarters = 2 * depth // 3, max(1, round(0.75 * depth))
    return (
        (None, "nothing: every weight trains on every token"),
        (_EVERY, "the embeddings stay frozen"),
        (_EVERY | {"trainable": "lora"}, "nothing but low-rank updates of the blocks trains"),
        ({"trainable_blocks": "every:4", "reduction_blocks": []}, "3 blocks of 4 stay frozen"),
        (
            {"trainable_blocks": f"last:{max(1, late)}", "reduction_blocks": [late], "trainable": "lora"},
            f"nothing but low-rank updates of the last {late} blocks trains; half of the tokens go, at block {late}",
        ),
        (
            {"trainable_blocks": "last:3", "reduction_blocks": [late]},
            f"all but the last 3 blocks stay frozen; half of the tokens go, at block {late}",
        ),
        (
            {"trainable_blocks": "last:75%", "keep_rate": 0.7, "trainable": "lora"},
            f"nothing but low-rank updates of the last {three_quarters} blocks trains; {_THREE_TENTHS}",
        ),
        ({"trainable_blocks": "every:4", "keep_rate": 0.7}, f"3 blocks of 4 stay frozen; {_THREE_TENTHS}"),
        (
            RECOMMENDED,
            f"nothing but low-rank updates of the last {three_quarters} blocks trains; {_MERGED}",
        ),
        ({"trainable_blocks": "every:4", "keep_rate": 0.5}, f"3 blocks of 4 stay frozen; {_HALVES}"),
        ({"trainable_blocks": "last:3", "keep_rate": 0.5}, f"all but the last 3 blocks stay frozen; {_HALVES}"),
        ({"trainable_blocks": "last:1", "keep_rate": 0.5}, f"all but the last block stay frozen; {_HALVES}"),
        (
            {"trainable_blocks": "last:1", "keep_rate": 0.5, "trainable": "lora"},
            f"nothing but a low-rank update of the last block trains; {_HALVES}",
        ),
    )


def tokens_of(depth: int) -> tuple[tuple[TokenFields, str], ...]:
    """Where tokens may be dropped (fields of `BSRConfig`), and what that gives up; the first keeps all tokens.

    Args:
        depth: Number of blocks of the model.
    """
    late = 2 * depth // 3
    return (
        ({"reduction_blocks": []}, ""),
        ({"reduction_blocks": [late]}, f"half of the tokens go, at block {late}"),
        ({"keep_rate": 0.7}, _THREE_TENTHS),
        ({"keep_rate": 0.5}, _HALVES),
    )


def ways_of(setting: Setting, setup: Setup, dtype: torch.dtype) -> Iterator[Way | str]:
    """Ways to run a setting, ordered by FLOPs; a string in the place of a way is the reason why it is not used.

    Args:
        setting: Setting from `settings_of`.
        setup: How the model is trained; gradient checkpointing is chosen here.
        dtype: Dtype of the model's weights.
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
        else:
            yield way({"lean": "max", "saved_activations": "int8"}, f"{_AGAIN}; gradients off by 1 %")
    stock: ConfigFields = {} if fields is None else {"lean": "off"}
    twice = "every block runs twice" if fields is None else "blocks that gradients reach run twice"
    yield way(stock, twice, True)
    if setup.kind != "cpu":
        yield _why_not_offloaded(setup) or way(stock, f"{twice}, their inputs are offloaded to the CPU", "offload")


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


__all__ = ["ConfigFields", "Setting", "TokenFields", "Way", "settings_of", "tokens_of", "ways_of"]
