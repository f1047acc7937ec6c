"""The methods: PEFT tuners built on the engine, one folder each. Every folder here is found and registered."""

from importlib import import_module
from pkgutil import iter_modules

import peft_bsr.tuners.bsr  # noqa: F401  # first: lists of methods begin with it
from peft_bsr.tuners.alast import ALaSTCallback, ALaSTConfig, ALaSTModel, BudgetRecord, schedule_of
from peft_bsr.tuners.base.method import METHODS, MethodInfo, describe_plan, known_method, method_of, register, resolve
from peft_bsr.tuners.base.resolution import Resolution
from peft_bsr.tuners.bsr import BSRConfig, BSRModel, add_task, export_task
from peft_bsr.tuners.losa import LoSAConfig, LoSAModel
from peft_bsr.tuners.synqt import SynQTConfig, SynQTModel

for _folder in iter_modules(__path__):
    import_module(f"{__name__}.{_folder.name}")

__all__ = [
    "METHODS",
    "ALaSTCallback",
    "ALaSTConfig",
    "ALaSTModel",
    "BSRConfig",
    "BSRModel",
    "BudgetRecord",
    "LoSAConfig",
    "LoSAModel",
    "MethodInfo",
    "Resolution",
    "SynQTConfig",
    "SynQTModel",
    "add_task",
    "describe_plan",
    "export_task",
    "known_method",
    "method_of",
    "register",
    "resolve",
    "schedule_of",
]
