"""Upper ends of settings: a file from elsewhere may ask for anything."""

LARGEST_SIZE = 2**16
"""Of ranks, bottlenecks, queries, experts and multiples."""
MOST_CLASSES = 2**18
"""Outputs of a head; ImageNet-21k has 21 843."""
LARGEST_NUMBER = 1e6
"""Of scales and weights."""
