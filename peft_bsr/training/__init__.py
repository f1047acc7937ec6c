"""Training: building blocks for transformers' Trainer, and a check that an adapter trains."""

from peft_bsr.training.compiling import compile
from peft_bsr.training.defaults import LEARNING_RATES, WARMUP_SHARE, default_learning_rate
from peft_bsr.training.ema import TrainedEMA
from peft_bsr.training.feature_cache import FeatureCache
from peft_bsr.training.groups import param_groups
from peft_bsr.training.learning_rate import LearningRateSweep, find_learning_rate
from peft_bsr.training.losses import TrainingLoss, balanced_weights
from peft_bsr.training.mixup import MixupDataset
from peft_bsr.training.non_finite import NonFiniteLossCallback
from peft_bsr.training.task_data import TaskBatchSampler, TaskDataset, collate_tasks
from peft_bsr.training.trainability import TrainabilityCallback, verify_trainability
from peft_bsr.tuners import ALaSTCallback, BudgetRecord, schedule_of

__all__ = [
    "LEARNING_RATES",
    "WARMUP_SHARE",
    "ALaSTCallback",
    "BudgetRecord",
    "FeatureCache",
    "LearningRateSweep",
    "MixupDataset",
    "NonFiniteLossCallback",
    "TaskBatchSampler",
    "TaskDataset",
    "TrainabilityCallback",
    "TrainedEMA",
    "TrainingLoss",
    "balanced_weights",
    "collate_tasks",
    "compile",
    "default_learning_rate",
    "find_learning_rate",
    "param_groups",
    "schedule_of",
    "verify_trainability",
]
