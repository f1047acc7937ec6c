"""ALaST, Adaptive Layer Selection (arXiv 2408.08670)."""

from peft_bsr.tuners.alast.callback import ALaSTCallback, BudgetRecord, schedule_of
from peft_bsr.tuners.alast.config import ALaSTConfig
from peft_bsr.tuners.alast.description import describe
from peft_bsr.tuners.alast.model import ALaSTModel
from peft_bsr.tuners.base.method import MethodInfo, register

register(
    MethodInfo(
        name="alast",
        title="Adaptive Layer Selection (ALaST)",
        paper="arXiv 2408.08670",
        config=ALaSTConfig,
        tuner=ALaSTModel,
        learning_rates={"full": 3e-4, "lora": 1e-3},
        describe=describe,
        callbacks=lambda: [ALaSTCallback()],
    )
)

__all__ = ["ALaSTCallback", "ALaSTConfig", "ALaSTModel", "BudgetRecord", "schedule_of"]
