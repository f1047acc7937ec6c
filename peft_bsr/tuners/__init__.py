"""What PEFT sees: one folder for each method, thin over the engine."""

from peft_bsr.tuners.alast import ALaSTConfig, ALaSTModel
from peft_bsr.tuners.bsr import BSRConfig, BSRModel
from peft_bsr.tuners.synqt import SynQTConfig, SynQTModel

__all__ = ["ALaSTConfig", "ALaSTModel", "BSRConfig", "BSRModel", "SynQTConfig", "SynQTModel"]
