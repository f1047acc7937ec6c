"""Several tasks on one backbone: mixtures of experts, gates and heads. Used through `BSRConfig(tasks=..., moe=...)`."""

from peft_bsr.multitask.calls import ImageCall, read_call, without_tasks
from peft_bsr.multitask.config import MoEConfig, TaskConfig, check_weights, read_moe, read_tasks
from peft_bsr.multitask.heads import IGNORED_CLASS, TaskHeads, new_head, task_loss
from peft_bsr.multitask.mixture import FullExperts, LowRankExperts, Mixture, PlainMLP, new_gates
from peft_bsr.multitask.output import MultitaskOutput, collect_output
from peft_bsr.multitask.usage import record_usage

__all__ = [
    "IGNORED_CLASS",
    "FullExperts",
    "ImageCall",
    "LowRankExperts",
    "Mixture",
    "MoEConfig",
    "MultitaskOutput",
    "PlainMLP",
    "TaskConfig",
    "TaskHeads",
    "check_weights",
    "collect_output",
    "new_gates",
    "new_head",
    "read_call",
    "read_moe",
    "read_tasks",
    "record_usage",
    "task_loss",
    "without_tasks",
]
