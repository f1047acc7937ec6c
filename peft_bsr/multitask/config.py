"""Configuration of tasks and mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from peft_bsr.core.checks import (
    MOST_CLASSES,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    check_flags,
    check_numbers,
    check_whole,
    is_number,
    is_whole,
)
from peft_bsr.errors import ConfigError

TaskKind = Literal["classification", "regression", "segmentation", "regression_map"]
ExpertType = Literal["full", "lora"]
IGNORED_LABEL = -100  # as in torch and Trainer


@dataclass(frozen=True)
class TaskConfig:
    """One task.

    Attributes:
        name: Name of the task in calls and outputs.
        num_outputs: Number of classes or values.
        kind: `"classification"` (labels [B] int) and `"regression"` (labels [B, num_outputs]) have the input of the
            model's classifier. `"segmentation"` (labels [B, height, width] int, 255 is ignored) and `"regression_map"`
            (labels [B, num_outputs, height, width], values that are not finite are ignored) read each patch of the last
            block and need the whole sequence (`mode="full_view"`).

    Raises:
        ConfigError: If values are invalid; it names all of them.
    """

    name: str
    num_outputs: int
    kind: TaskKind = "classification"

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.name, str) or not self.name:
            problems.append(f"`name={self.name!r}` must be a string.")
        if not is_whole(self.num_outputs, 1, MOST_CLASSES):
            problems.append(
                f"task {self.name!r}: `num_outputs={self.num_outputs!r}` must be an integer from 1 to {MOST_CLASSES}."
            )
        if self.kind not in get_args(TaskKind):
            kinds = ", ".join(map(repr, get_args(TaskKind)))
            problems.append(f"task {self.name!r}: `kind={self.kind!r}` is unknown. Use one of {kinds}.")
        if problems:
            raise ConfigError.from_problems("TaskConfig", problems)

    @property
    def is_dense(self) -> bool:
        """Whether every patch has its own output."""
        return self.kind in ("segmentation", "regression_map")


@dataclass
class MoEConfig:
    """Mixtures of experts that replace the MLPs of the trained blocks.

    Source: the multitask part of BSR (arXiv 2405.10951). Departure: `renormalize=True`, so that training starts with
    the outputs of the dense model; the release starts each layer at about `top_k / num_experts` of its MLP.

    Args:
        num_experts: Number of experts E. Default 16.
        top_k: Number of experts per token. Default 4.
        renormalize: Whether a token's weights sum to 1. Default True; the release does not renormalise.
        expert_type: `"full"`: every expert is a trained copy of the pretrained MLP. `"lora"`: all experts share one MLP
            (trained as in blocks without experts), and each has a low-rank update. The second Linear runs once, on the
            weighted sum; its bias is added once, whatever the weights sum to.
        r: Rank of the update, for `expert_type="lora"`. Default 8.
        lora_alpha: The update is scaled by `lora_alpha / r`. Default 16.
        balance_weight: Weight of the balance loss in training; 0.01 in M3ViT. Default 0, as in the release.
        noise: Standard deviation of noise on the gates' logits in training, times `num_experts`. Default 0.
        dropout: Dropout rate of the experts' hidden activations. Default 0.

    Raises:
        ConfigError: If values are invalid; it names all of them.

    Examples:
        >>> MoEConfig(num_experts=8, top_k=2).expert_type
        'full'
    """

    num_experts: int = 16
    top_k: int = 4
    renormalize: bool = True
    expert_type: ExpertType = "full"
    r: int = 8
    lora_alpha: float = 16
    balance_weight: float = 0.0
    noise: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        problems = check_whole(self, "num_experts", "top_k", "r")
        if not problems and self.top_k > self.num_experts:
            problems.append(f"`top_k={self.top_k}` must not be larger than `num_experts={self.num_experts}`.")
        problems += check_flags(self, "renormalize")
        if self.expert_type not in get_args(ExpertType):
            problems.append(f"`expert_type={self.expert_type!r}` is unknown. Use 'full' or 'lora'.")
        problems += check_numbers(self, "balance_weight", "noise", within=NOT_NEGATIVE)
        problems += check_numbers(self, "lora_alpha", within=POSITIVE)
        problems += check_numbers(self, "dropout", within=RATE)
        if problems:
            raise ConfigError.from_problems("MoEConfig", problems)


def read_moe(value: object) -> tuple[MoEConfig | None, list[str]]:
    """A config's `moe` as `MoEConfig`, and its problems.

    Args:
        value: `MoEConfig`, None, or a dict from a file.
    """
    if value is None or isinstance(value, MoEConfig):
        return value, []
    if not isinstance(value, Mapping):
        return None, [f"`moe={value!r}` must be a MoEConfig or None."]
    known = {f.name for f in fields(MoEConfig)}
    if unknown := sorted(set(value) - known):
        return None, [f"`moe` has the unknown settings {unknown}; it has {sorted(known)}."]
    return _tried(MoEConfig, value, "moe")


def read_tasks(value: object) -> tuple[list[TaskConfig] | None, list[str]]:
    """A config's `tasks` in order, and their problems.

    Args:
        value: None; a dict from name to a number of classes, to settings of a `TaskConfig`, or to a `TaskConfig`; or a
            list of `TaskConfig`s or their settings.
    """
    if value is None:
        return None, []
    if isinstance(value, Mapping):
        entries = [_with_name(name, task) for name, task in value.items()]
    else:
        entries = list(value) if isinstance(value, (list, tuple)) else []
    if not entries or not all(isinstance(entry, (Mapping, TaskConfig)) for entry in entries):
        return None, [
            f"`tasks={value!r}` must name at least one task with its number of classes or its TaskConfig, such as "
            '`{"cifar10": 10, "depth": TaskConfig("depth", 1, "regression_map")}`.'
        ]
    tasks, problems = [], []
    for entry in entries:
        task, found = (entry, []) if isinstance(entry, TaskConfig) else _tried(TaskConfig, entry, "tasks")
        tasks.append(task)
        problems += found
    names = [task.name for task in tasks if task is not None]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"`tasks` names {repeated} more than once.")
    return (None if problems else tasks), problems


def check_weights(weights: Any, tasks: list[TaskConfig] | None) -> list[str]:
    """Problems of a config's `task_weights`."""
    if weights is None:
        return []
    names = [task.name for task in tasks or ()]
    is_right = isinstance(weights, Mapping) and all(is_number(weight, NOT_NEGATIVE) for weight in weights.values())
    if not is_right or not set(weights) <= set(names):
        return [f"`task_weights={weights!r}` must give numbers of at least 0 to some of the tasks {names}."]
    return []


def _with_name(name: str, task: object) -> TaskConfig | Mapping[str, object]:
    if isinstance(task, TaskConfig):
        return TaskConfig(name, task.num_outputs, task.kind)
    return {"name": name, **task} if isinstance(task, Mapping) else {"name": name, "num_outputs": task}


def _tried(cls: type, settings: Mapping[str, object], name: str) -> tuple[Any, list[str]]:
    try:
        return cls(**settings), []
    except ConfigError as error:
        return None, [f"`{name}`: {str(error).partition(': ')[2]}"]
    except TypeError as error:
        return None, [f"`{name}` has an entry {dict(settings)!r} that is invalid: {error}."]


__all__ = [
    "IGNORED_LABEL",
    "ExpertType",
    "MoEConfig",
    "TaskConfig",
    "TaskKind",
    "check_weights",
    "read_moe",
    "read_tasks",
]
