"""Adds a task to a trained adapter, and exports one as a separate adapter."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_bsr.errors import AdapterError
from peft_bsr.multitask import TaskConfig, TaskHeads, new_gates, new_head, read_tasks
from peft_bsr.tuners.base.classifier import find_final_norm
from peft_bsr.tuners.base.layer import find_controllers
from peft_bsr.tuners.blocks.layer import BlockWeights, move_like
from peft_bsr.tuners.bsr.model import BSRModel

_HEAD = re.compile(r"(.*\.heads\.)(\d+)(\..*)")


@torch.inference_mode(False)  # inference tensors can never train
def add_task(model: PeftModel, name: str, task: int | TaskConfig, adapter_name: str | None = None) -> None:
    """Add a task to an adapter, with a new gate and a new head. Everything else is unchanged.

    The gates are new parameters afterwards: create the optimizer after this call. Later saves include the new task.

    Args:
        model: Model from `get_peft_model` or `PeftModel.from_pretrained`.
        name: Name of the task.
        task: Its number of classes, or its `TaskConfig`.
        adapter_name: The adapter. Default None: the active adapter.

    Raises:
        AdapterError: If the adapter has no tasks, has this one already, or drops tokens that a dense task needs.
        ConfigError: If the task is invalid.

    Examples:
        >>> add_task(model, "svhn", 10)  # doctest: +SKIP
    """
    adapter, config = _with_tasks(model, adapter_name)
    if name in (names := [t.name for t in config.tasks]):
        raise AdapterError(f"Adapter {adapter!r} already has a task {name!r}, among {names}. Choose another name.")
    tasks, problems = read_tasks({name: task})
    if tasks is None:
        raise AdapterError(f"add_task: {' '.join(problems)}")
    (added,) = tasks
    tuner: BSRModel = model.base_model
    if added.is_dense and tuner.plan(adapter).mode != "full_view":
        raise AdapterError(
            f"Task {name!r} needs an output for each patch, but adapter {adapter!r} shortens the sequence. Train an "
            'adapter with `mode="full_view"`.'
        )
    controllers, spec = find_controllers(tuner.model), tuner.spec
    layer = _heads_layer(tuner.model, adapter)
    heads: TaskHeads = layer.bsr_params[adapter]
    own = next(heads.parameters())
    head = new_head(added, layer.in_features, spec.width, find_final_norm(tuner.model, spec), spec.num_prefix)
    move_like(head, own, own.device)
    heads.heads.append(head.requires_grad_(own.requires_grad).train(heads.training))
    for controller in controllers:
        if adapter in controller.bsr_params:
            mixture = controller.bsr_params[adapter]
            row = new_gates(1, mixture.settings.num_experts, spec.width, mixture.gates)
            gates = torch.cat([mixture.gates.detach(), row])
            mixture.gates = nn.Parameter(gates, requires_grad=mixture.gates.requires_grad)
    config.tasks = heads.tasks = [*config.tasks, added]
    controllers[0].calls[adapter] = replace(controllers[0].calls[adapter], tasks=config.tasks)


def export_task(model: PeftModel, task: str, folder: str | Path, adapter_name: str | None = None) -> None:
    """Save one task as a separate adapter: its gates, its head and all shared weights.

    A model with this adapter is called without `task=` and returns the outputs of a single-task model. `model` is not
    changed.

    Args:
        model: Model from `get_peft_model` or `PeftModel.from_pretrained`.
        task: Name of the task.
        folder: Folder for `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: The adapter. Default None: the active adapter.

    Raises:
        AdapterError: If the adapter has no such task.

    Examples:
        >>> export_task(model, "cifar10", "cifar10-adapter")  # doctest: +SKIP
    """
    adapter, config = _with_tasks(model, adapter_name)
    names = [t.name for t in config.tasks]
    if task not in names:
        raise AdapterError(f"Adapter {adapter!r} has no task {task!r}; its tasks are {names}.")
    index = names.index(task)
    weights: dict[str, Tensor] = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items():
        head = _HEAD.fullmatch(key)
        if head is not None and int(head[2]) != index:
            continue
        name = key if head is None else f"{head[1]}0{head[3]}"
        weights[name] = (tensor[index : index + 1] if key.endswith(".gates") else tensor).detach().cpu().contiguous()
    alone = copy.copy(config)
    alone.tasks, alone.task_weights, alone.inference_mode = [config.tasks[index]], None, True
    if alone.base_model_name_or_path is None:
        alone.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    alone.save_pretrained(str(folder), auto_mapping_dict=_class_named(model.get_base_model()))


def _class_named(base: nn.Module) -> dict[str, str]:
    """The class of the base model as PEFT writes it, for whoever loads the adapter without the model."""
    return {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}


def _with_tasks(model: PeftModel, adapter_name: str | None) -> tuple[str, Any]:
    adapter = adapter_name or model.active_adapter
    config = model.peft_config.get(adapter)
    if not getattr(config, "tasks", None):
        raise AdapterError(f"Adapter {adapter!r} has no tasks. Train one with `BSRConfig(tasks=...)`.")
    return adapter, config


def _heads_layer(model: nn.Module, adapter: str) -> Any:
    layers = (m for m in model.modules() if isinstance(m, BlockWeights) and adapter in m.bsr_params)
    return next(layer for layer in layers if isinstance(layer.bsr_params[adapter], TaskHeads))


__all__ = ["add_task", "export_task"]
