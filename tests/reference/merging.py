"""Token merging, literally, in NumPy: one image, lists of patches, loops."""

from __future__ import annotations

import numpy as np


def merge(tokens: np.ndarray, groups: list[list[int]], keep: int) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """Merge `tokens` [M, D], which hold the patches of `groups`, until `keep` are left.

    Returns the tokens, their patches, and at which of the former places each of them stands.
    """
    places = list(range(len(tokens)))
    while len(tokens) > keep:
        count = min(len(tokens) - keep, len(tokens) // 2)
        best = []
        for i in range(0, len(tokens), 2):
            cosines = {
                j: tokens[i] @ tokens[j] / np.linalg.norm(tokens[i]) / np.linalg.norm(tokens[j])
                for j in range(1, len(tokens), 2)
            }
            partner = max(cosines, key=cosines.__getitem__)
            best.append((cosines[partner], i, partner))
        pairs = {i: partner for _, i, partner in sorted(best, key=lambda pair: -pair[0])[:count]}
        left = [j for j in range(len(tokens)) if j not in pairs]
        together = [[j, *(i for i, partner in pairs.items() if partner == j)] for j in left]
        sizes = [len(group) for group in groups]
        tokens = np.stack([sum(sizes[i] * tokens[i] for i in g) / sum(sizes[i] for i in g) for g in together])
        groups = [sorted(patch for i in g for patch in groups[i]) for g in together]
        places = [places[j] for j in left]
    return tokens, groups, places
