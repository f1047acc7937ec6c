"""HTML of the tabs: input text is escaped, pictures are embedded."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from peft_bsr.app.kept import KeptView
from peft_bsr.app.planning import accuracies_of
from peft_bsr.app.results import Point, pareto
from peft_bsr.cost import BudgetPlan

_PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "library")  # fields of an Estimate
_NAMES = (*_PARTS[:-1], "CUDA's libraries")
_ZOOM = 448  # pixels of a picture, at least


def error_html(error: BaseException) -> str:
    """An error message."""
    return f'<p class="wrong" role="alert">{escape(str(error))}</p>'


def plans_html(plans: Sequence[BudgetPlan], depth: int) -> str:
    """The plans, each with a bar of its memory; all bars have one scale.

    Args:
        plans: At least one plan, all for one question.
        depth: Number of blocks of the model.
    """
    most = max(plan.estimate.total_bytes for plan in plans)
    shown = [n for n, part in enumerate(_PARTS) if any(getattr(p.estimate, f"{part}_bytes") for p in plans)]
    key = "".join(f'<li class="k{n}"><i></i>{escape(_NAMES[n])}</li>' for n in shown)
    items = "".join(f"<li>{_plan(number, plan, most, depth)}</li>" for number, plan in enumerate(plans, 1))
    return f'<ul class="key">{key}</ul><ol class="plans">{items}</ol>'


def _plan(number: int, plan: BudgetPlan, most: int, depth: int) -> str:
    estimate = plan.estimate
    sizes = [
        (n, name, getattr(estimate, f"{part}_bytes")) for n, (part, name) in enumerate(zip(_PARTS, _NAMES, strict=True))
    ]
    words = ", ".join(f"{name} {_mib(size)}" for _, name, size in sizes if size)
    bar = "".join(
        f'<span class="k{n}" style="width:{100 * s / most:.2f}%" title="{x}"></span>' for n, x, s in sizes if s
    )
    facts = [
        f"{estimate.training_flops / estimate.batch_size / 1e9:.3g} GFLOPs per image",
        f"{estimate.trainable_parameters / 1e6:.3g} M trained",
        *([f"{_mib(estimate.host_bytes)} offloaded to the CPU"] if estimate.host_bytes else []),
    ]
    lines = [" · ".join(facts)]
    if found := accuracies_of(plan, depth):
        scores = ", ".join(f"{100 * accuracy:.1f} % on {task}" for task, accuracy in found.items())
        lines.append(f"Measured with a ViT-Ti (third tab): {scores}")
    lines += [f"declined: {reason}" for reason in plan.declined]
    return (
        f"<h3>{number}. {_mib(estimate.total_bytes)}. Gives up: {escape(plan.gives_up)}</h3>"
        f'<div class="bar" role="img" aria-label="{escape(words)}">{bar}</div>'
        f'<p class="quiet">{escape(words)}</p>' + "".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)
    )


def kept_html(view: KeptView) -> str:
    """The image, and the patches that are kept after each reduction."""
    figures = [_figure(view.image, f"all {view.all_tokens} tokens")]
    for one, tokens in zip(view.kept, view.tokens, strict=True):
        if one.dropped_mass is None:
            fate = "similar ones merged"
        else:
            fate = "fused into one token" if one.is_fused else "dropped"
            fate += f": {one.dropped_mass[0]:.0%} of the attention"
        about = f"after block {one.block}: {one.share:.0%} of the patches, {tokens} tokens; {fate}"
        figures.append(_figure(one.pictures[0], about))
    share = view.flops / view.all_flops
    facts = f"forward {view.flops / 1e9:.2f} GFLOPs, {share:.0%} of {view.all_flops / 1e9:.2f} with all tokens"
    return f'<p class="facts">{facts}</p><div class="kept">{"".join(figures)}</div>'


def _figure(picture: np.ndarray, caption: str) -> str:
    image, stream = Image.fromarray((picture * 255).round().astype(np.uint8)), io.BytesIO()
    factor = math.ceil(_ZOOM / max(image.size))
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def chart_html(chosen: Sequence[Point], axis: str, methods: Sequence[str]) -> str:
    """Chart of accuracy over a cost: each point is a button that shows its experiment and the command that measured it.

    Args:
        chosen: Points of one set of images.
        axis: One of `AXES`.
        methods: All methods; the index of a point's method selects its colour.
    """
    if not chosen:
        return '<p class="quiet" role="status">No experiment matches: choose more methods or more memory.</p>'
    front = pareto(chosen, axis)
    costs, scores = [point.cost(axis) for point in chosen], [100 * point.accuracy for point in chosen]
    x_low, x_high = min(costs) / 1.1, max(costs) * 1.1
    y_low, y_high = math.floor(min(scores) - 0.5), math.ceil(max(scores) + 0.5)

    def at(x: float, y: float) -> tuple[float, float]:
        return math.log(x / x_low) / math.log(x_high / x_low), (y - y_low) / (y_high - y_low)

    places = [at(point.cost(axis), 100 * point.accuracy) for point in front]
    steps = [f"{100 * x:.2f},{100 - 100 * y:.2f}" for x, y in places]
    line = f'<polyline points="{" ".join(steps)}"/>'
    line = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{line}</svg>'
    x_ticks = [base * 10.0**power for power in range(-2, 6) for base in (1, 2, 5)]
    every = max(1, math.ceil((y_high - y_low) / 8))
    ticks = [_tick("x", f"{x:g}", *at(x, y_low)) for x in x_ticks if x_low <= x <= x_high]
    ticks += [_tick("y", f"{y}", *at(x_low, y)) for y in range(y_low, y_high + 1, every)]
    marks = "".join(
        _mark(point, axis, methods.index(point.method), point in front, *at(point.cost(axis), 100 * point.accuracy))
        for point in sorted(chosen, key=lambda point: (point in front, point.cost(axis)))
    )
    first = '<div class="about first quiet">Details of a point appear here: hover, tap, or move with the tab key. '
    first += "The dashed line joins the points that no other point beats.</div>"
    used = [method for method in methods if any(point.method == method for point in chosen)]
    key = "".join(f"<li {_colour(methods.index(m))}><i></i>{escape(m)}</li>" for m in used)
    return (
        f'<ul class="key">{key}</ul><div class="quiet">accuracy, %</div><div class="chart">{line}{"".join(ticks)}'
        f'<div class="axis">{escape(axis)}</div>{first}{marks}</div>{_table(chosen, axis, front)}'
    )


def _mark(point: Point, axis: str, number: int, is_front: bool, x: float, y: float) -> str:
    scores = ", ".join(f"{100 * accuracy:.1f}" for accuracy in point.accuracies)
    name = f"{point.experiment}: {100 * point.accuracy:.1f} %, {axis} {point.cost(axis):.3g}"
    about = (
        f"<p><b>{escape(point.experiment)}</b>: {100 * point.accuracy:.1f} % on {escape(point.task)} "
        f"(seeds: {scores}); "
        f"peak {_mib(point.peak_bytes)}, step {point.step_to_full:.2f} of that of full fine-tuning</p>"
        f"<code>{escape(point.command)}</code>"
    )
    colour = _colour(number, f"--x:{x:.4f};--y:{y:.4f}", f"point at{' front' if is_front else ''}")
    return f'<button type="button" {colour} aria-label="{escape(name)}"></button><div class="about">{about}</div>'


def _table(chosen: Sequence[Point], axis: str, front: Sequence[Point]) -> str:
    rows = "".join(
        f"<tr{' class=front-row' if point in front else ''}><td>{escape(point.experiment)}</td>"
        f"<td>{100 * point.accuracy:.1f}</td><td>{point.cost(axis):.3g}</td>"
        f"<td><code>{escape(point.command)}</code></td></tr>"
        for point in sorted(chosen, key=lambda point: -point.accuracy)
    )
    head = f"<tr><th>experiment</th><th>accuracy, %</th><th>{escape(axis)}</th><th>command</th></tr>"
    table = f'<div class="scroll" tabindex="0" role="region" aria-label="points"><table>{head}{rows}</table></div>'
    return f"<details><summary>All {len(chosen)} points as a table</summary>{table}</details>"


def _colour(number: int, style: str = "", classes: str = "") -> str:
    """HTML attributes for one of nine colours that differ clearly in the light and the dark theme."""
    hue = (211 + 40 * number) % 360
    return f'class="{classes}" style="{style};--c:hsl({hue} 62% var(--light))"'


def _tick(kind: str, text: str, x: float, y: float) -> str:
    return f'<span class="tick at {kind}" style="--x:{x:.4f};--y:{y:.4f}">{text}</span>'


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**20:.2f} MiB"


__all__ = ["chart_html", "error_html", "kept_html", "plans_html"]
