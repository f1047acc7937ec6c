"""Base classes of methods that train copies or low-rank updates of blocks."""
