"""The command `peft-bsr` and its commands, one module each. `peft_bsr_cli` imports the one that is asked for."""
