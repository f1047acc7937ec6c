"""Files that run without this package: adapters' weights merged, token reduction kept."""

from peft_bsr.exporting.check import ExportReport
from peft_bsr.exporting.files import export

__all__ = ["ExportReport", "export"]
