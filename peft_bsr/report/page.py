"""A training run as one HTML page with inline style, charts and pictures, without network access."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from peft_bsr.cost import cost_rows
from peft_bsr.report.charts import bar_chart, heat_map, line_chart
from peft_bsr.report.record import Results, RunRecord
from peft_bsr.report.style import STYLE
from peft_bsr.tuners.base.description import describe_picture

_SIDE = 224  # pixels of a picture on the page, at most
_NOT_ALONE = {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def write_report(record: RunRecord, path: str | Path) -> Path:
    """Write the page.

    Args:
        record: The run.
        path: File to write, `.html`.

    Returns:
        `path`.
    """
    sections = [_plan(record), _curves(record), *_results(record.results), _peak(record), _memory(record)]
    sections += [_costs(record), _kept(record), _budgets(record), _settings(record)]
    headline = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in record.headline.items())
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(record.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(record.title)}</h1>\n"
        + (f'<dl class="headline">{headline}</dl>\n' if headline else "")
        + "<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _plan(record: RunRecord) -> str:
    spec, plan = record.spec, record.plan
    if spec is None or plan is None:
        return _section("What trains", f"<p>{escape(' '.join(record.description))}</p>") if record.description else ""
    tokens = [mlp for _, mlp in plan.token_counts(spec.num_tokens, spec.num_special)]
    names = {"s0": "trains", "s1": "frozen, passes gradients", "frozen": "frozen, keeps nothing"}
    kinds = ["s0" if b.trained else "s1" if b.in_graph else "frozen" for b in plan.blocks]
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in record.description)
    chart = bar_chart(tokens, "tokens in the block's MLP", kinds)
    key = _key({kind: name for kind, name in names.items() if kind in kinds})
    return _section("What trains", f"<ul>{items}</ul>{chart}{key}")


def _curves(record: RunRecord) -> str:
    charts = []

    def points(key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in record.log_history if math.isfinite(entry.get(key, math.nan))]

    scored = sorted({key for entry in record.log_history for key in entry if key.startswith("eval_")} - _NOT_ALONE)
    kept = record.kept_step if any(step == record.kept_step for step, _ in points("eval_loss")) else None
    kinds = {"loss": {"training": "loss", "validation": "eval_loss"}}
    kinds |= {key.removeprefix("eval_").replace("_", " "): {"validation": key} for key in scored}
    for label, keys in (kinds | {"learning rate": {"": "learning_rate"}}).items():
        shown = {name: points(key) for name, key in keys.items() if points(key)}
        if shown:
            key = {f"s{number}": name for number, name in enumerate(shown) if name}
            key |= {"mark": f"kept: step {kept}"} if kept is not None else {}
            charts.append(f"<div>{line_chart(shown, 'optimizer step', label, kept)}{_key(key)}</div>")
    return _section("Training", f'<div class="stack">{"".join(charts)}</div>') if charts else ""


def _results(results: Results | None) -> list[str]:
    if results is None:
        return []
    parts = [f"<h3>{escape(title)}</h3>{_table(head, rows)}" for title, head, rows in results.tables]
    sections = [_section(results.title, "".join(parts))] if parts else []
    note = f'<p class="quiet">{escape(results.note)}</p>' if results.note else ""
    if results.confusion is not None:
        source = f"data:image/png;base64,{base64.b64encode(results.confusion.read_bytes()).decode()}"
        note = f'<img class="chart" src="{source}" alt="confusion matrix">{note}'
    if note:
        sections.append(_section("Confusion matrix", note))
    if results.worst:
        figures = "".join(_figure(image, text) for image, text in results.worst)
        sections.append(_section("Images with the highest loss", f'<div class="gallery">{figures}</div>', True))
    return sections


def _peak(record: RunRecord) -> str:
    if not record.memory:
        return ""
    rows = [(name, f"{size / 2**20:.0f}") for name, size in record.memory.items()]
    return _section("Peak memory", f'{_table(("", "MiB"), rows)}<p class="quiet">{escape(record.memory_note)}</p>')


def _memory(record: RunRecord) -> str:
    if not record.saved_by_block:
        return ""
    found = {name: [size / 2**20 for size in parts.values()] for name, parts in record.saved_by_block.items()}
    found = {name: [*blocks, embeddings + head] for name, (embeddings, *blocks, head) in found.items()}
    top = max(max(values) for values in found.values())
    charts = []
    for number, (name, values) in enumerate(found.items()):
        chart = bar_chart(values, "MiB per image", [f"s{number}"] * len(values), last="rest", top=top)
        charts.append(f"<div>{chart}{_key({f's{number}': f'{name}: {sum(values):.3g} MiB in all'})}</div>")
    note = '<p class="quiet">Activations that each block keeps for backward, for one image.</p>'
    return _section("Memory over the blocks", f'{note}<div class="pair">{"".join(charts)}</div>', True)


def _costs(record: RunRecord) -> str:
    if not record.costs:
        return ""
    note = "Saved activations and FLOPs of a step are per image; the ratio is the time relative to the first row."
    text = f'{_table(*cost_rows(record.costs))}<p class="quiet">{note} {escape(record.conditions)}</p>'
    return _section("Compared with full fine-tuning", text, True)


def _kept(record: RunRecord) -> str:
    if not record.kept or record.images is None:
        return ""
    figures = []
    for row, image in enumerate(record.images):
        title = record.titles[row] if record.titles else "input"
        figures.append(_figure(_picture(image), title))
        for k in record.kept:
            figures.append(_figure(_picture(k.pictures[row]), f"block {k.block}: {k.share:.0%}", is_named=row == 0))
    columns = f"grid-template-columns: repeat({len(record.kept) + 1}, minmax(0, 1fr))"
    note = "" if record.plan is None else f'<p class="quiet">{describe_picture(record.plan)}.</p>'
    return _section("Kept tokens", f'{note}<div class="kept" style="{columns}">{"".join(figures)}</div>', True)


def _budgets(record: RunRecord) -> str:
    if not record.budgets:
        return ""
    depth = len(record.budgets[0].budgets)
    budgets = [[entry.budgets[block] for entry in record.budgets] for block in range(depth)]
    trained = [[float(block in entry.selected) for entry in record.budgets] for block in range(depth)]
    low, high = min(map(min, budgets)), max(map(max, budgets))

    def shade(value: float) -> str:
        share = (value - low) / ((high - low) or 1)
        return f"rgba(var(--hot), {0.12 + 0.88 * share:.2f})"

    def choice(value: float) -> str:
        return f"rgba(var(--hot), {0.9 if value else 0.12})"

    ends = record.budgets[0].step, record.budgets[-1].step
    title = f"budget of each block, {low:.2f} (pale) to {high:.2f} (strong)"
    charts = (
        heat_map(budgets, shade, ends, "optimizer step", title),
        heat_map(trained, choice, ends, "optimizer step", "blocks that trained (strong)"),
    )
    both = "".join(f"<div>{chart}</div>" for chart in charts)
    return _section("Budgets", f'<div class="pair">{both}</div>', True)


def _settings(record: RunRecord) -> str:
    def table(values: Mapping[str, object]) -> str:
        rows = "".join(f"<tr><td>{escape(str(n))}</td><td>{escape(str(v))}</td></tr>" for n, v in values.items())
        return f'<div class="scroll"><table class="facts">{rows}</table></div>'

    parts = [f"<pre>{escape(record.command)}</pre>"] if record.command else []
    tables = [table(values) for values in (record.settings, record.versions) if values]
    if tables:
        parts.append(f'<div class="pair">{"".join(tables)}</div>')
    return _section("How it was made", "".join(parts), True) if parts else ""


def _section(title: str, content: str, is_wide: bool = False) -> str:
    kind = ' class="wide"' if is_wide else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{content}</section>"


def _key(names: Mapping[str, str]) -> str:
    items = "".join(f'<li><i class="{kind}"></i>{escape(name)}</li>' for kind, name in names.items())
    return f'<ul class="key">{items}</ul>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table></div>'


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _figure(image: Image.Image, caption: str, is_named: bool = True) -> str:
    picture = image.copy()
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    text = escape(caption) if is_named else "&nbsp;"  # a line all the same: pictures of a row stand level
    return f'<figure><figcaption>{text}</figcaption><img src="{source}" alt="{escape(caption)}"></figure>'


__all__ = ["write_report"]
