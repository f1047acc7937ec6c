"""Files that run without this package: adapters' weights merged, token reduction kept."""

from peft_bsr.export.check import ExportReport
from peft_bsr.export.export import export

__all__ = ["ExportReport", "export"]
