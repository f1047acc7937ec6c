"""Training: the cache of what frozen leading blocks give, and ALaST's callback."""

from peft_bsr.training.alast_callback import ALaSTCallback, BudgetRecord, schedule_of
from peft_bsr.training.feature_cache import FeatureCache

__all__ = ["ALaSTCallback", "BudgetRecord", "FeatureCache", "schedule_of"]
