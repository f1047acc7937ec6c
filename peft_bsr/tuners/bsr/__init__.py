"""BSR, Block Selective Reprogramming (arXiv 2405.10951)."""

from peft_bsr.tuners.base.method import MethodInfo, register
from peft_bsr.tuners.bsr.config import BSRConfig
from peft_bsr.tuners.bsr.description import describe
from peft_bsr.tuners.bsr.model import BSRModel
from peft_bsr.tuners.bsr.tasks import add_task, export_task

register(
    MethodInfo(
        name="bsr",
        title="Block Selective Reprogramming (BSR)",
        paper="arXiv 2405.10951",
        config=BSRConfig,
        tuner=BSRModel,
        learning_rates={"full": 1e-3, "lora": 3e-3},
        describe=describe,
    )
)

__all__ = ["BSRConfig", "BSRModel", "add_task", "export_task"]
