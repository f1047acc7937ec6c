"""Export to files that run without this package, with merged weights and token reduction."""

from peft_bsr.exporting.check import ExportReport
from peft_bsr.exporting.description import problem_type_of, processor_of
from peft_bsr.exporting.files import export
from peft_bsr.exporting.formats import open_onnx

__all__ = ["ExportReport", "export", "open_onnx", "problem_type_of", "processor_of"]
