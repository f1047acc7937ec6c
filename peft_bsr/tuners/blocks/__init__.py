"""What methods share that train copies or low-rank updates of blocks."""
