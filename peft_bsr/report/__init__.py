"""A self-contained HTML report of a training run."""

from peft_bsr.report.page import write_report
from peft_bsr.report.record import Results, RunRecord

__all__ = ["Results", "RunRecord", "write_report"]
