"""What every method of this package is to PEFT: a tuner, a configuration, adapter files."""
