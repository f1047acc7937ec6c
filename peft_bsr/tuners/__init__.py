"""What PEFT sees: thin tuners over the engine."""

from peft_bsr.tuners.bsr import BSRConfig, BSRModel

__all__ = ["BSRConfig", "BSRModel"]
