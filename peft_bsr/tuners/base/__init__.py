"""What all methods share: tuner, configuration, and adapter files."""
