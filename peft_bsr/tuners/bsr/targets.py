"""Which modules of a model an adapter trains, under names that do not depend on the model's layout."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_bsr.backbones import Column
from peft_bsr.engine import Plan
from peft_bsr.errors import ConfigError
from peft_bsr.tuners.block_config import BlockConfig
from peft_bsr.tuners.bsr.layer import BSRWeights

_PEFT_TRANSLATES_KEYS = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")


def resolve_targets(
    model: nn.Module, column: Column, config: BlockConfig
) -> tuple[Plan, dict[str, bool], dict[str, str]]:
    """The plan, the modules to train (name -> whether by a low-rank update) and the layout. Nothing is changed.

    Raises:
        ConfigError: Naming everything that this model does not allow.
    """
    requested = config.plan_for(column)
    targets: dict[str, bool] = {}
    problems = []
    places = _places(column, requested)
    layout = config.layout or {}
    is_foreign = any(places.get(place) != name for place, name in layout.items())
    if is_foreign:
        problems += _check_foreign_layout(places, layout)
        known = [place for place in layout if place in places]
        targets = {places[place]: config.trainable == "lora" and place.startswith("blocks.") for place in known}
    for index in [] if is_foreign else requested.trained_blocks:
        leaves = [f"{column.blocks[index]}.{leaf}" for leaf in column.leaves]
        chosen = [n for n in leaves if _matches(config.target_modules, n, True) and not is_excluded(config, n)]
        if config.trainable == "lora":
            chosen = [name for name in chosen if _is_linear(model.get_submodule(name))]
        if not chosen and not config.modules_to_save:
            problems.append(
                f"`target_modules={config.target_modules!r}` with `exclude_modules={config.exclude_modules!r}` leaves "
                f"nothing to train in block {index}, whose leaf modules are {list(column.leaves)}."
            )
        targets.update(dict.fromkeys(chosen, config.trainable == "lora"))
    if not is_foreign:
        targets.update(dict.fromkeys([name for name in column.head if not is_excluded(config, name)], False))
    for name in targets:
        if isinstance(model.get_submodule(name), AuxiliaryTrainingWrapper):
            problems.append(
                f"another adapter trains {name!r} through `modules_to_save`, this one as part of its own weights. Name "
                "it in `modules_to_save` of both or of neither."
            )
    problems += _check_modules_to_save(model, column, requested, config)
    if problems:
        raise ConfigError.from_problems(type(config).__name__, problems)
    return requested, targets, {place: name for place, name in places.items() if name in targets}


def _places(column: Column, plan: Plan) -> dict[str, str]:
    """Canonical place -> module name of all that this plan may train."""
    places = {
        f"blocks.{index}.{role}": f"{column.blocks[index]}.{leaf}"
        for index in plan.trained_blocks
        for role, leaf in zip(column.roles, column.leaves, strict=True)
    }
    return places | {f"head.{i}": name for i, name in enumerate(column.head)}


def _check_foreign_layout(places: dict[str, str], layout: dict[str, str]) -> list[str]:
    """A file from another layout must train the same places, and needs a PEFT that lets us rename keys."""
    if unknown := sorted(set(layout) - set(places)):
        return [
            f"`layout` names {unknown}, which this model does not have or this plan does not train. The adapter was "
            "made for another model; to begin a new one with this config, set `layout=None`."
        ]
    if not _PEFT_TRANSLATES_KEYS:
        return ["the adapter was saved on another layout of this model; reading it needs `peft>=0.21`."]
    return []


def _matches(pattern: list[str] | str | None, name: str, default: bool) -> bool:
    if pattern is None:
        return default
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern)


def is_excluded(config: BlockConfig, name: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` take the module out of our hands."""
    saved = any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.modules_to_save or ())
    return saved or _matches(config.exclude_modules, name, False)


def _is_linear(module: nn.Module) -> bool:
    module = module.base_layer if isinstance(module, BSRWeights) else module
    return isinstance(module, nn.Linear)


def _check_modules_to_save(model: nn.Module, column: Column, plan: Plan, config: BlockConfig) -> list[str]:
    reached = (*column.head, *column.blocks[min(plan.trained_blocks) :])
    problems = []
    for saved in config.modules_to_save or ():
        names = [name for name, _ in model.named_modules() if re.match(rf"(^|.*\.){saved}$", name)]
        if any(isinstance(model.get_submodule(name), BSRWeights) for name in names):
            problems.append(
                f"`modules_to_save` names {saved!r}, which another adapter trains as part of its own weights. Name it "
                "in `modules_to_save` of both or of neither."
            )
        early = [n for n in names if plan.cuts_gradient and not any(_overlap(n, part) for part in reached)]
        if early:
            problems.append(
                f"`modules_to_save` names {saved!r}, that is {early}, but the gradient is cut before block "
                f"{min(plan.trained_blocks)} and only the head lies behind the blocks. Leave it out."
            )
    return problems


def _overlap(name: str, other: str) -> bool:
    """Whether one module is the other, or lies in it."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
