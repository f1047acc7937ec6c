"""What helps to train: the cache of the frozen blocks' outputs."""

from peft_bsr.training.feature_cache import FeatureCache

__all__ = ["FeatureCache"]
