"""Tokens that do not depend on the image: the prefix and the suffix of the sequence."""

from __future__ import annotations

from torch import Tensor

from peft_bsr.errors import UnsupportedModelError


def count_special(embeddings: Tensor) -> tuple[int, int]:
    """Numbers of tokens at the front and at the end that are equal for both images."""
    shared = (embeddings[0] == embeddings[1]).all(dim=-1).tolist()
    if all(shared):
        raise UnsupportedModelError("its first block gets the same tokens for two different images")
    num_prefix, num_suffix = shared.index(False), shared[::-1].index(False)
    if any(shared[num_prefix : len(shared) - num_suffix]):
        special = [i for i, is_special in enumerate(shared) if is_special]
        raise UnsupportedModelError(f"tokens that do not depend on the image are among the patches, at {special}")
    return num_prefix, num_suffix


__all__ = ["count_special"]
