"""Small charts as inline SVG, with the page's colours, so that they follow the light and dark themes.

Every chart is 420 units wide and scales with its column; text is 12 units high, which is 10 pixels on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 46, 8, 8, 38
_Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, _Points], x_label: str, y_label: str, mark: float | None = None) -> str:
    """Lines over a common axis.

    Args:
        series: Name -> (x, y), ascending in x. A single point is drawn as a dot.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        mark: x of a vertical line. Default None: no line.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    top, low = _nice(max(ys)), min(0.0, min(ys))
    first, last = min(xs), max(xs)
    height = 200

    def at(x: float, y: float) -> tuple[float, float]:
        share = 0.5 if last == first else (x - first) / (last - first)
        return _x(share), _y((y - low) / ((top - low) or 1), height)

    marks = []
    if mark is not None:
        x, _ = at(min(max(mark, first), last), low)
        marks.append(f'<path class="mark" d="M{x:.1f} {_y(0, height):.1f}V{_y(1, height):.1f}"/>')
    for number, (name, points) in enumerate(series.items()):
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
        marks.append(f'<path class="line s{number}" d="{path}"><title>{escape(name)}</title></path>')
        if len(points) <= 20:
            marks += [f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    ticks = [(_x(0.0), first), (_x(1.0), last)] if last > first else [(_x(0.5), first)]
    below = "".join(_text(x, height - 22, f"{value:g}", _anchor(x)) for x, value in ticks)
    return _svg(height, _grid(low, top, height) + below + "".join(marks), x_label, y_label)


def bar_chart(
    values: Sequence[float],
    y_label: str,
    kinds: Sequence[str] | None = None,
    x_label: str = "block",
    last: str | None = None,
    top: float | None = None,
) -> str:
    """A bar chart with one bar per block.

    Args:
        values: Heights of the bars.
        y_label: Label of the y axis.
        kinds: CSS class of each bar. Default None: the same for all.
        x_label: Label of the x axis.
        last: Name of the last bar, if it is not a block.
        top: Smallest end of the y axis. Default None: the largest value.
    """
    top = _nice(max(values) if top is None else top)
    height, step = 170, 1 / len(values)
    marks, names = [], [str(i) for i in range(len(values))]
    if last is not None:
        names[-1] = last
    every = math.ceil(len(values) / 13)
    for index, value in enumerate(values):
        x, y = _x(step * (index + 0.12)), _y(value / top, height)
        kind = kinds[index] if kinds else "s0"
        bar = max(_y(0, height) - y, 0.0)
        marks.append(
            f'<rect class="bar {kind}" x="{x:.1f}" y="{y:.1f}" width="{_x(step * 0.76) - _LEFT:.1f}" '
            f'height="{bar:.1f}"><title>{escape(names[index])}: {value:.3g}</title></rect>'
        )
        is_last = index == len(values) - 1
        if (index % every == 0 and not (last and index > len(values) - 1 - every)) or (last and is_last):
            middle = _x(step * (index + 0.5))
            marks.append(
                _text(middle, height - 22, names[index], "end" if last and is_last and every > 1 else "middle")
            )
    return _svg(height, _grid(0.0, top, height) + "".join(marks), x_label, y_label)


def heat_map(
    rows: Sequence[Sequence[float]], colour: Callable[[float], str], ends: tuple[int, int], x_label: str, y_label: str
) -> str:
    """A heat map with the first row at the bottom.

    Args:
        rows: Rows of equal length; more than 200 columns are thinned out.
        colour: Value -> fill colour.
        ends: Labels of the first and the last column.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
    """
    cell = max(6.0, min(16.0, 190 / len(rows)))
    height = int(cell * len(rows)) + _TOP + _BOTTOM + 14
    length = len(rows[0])
    columns = range(0, length, math.ceil(length / 200))
    step = 1 / len(columns)
    marks = []
    for index, row in enumerate(rows):
        y = height - _BOTTOM - cell * (index + 1)
        for place, column in enumerate(columns):
            marks.append(
                f'<rect x="{_x(step * place):.1f}" y="{y:.1f}" width="{_x(step) - _LEFT + 0.3:.1f}" '
                f'height="{cell + 0.3:.1f}" style="fill:{colour(row[column])}"/>'
            )
        if index % math.ceil(14 / cell) == 0:
            marks.append(_text(_LEFT - 6, y + cell / 2 + 4, str(index), "end"))
    first, last = (str(end) for end in ends)
    below = _text(_LEFT, height - 22, first, "start") + _text(_WIDTH - _RIGHT, height - 22, last, "end")
    return _svg(height, "".join(marks) + below, x_label, y_label)


def _svg(height: int, content: str, x_label: str, y_label: str) -> str:
    return (
        f'<svg viewBox="0 -16 {_WIDTH} {height + 16}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">'
        f"{_text(0, -4, y_label, 'start')}{content}"
        f"{_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 5, x_label, 'middle')}</svg>"
    )


def _grid(low: float, top: float, height: int) -> str:
    lines = []
    for share in (0.0, 0.5, 1.0):
        y = _y(share, height)
        lines.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        lines.append(_text(_LEFT - 6, y + 4, f"{low + share * (top - low):.3g}", "end"))
    return "".join(lines)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _anchor(x: float) -> str:
    return "start" if x < _LEFT + 1 else "end" if x > _WIDTH - _RIGHT - 1 else "middle"


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float, height: int) -> float:
    return height - _BOTTOM - share * (height - _TOP - _BOTTOM)


def _nice(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    return next(s * scale for s in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if s * scale >= value * (1 - 1e-9))


__all__ = ["bar_chart", "heat_map", "line_chart"]
