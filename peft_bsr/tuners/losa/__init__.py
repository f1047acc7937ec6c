"""LoSA, Low-rank Side Adaptation (arXiv 2402.02887)."""

from peft_bsr.tuners.base.method import MethodInfo, register
from peft_bsr.tuners.losa.config import LoSAConfig
from peft_bsr.tuners.losa.description import describe
from peft_bsr.tuners.losa.model import LoSAModel

register(
    MethodInfo(
        name="losa",
        title="Low-rank Side Adaptation (LoSA)",
        paper="arXiv 2402.02887",
        config=LoSAConfig,
        tuner=LoSAModel,
        learning_rates={None: 3e-3},
        describe=describe,
    )
)

__all__ = ["LoSAConfig", "LoSAModel"]
