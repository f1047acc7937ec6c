"""Writing a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure


def save_figure(figure: Figure, path: str | Path, dpi: int) -> Path:
    """Write a picture to exactly this path.

    Args:
        figure: The picture.
        path: File to write. Its extension sets the format; without one it is PNG.
        dpi: Dots per inch.

    Returns:
        `path`.
    """
    path = Path(path)
    figure.savefig(path, dpi=dpi, format=path.suffix[1:] or "png")  # without `format`, matplotlib appends an extension
    return path


__all__ = ["save_figure"]
