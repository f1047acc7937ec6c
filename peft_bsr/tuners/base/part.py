"""Adapters on a part of a larger model, alone or beside an adapter of another method, such as a LoRA on the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from peft_bsr.backbones import find_part, view_of
from peft_bsr.errors import AdapterError, ConfigError, UnsupportedModelError
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.layer import find_controllers, foreign_layers, leave_out_ours
from peft_bsr.tuners.base.loading import FileChecks
from peft_bsr.tuners.base.resolution import Resolution

if TYPE_CHECKING:
    from peft_bsr.tuners.base.tuner import MethodTuner


def resolve_part(tuner: type[MethodTuner], model: nn.Module, config: SavedConfig) -> Resolution:
    """`tuner.resolve` on the part of the model that the configuration names, or that is found.

    Args:
        tuner: The method's tuner.
        model: A supported vision transformer, or a larger model with one inside.
        config: Configuration of the adapter.

    Raises:
        UnsupportedModelError, ConfigError: See `MethodTuner.resolve` and `find_part`.
    """
    part = find_part(model, config.part)
    if part is None:
        return tuner.resolve(model, config)
    try:
        found = tuner.resolve(view_of(model, part), _inside(config, part))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"`part={part!r}` of {type(model).__name__}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"`part={part!r}` of {type(model).__name__}: {error}") from error
    plan = found.plan.with_all_queries()  # the larger model may return the tokens, too
    return replace(found, plan=plan, spec=replace(found.spec, part=part))


def _inside(config: SavedConfig, part: str) -> SavedConfig:
    """The configuration with names of modules relative to the part, also those that were given in full."""
    local = copy.copy(config)
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(config, field, None)
        if isinstance(names, list):
            setattr(local, field, [name.removeprefix(f"{part}.") for name in names])
    return local


@contextmanager
def beside_others(model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig]) -> Iterator[nn.Module]:
    """Context manager around a new tuner: the model without the PeftModel of another method around it.

    PEFT would add the configuration to those of the other method, under the same names.

    Args:
        model: The model given by the user.
        peft_config: The new tuner's configuration, or one by name.

    Yields:
        The model for the tuner. A PeftModel of another method is taken off if the adapter goes to a part of its model.
    """
    configs = list(peft_config.values()) if isinstance(peft_config, dict) else [peft_config]
    base: PreTrainedModel = model
    if isinstance(model, PeftModel) and not isinstance(model.base_model, FileChecks):
        inside = model.get_base_model()
        if isinstance(model.base_model, BaseTuner) and find_part(inside, configs[0].part) is not None:
            base = inside
            model.register_state_dict_post_hook(leave_out_ours)
            for config in configs:
                config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None)
    others: dict[str, PeftConfig] = vars(base).get("peft_config", {})
    is_foreign = bool(others) and not any(isinstance(config, SavedConfig) for config in others.values())
    if is_foreign:
        del base.peft_config
    try:
        yield base
    finally:
        if is_foreign:
            base.peft_config = others | vars(base).get("peft_config", {})


def check_beside(model: nn.Module, backbone: nn.Module, adapter_name: str, is_first: bool) -> None:
    """Raise if other adapters of the model are where this one goes.

    Args:
        model: The model.
        backbone: The part for the adapter, or the model itself.
        adapter_name: Name of the adapter.
        is_first: Whether it is the first of its method.

    Raises:
        AdapterError: If they are in the same part, have `modules_to_save` of the same name, or are ours elsewhere.
    """
    name, part = type(model).__name__, next((n for n, m in model.named_modules() if m is backbone), "")
    if any(controller.roots[0] is not backbone for controller in find_controllers(model)):
        raise AdapterError(
            f"{name} has an adapter of peft_bsr on another part than `{part}`. Attach this one to the part itself: "
            f"`get_peft_model(model.{part}, ...)`."
        )
    if inside := foreign_layers(backbone):
        raise AdapterError(
            f"`{part}.{inside[0]}` has an adapter of another method. Leave the vision model out of it, for example "
            "by `exclude_modules`, or call `unload()` on it first."
        )
    wrappers = [n for n, m in model.named_modules() if adapter_name in getattr(m, "modules_to_save", ())]
    if foreign_layers(model) and wrappers and is_first:
        raise AdapterError(
            f"`{wrappers[0]}` is in `modules_to_save` of another adapter that is named {adapter_name!r} as well. "
            'Name this one differently: `get_peft_model(model, config, adapter_name="vision")`.'
        )


__all__ = ["beside_others", "check_beside", "resolve_part"]
