"""Parameter groups for optimizers: no weight decay on norms and biases, smaller steps for earlier blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_bsr.backbones import ModelSpec, probe_model
from peft_bsr.errors import ConfigError
from peft_bsr.training.trainable_groups import find_trainable_groups
from peft_bsr.tuners.base.layer import find_controllers

ParamGroup = dict[str, Any]
"""Parameter group of a torch optimizer: `params`, `lr`, `weight_decay`."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name -> parameter, for all trained parameters.

    With an adapter of peft_bsr these are all parameters that the active adapter trains, including blocks that an ALaST
    schedule did not select in this step. Otherwise they are the parameters with `requires_grad=True`.

    Args:
        model: A model with or without an adapter.
    """
    if find_controllers(model):
        return {
            name: parameter for group in find_trainable_groups(model) for name, parameter in group.parameters.items()
        }
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def param_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    layer_decay: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[ParamGroup]:
    """Parameter groups of the trained parameters, for a torch optimizer.

    Layer decay is that of BEiT (Bao et al. 2022) and timm: the head and the final norm train at `learning_rate`, block
    `i` of `L` at `learning_rate * layer_decay ** (L - i)`, the embeddings at `learning_rate * layer_decay ** (L + 1)`.
    `i` counts all blocks of the model, also those that do not train.

    Args:
        model: A vision transformer with an adapter of peft_bsr, with another PEFT adapter, or without an adapter.
        learning_rate: Learning rate of the layers after the last block.
        layer_decay: Factor from one block to the one before it, above 0 and at most 1; 0.65 to 0.9 are usual. Default
            None: one learning rate for all.
        head_lr: Learning rate of the modules after the last block (final norm and classifier). Default None:
            `learning_rate`.
        weight_decay: Weight decay of matrices; norms, biases and other vectors have none. Default 0.

    Returns:
        One dict per group with `params`, `lr` and `weight_decay`, the head first. For Trainer:
        `Trainer(..., optimizers=(torch.optim.AdamW(groups), None))`.

    Raises:
        ConfigError: If a number is invalid, or nothing trains.
        UnsupportedModelError: If there is no adapter of peft_bsr and the model's blocks cannot be found.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from peft_bsr import BSRConfig
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), BSRConfig(trainable_blocks="last:2"))
        >>> groups = param_groups(model, learning_rate=1e-3, layer_decay=0.5, weight_decay=0.01)
        >>> sorted({group["lr"] for group in groups})
        [0.00025, 0.0005, 0.001]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    _check(learning_rate, layer_decay, head_lr, weight_decay)
    parameters = trained_parameters(model)
    if not parameters:
        raise ConfigError(f"{type(model).__name__}: no parameter has `requires_grad=True`, nothing to group.")
    spec = None if layer_decay is None and head_lr is None else _spec_of(model)
    found: dict[tuple[int, float], ParamGroup] = {}
    for name, parameter in parameters.items():
        below_head = 0 if spec is None else _layers_below_head(name, spec)
        rate = learning_rate * (layer_decay or 1.0) ** below_head
        if head_lr is not None and below_head == 0:
            rate = head_lr
        decay = 0.0 if parameter.ndim < 2 or name.endswith("bias") else weight_decay
        group = found.setdefault((below_head, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return [found[key] for key in sorted(found)]


def _check(learning_rate: float, layer_decay: float | None, head_lr: float | None, weight_decay: float) -> None:
    problems = []
    for name, rate in (("learning_rate", learning_rate), ("head_lr", head_lr)):
        if rate is not None and not rate >= 0:
            problems.append(f"`{name}={rate!r}` must be at least 0.")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        problems.append(f"`layer_decay={layer_decay!r}` must be above 0 and at most 1, such as 0.75.")
    if not weight_decay >= 0:
        problems.append(f"`weight_decay={weight_decay!r}` must be at least 0.")
    if problems:
        raise ConfigError.from_problems("param_groups", problems)


def _spec_of(model: nn.Module) -> ModelSpec:
    controllers = find_controllers(model)
    if controllers:
        spec: ModelSpec = controllers[0].spec
        return spec
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return probe_model(base)


def _layers_below_head(name: str, spec: ModelSpec) -> int:
    """0 for what comes after the blocks or is outside of the part, 1 for the last block, L + 1 before them."""
    inside = f".{name}"
    for index, block in enumerate(spec.blocks):
        if f".{spec.full_name(block)}." in inside:
            return spec.depth - index
    is_head = any(f".{spec.full_name(module)}." in inside for module in (*spec.head, *spec.unread))
    is_around = spec.part is not None and f".{spec.part}." not in inside
    return 0 if is_head or is_around else spec.depth + 1


__all__ = ["ParamGroup", "param_groups", "trained_parameters"]
