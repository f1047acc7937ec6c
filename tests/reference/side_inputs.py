"""The alive tokens' part of an attention's side inputs by a literal loop, in plain NumPy."""

from __future__ import annotations

import numpy as np


def alive_tokens(origins: np.ndarray, prefix: int, patches: int, suffix: int) -> list[int | None]:
    """Place of each alive token of one image among all tokens, None for a fused one."""
    tokens: list[int | None] = list(range(prefix))
    for origin in origins:
        tokens.append(prefix + int(origin) if origin < patches else None)
    return tokens + [prefix + patches + place for place in range(suffix)]


def gather_mask(mask: np.ndarray, tokens: list[int | None], prefix: int, visible: object) -> np.ndarray:
    """A mask or bias [N or 1, N] of one head for one image: a fused token is the first special one, or visible."""
    rows = tokens if mask.shape[0] > 1 else [0]
    found = np.empty((len(rows), len(tokens)), dtype=mask.dtype)
    for i, row in enumerate(rows):
        for j, column in enumerate(tokens):
            row_at, column_at = (0 if place is None and prefix else place for place in (row, column))
            is_new = row_at is None or column_at is None
            found[i, j] = visible if is_new else mask[row_at, column_at]
    return found


def gather_table(table: np.ndarray, tokens: list[int | None], first: int, fused: float) -> np.ndarray:
    """A table [rows, d] of one head for one image; its first row is that of the token at the place `first`."""
    found = np.empty((len(tokens), table.shape[1]), dtype=table.dtype)
    for i, token in enumerate(tokens):
        for j in range(table.shape[1]):
            found[i, j] = fused if token is None else table[token - first, j]
    return found
