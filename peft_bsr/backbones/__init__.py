"""What the model is: the only package that knows model families. `probe_column(model)` returns a `Column`."""

from peft_bsr.backbones.column import Anatomy, Column
from peft_bsr.backbones.probe import probe_column
from peft_bsr.backbones.scoring import ScoringConfig, unscored

__all__ = ["Anatomy", "Column", "ScoringConfig", "probe_column", "unscored"]
