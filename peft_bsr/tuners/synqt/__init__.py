"""SynQT, Synthesized Query Tuning (arXiv 2407.06964)."""

from peft_bsr.registration import register_method
from peft_bsr.tuners.synqt.config import SynQTConfig
from peft_bsr.tuners.synqt.model import SynQTModel

__all__ = ["SynQTConfig", "SynQTModel"]

register_method("synqt", SynQTConfig, SynQTModel)
