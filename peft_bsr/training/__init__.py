"""Training: the proof that it trains, the cache of frozen leading blocks, ALaST's callback, several tasks' data."""

from peft_bsr.training.alast_callback import ALaSTCallback, BudgetRecord, schedule_of
from peft_bsr.training.compiling import compile
from peft_bsr.training.feature_cache import FeatureCache
from peft_bsr.training.task_data import TaskBatchSampler, TaskDataset, collate_tasks
from peft_bsr.training.trainability import TrainabilityCallback, verify_trainability

__all__ = [
    "ALaSTCallback",
    "BudgetRecord",
    "FeatureCache",
    "TaskBatchSampler",
    "TaskDataset",
    "TrainabilityCallback",
    "collate_tasks",
    "compile",
    "schedule_of",
    "verify_trainability",
]
