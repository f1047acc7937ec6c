"""The command `peft-bsr`. Its commands' modules are imported when they are asked for."""

from peft_bsr.cli.entry import main

__all__ = ["main"]
