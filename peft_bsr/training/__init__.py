"""Training: the cache of what frozen leading blocks give, ALaST's callback, data of several tasks and their metrics."""

from peft_bsr.training.alast_callback import ALaSTCallback, BudgetRecord, schedule_of
from peft_bsr.training.feature_cache import FeatureCache
from peft_bsr.training.task_data import TaskBatchSampler, TaskDataset, collate_tasks

__all__ = [
    "ALaSTCallback",
    "BudgetRecord",
    "FeatureCache",
    "TaskBatchSampler",
    "TaskDataset",
    "collate_tasks",
    "schedule_of",
]
