"""BSR, Block Selective Reprogramming (arXiv 2405.10951)."""

from peft_bsr.registration import register_method
from peft_bsr.tuners.bsr.config import BSRConfig
from peft_bsr.tuners.bsr.model import BSRModel
from peft_bsr.tuners.bsr.tasks import add_task, export_task

__all__ = ["BSRConfig", "BSRModel", "add_task", "export_task"]

register_method("bsr", BSRConfig, BSRModel)
