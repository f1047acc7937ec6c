"""What PEFT sees: thin tuners over the engine."""

from peft_bsr.tuners.bsr import BSRConfig, BSRModel
from peft_bsr.tuners.synqt import SynQTConfig, SynQTModel

__all__ = ["BSRConfig", "BSRModel", "SynQTConfig", "SynQTModel"]
