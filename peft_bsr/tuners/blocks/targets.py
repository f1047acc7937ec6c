"""Which modules of a model an adapter trains, under names that do not depend on the model's layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.compat.peft_api import TRANSLATES_KEYS, AuxiliaryTrainingWrapper
from peft_bsr.engine import CONTROLLER, Plan
from peft_bsr.errors import ConfigError
from peft_bsr.tuners.blocks.config import BlockConfig
from peft_bsr.tuners.blocks.layer import BlockWeights

Way = Literal["copy", "low_rank", "heads", "mixture", "mixer"]
OtherTargets = Callable[[nn.Module, ModelSpec, BlockConfig, Plan], dict[str, Way]]


def resolve_targets(
    model: nn.Module, spec: ModelSpec, config: BlockConfig, others: OtherTargets
) -> tuple[Plan, dict[str, Way], dict[str, str]]:
    """The plan, the modules to train (name -> how they train) and the layout. Does not change the model.

    Args:
        model: The model.
        spec: Description of the model.
        config: Configuration of the adapter.
        others: (model, spec, config, plan) -> other modules that the method trains.

    Raises:
        ConfigError: If the model does not allow the configuration; the message names every problem.
    """
    requested = config.plan_for(spec)
    if requested.trained_blocks[:1] == [0] and _early(model, spec, requested, config):
        requested = requested.without_cuts()
    targets: dict[str, Way] = {}
    problems = _check_read(spec, requested)
    other = others(model, spec, config, requested)
    places = _places(spec, requested, other)
    in_block: Way = "low_rank" if config.trainable == "lora" else "copy"
    layout = config.layout or {}
    is_foreign = any(places.get(place) != name for place, name in layout.items())
    is_told = is_foreign or (bool(layout) and config.fills_weights)  # patterns from a file are not used
    if is_foreign:
        problems += _check_foreign_layout(places, layout)
    if is_told:
        known = [place for place in layout if place in places]
        targets = {places[place]: in_block if place.startswith("blocks.") else "copy" for place in known}
        problems += _check_low_rank(model, targets)
    for index in [] if is_told else requested.trained_blocks:
        own = {role: f"{spec.blocks[index]}.{leaf}" for role, leaf in spec.paths_of(index).items()}
        chosen = [name for role, name in own.items() if config.trains(role) and _is_chosen(config, name, role)]
        if config.trainable == "lora":
            chosen = [name for name in chosen if _is_linear(model.get_submodule(name))]
        if not chosen and not config.modules_to_save and not requested.blocks[index].mixture:
            problems.append(
                f"`target_modules={config.target_modules!r}` with `exclude_modules={config.exclude_modules!r}` leaves "
                f"nothing to train in block {index}, whose leaf modules are {list(spec.paths_of(index).values())}."
            )
        targets.update(dict.fromkeys(chosen, in_block))
    if not is_told:
        targets.update(dict.fromkeys([name for name in spec.head if not is_excluded(config, name)], "copy"))
    targets |= other
    for name in targets:
        if not name.endswith(f".{CONTROLLER}") and isinstance(model.get_submodule(name), AuxiliaryTrainingWrapper):
            problems.append(
                f"another adapter trains {name!r} through `modules_to_save`, this one as part of its own weights. Name "
                "it in `modules_to_save` of both or of neither."
            )
    problems += _check_modules_to_save(model, spec, requested, config)
    problems += _check_tied(model, [name for name, way in targets.items() if way in ("copy", "heads")])
    if problems:
        raise ConfigError.from_problems(type(config).__name__, problems)
    return requested, targets, {place: name for place, name in places.items() if name in targets}


def _places(spec: ModelSpec, plan: Plan, others: Mapping[str, Way]) -> dict[str, str]:
    """Canonical place -> module name of all modules that this plan can train."""
    places = {
        f"blocks.{index}.{role}": f"{spec.blocks[index]}.{leaf}"
        for index in plan.trained_blocks
        for role, leaf in spec.paths_of(index).items()
    }
    for index, block in enumerate(spec.blocks):
        controller = f"{block}.{CONTROLLER}"
        places |= {f"blocks.{index}.{others[controller]}": controller} if controller in others else {}
    return places | {f"head.{i}": name for i, name in enumerate(spec.head)}


def _check_low_rank(model: nn.Module, targets: dict[str, Way]) -> list[str]:
    wrong = [name for name, way in targets.items() if way == "low_rank" and not _is_linear(model.get_submodule(name))]
    return [f"`layout` names {wrong[0]!r}, which is not a Linear and cannot have a low-rank update."] if wrong else []


def _check_foreign_layout(places: dict[str, str], layout: dict[str, str]) -> list[str]:
    """Problems of a file from another layout: it must train the same places, and needs a PEFT that can rename keys."""
    if unknown := sorted(set(layout) - set(places)):
        return [
            f"`layout` names {unknown}, which this model does not have or this plan does not train. The adapter was "
            "made for another model; to create a new one with this configuration, set `layout=None`."
        ]
    if not TRANSLATES_KEYS:
        return ["the adapter was saved for another layout of this model; loading it needs `peft>=0.21`."]
    return []


def _matches(pattern: list[str] | str | None, name: str, role: str | None, default: bool) -> bool:
    if pattern is None:
        return default
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(ending in (name, role) or name.endswith(f".{ending}") for ending in pattern)


def _is_chosen(config: BlockConfig, name: str, role: str) -> bool:
    return _matches(config.target_modules, name, role, True) and not is_excluded(config, name, role)


def is_excluded(config: BlockConfig, name: str, role: str | None = None) -> bool:
    """Whether `exclude_modules` or `modules_to_save` name the module, so that this adapter does not train it.

    Args:
        config: Configuration of the adapter.
        name: Name of the module in the model.
        role: Its canonical name in a block, such as `"attention.query"`. Default None: it is not in a block.
    """
    saved = any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.modules_to_save or ())
    return saved or _matches(config.exclude_modules, name, role, False)


def _is_linear(module: nn.Module) -> bool:
    module = module.base_layer if isinstance(module, BlockWeights) else module
    return isinstance(module, nn.Linear)


def _check_read(spec: ModelSpec, plan: Plan) -> list[str]:
    """Problems of trained blocks that do not change the output."""
    unread = [index for index in plan.trained_blocks if index > spec.last_read]
    if not unread:
        return []
    return [
        f"block {', '.join(map(str, unread))} would train without effect: the model's output does not depend on blocks "
        f"after {spec.last_read}. Use `BSRConfig(trainable_blocks=[...])` with blocks 0 to {spec.last_read}."
    ]


def _check_modules_to_save(model: nn.Module, spec: ModelSpec, plan: Plan, config: BlockConfig) -> list[str]:
    problems = []
    early = _early(model, spec, plan, config)
    for saved in config.modules_to_save or ():
        names = _named(model, saved)
        if any(isinstance(model.get_submodule(name), BlockWeights) for name in names):
            problems.append(
                f"`modules_to_save` names {saved!r}, which another adapter trains as part of its own weights. Name it "
                "in `modules_to_save` of both or of neither."
            )
        if unread := [name for name in names if any(_overlap(name, part) for part in spec.unread)]:
            problems.append(
                f"`modules_to_save={saved!r}` means {unread[0]!r}, which no gradient reaches: the model's output does "
                "not depend on it. Leave it out; the final norm and the head always train."
            )
        elif reached := [name for name in names if name in early]:
            problems.append(
                f"`modules_to_save={saved!r}` means {reached[0]!r}, which no gradient reaches: it runs before block "
                f"{min(plan.trained_blocks)}, the first that trains. Train all blocks with it "
                '(`trainable_blocks="every:1"`), or use `ALaSTConfig(train_embeddings=True)`; or leave it out.'
            )
    return problems


def _check_tied(model: nn.Module, names: list[str]) -> list[str]:
    """Problems of shared weights: a trained copy would no longer be shared."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            if others := [n for n in owners[id(parameter)] if not n.startswith(f"{name}.")]:
                return [
                    f"{name!r} shares a weight with {others[0]!r}, and would train a copy of it that is no longer "
                    "shared. Give each module a weight of its own, leave this one out with `exclude_modules`, or use "
                    '`trainable="lora"`.'
                ]
    return []


def _early(model: nn.Module, spec: ModelSpec, plan: Plan, config: BlockConfig) -> set[str]:
    """Modules of `modules_to_save` that run before the gradient is cut."""
    if not plan.cuts_gradient or not config.modules_to_save:
        return set()
    first = min(plan.trained_blocks)
    between = [name for block in spec.stage_blocks[first + 1 :] for name in block.before]
    reached = (*spec.head, *spec.blocks[first:], *between)
    names = {name for saved in config.modules_to_save or () for name in _named(model, saved)}
    return {name for name in names if not any(_overlap(name, part) for part in (*reached, *spec.unread))}


def _named(model: nn.Module, saved: str) -> list[str]:
    return [name for name, _ in model.named_modules() if re.match(rf"(^|.*\.){saved}$", name)]


def _overlap(name: str, other: str) -> bool:
    """Whether one module is the other, or contains it."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
