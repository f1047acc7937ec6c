"""One page of HTML about one training run, complete in itself."""

from peft_bsr.report.page import write_report
from peft_bsr.report.record import Results, RunRecord

__all__ = ["Results", "RunRecord", "write_report"]
