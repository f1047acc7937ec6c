"""SynQT, Synthesized Query Tuning (arXiv 2407.06964)."""

from peft_bsr.tuners.base.method import MethodInfo, register
from peft_bsr.tuners.synqt.config import SynQTConfig
from peft_bsr.tuners.synqt.description import describe
from peft_bsr.tuners.synqt.model import SynQTModel

register(
    MethodInfo(
        name="synqt",
        title="Synthesized Query Tuning (SynQT)",
        paper="arXiv 2407.06964",
        config=SynQTConfig,
        tuner=SynQTModel,
        learning_rates={None: 1e-2},
        describe=describe,
    )
)

__all__ = ["SynQTConfig", "SynQTModel"]
