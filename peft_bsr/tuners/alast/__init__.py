"""ALaST, Adaptive Layer Selection (arXiv 2408.08670)."""

from peft_bsr.registration import register_method
from peft_bsr.tuners.alast.config import ALaSTConfig
from peft_bsr.tuners.alast.model import ALaSTModel

__all__ = ["ALaSTConfig", "ALaSTModel"]

register_method("alast", ALaSTConfig, ALaSTModel)
