"""The page: gradio components and their event handlers. The other modules of this package do the computation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import of gradio, which uses the network
import gradio as gr
from gradio.events import Dependency
from PIL import Image

from peft_bsr.app.html import chart_html, error_html, kept_html, plans_html
from peft_bsr.app.kept import PHOTOGRAPHS, keep, local_models, photograph, read_blocks
from peft_bsr.app.models import KNOWN, costs_of
from peft_bsr.app.planning import CARDS, USABLE, Question, fill, known_plans, plans_of, python_of, shell_of
from peft_bsr.app.results import AXES, choose, conditions, points
from peft_bsr.cli.memory import OPTIMIZERS, PRECISIONS
from peft_bsr.cost import BudgetPlan
from peft_bsr.errors import PeftBsrError

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
THEME = gr.themes.Default(primary_hue="teal", font=_SANS, font_mono=_MONO).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
)
_LANE: dict[str, object] = {"concurrency_limit": 1, "concurrency_id": "torch", "trigger_mode": "always_last"}
_KEPT_SECONDS = 600  # maximum lifetime of an uploaded file


@dataclass
class _Asked:
    """A question of the planner as it was asked, what the chosen plan gives up, and whether all plans are shown."""

    values: tuple[Any, ...]
    chosen: str | None = None
    is_planned: bool = False


_latest: dict[str | None, _Asked] = {}  # session -> its latest question
_T = TypeVar("_T")


def make_page() -> gr.Blocks:
    """The app with its three tabs, not yet served."""
    with gr.Blocks(title="peft_bsr", analytics_enabled=False, delete_cache=(60, _KEPT_SECONDS)) as page:
        gr.Markdown("# What fits, what is kept, what it costs\nMemory-efficient fine-tuning of vision transformers.")
        with gr.Tab("What fits"):
            fills = _plans_tab(page)
        with gr.Tab("What is kept"):
            _kept_tab(fills)
        with gr.Tab("What it costs and reaches"):
            _results_tab(page)
        page.unload(_forget)
    return page


def _plans_tab(page: gr.Blocks) -> list[Dependency]:
    """Make the tab; returns the events that go on estimating in the background."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            source = gr.Dropdown(
                [*KNOWN], label="Model", info="or any Hub id or folder", allow_custom_value=True, elem_id="plans-model"
            )
            card = gr.Dropdown(["", *CARDS], label="Card", info=f"{USABLE:.0%} of it is used")
            memory = gr.Slider(0.25, 96, 8, step=0.25, label="Memory, GiB")
            batch = gr.Number(32, label="Images a step", precision=0, minimum=1)
            with gr.Accordion("More", open=False):
                size = gr.Number(0, label="Image size, pixels", info="0: the model's", precision=0, minimum=0)
                labels = gr.Number(10, label="Classes", precision=0, minimum=1)
                optimizer = gr.Dropdown([*OPTIMIZERS], label="Optimizer")
                precision = gr.Radio([*PRECISIONS], value="fp32", label="Precision")
                device = gr.Radio(["cpu", "cuda"], value="cpu", label="Device")
                compiled = gr.Checkbox(False, label="torch.compile", info="10 to 30 seconds per plan")
            button = gr.Button("Plan", variant="primary")
        with gr.Column(scale=2, min_width=320):
            found = gr.HTML(elem_id="plans")
            number = gr.Dropdown([], label="Lines that run plan", visible=False)
            shell = gr.Code(language="shell", label="Shell", lines=2, max_lines=8, wrap_lines=True)
            python = gr.Code(language="python", label="Python", lines=6, max_lines=16, wrap_lines=True)
    asked = [source, memory, batch, size, optimizer, precision, compiled, device, labels]
    card.input(_of_card, [card, memory, device], [memory, device], show_progress="hidden")
    shown = [found, number, shell, python]
    fills = []
    for trigger in (button.click, memory.change, page.load):
        noted = trigger(_ask, asked, shown, queue=False, show_progress="hidden")
        planned = noted.then(_plan, None, shown, **_LANE)
        fills.append(planned.success(_fill, None, None, show_progress="hidden", **_LANE))
    number.input(_lines, number, [shell, python], queue=False, show_progress="hidden")
    return fills


def _of_card(card: str, memory: float, device: str) -> tuple[float, str]:
    return (USABLE * CARDS[card], "cuda") if card else (memory, device)


def _ask(request: gr.Request, *values: Any) -> tuple[object, ...]:
    """Note the session's question and show what is known; what runs for its last question goes on with this one."""
    before = _latest.get(request.session_hash)
    asked = _latest[request.session_hash] = _Asked(values, before.chosen if before else None)
    with suppress(PeftBsrError, OSError):  # `_plan` shows it
        question = Question(*values)
        if plans := known_plans(question):
            return _shown(question, plans, asked.chosen)
    return (gr.skip(),) * 4


def _forget(request: gr.Request) -> None:
    _latest.pop(request.session_hash, None)


def _plan(request: gr.Request) -> Iterator[tuple[object, ...]]:
    while (asked := _latest.get(request.session_hash)) and not asked.is_planned:
        yield from _while_latest(asked, _answers(asked), request)


def _answers(asked: _Asked) -> Iterator[tuple[object, ...]]:
    try:
        question = Question(*asked.values)
        for plans in plans_of(question):
            yield _shown(question, plans, asked.chosen) if plans else (gr.skip(),) * 4
    except (PeftBsrError, OSError) as error:
        yield error_html(error), gr.update(visible=False), "", ""
    asked.is_planned = True


def _shown(question: Question, plans: list[BudgetPlan], chosen: str | None) -> tuple[object, ...]:
    """The list of plans, and the lines that run the chosen one (or the first)."""
    one = next((plan for plan in plans if plan.gives_up == chosen), plans[0])
    names = [(f"{n}. gives up: {plan.gives_up}", plan.gives_up) for n, plan in enumerate(plans, 1)]
    numbers = gr.update(choices=names, value=one.gives_up, visible=True)
    listed = plans_html(plans, costs_of(question.source, question.labels).spec.depth)
    return listed, numbers, shell_of(one, question), python_of(one, question)


def _fill(request: gr.Request) -> Iterator[None]:
    asked = _latest.get(request.session_hash)
    if asked and asked.is_planned:
        with suppress(PeftBsrError):  # `_plan` shows it
            yield from _while_latest(asked, fill(Question(*asked.values)), request)


def _while_latest(asked: _Asked, steps: Iterator[_T], request: gr.Request) -> Iterator[_T]:
    """The steps, until the session asks something else."""
    for step in steps:
        if _latest.get(request.session_hash) is asked:
            yield step
        if _latest.get(request.session_hash) is not asked:  # also if it changed while the page got the step
            return


def _lines(request: gr.Request, chosen: str) -> tuple[object, object]:
    """The lines that run the chosen plan; nothing new if another question was asked since the page got its list."""
    if asked := _latest.get(request.session_hash):
        asked.chosen = chosen
        with suppress(PeftBsrError, OSError):  # `_plan` shows it
            question = Question(*asked.values)
            plan = next((plan for plan in known_plans(question) if plan.gives_up == chosen), None)
            if plan is not None:
                return shell_of(plan, question), python_of(plan, question)
    return gr.skip(), gr.skip()


def _kept_tab(fills: list[Dependency]) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            local = local_models()
            source = gr.Dropdown(
                local, value=local[0] if local else "", label="Model", info="a Hub id or a folder, with weights",
                allow_custom_value=True, elem_id="kept-model",
            )  # fmt: skip
            name = gr.Radio([*PHOTOGRAPHS, "upload"], value=PHOTOGRAPHS[0], label="Image")
            upload = gr.Image(type="pil", sources=["upload", "clipboard"], label="Upload", visible=False, height=240)
            rate = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Kept at each reduction")
            blocks = gr.Textbox("", label="Blocks that reduce", info="such as 3, 6, 9; empty: three, evenly spread")
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=2, min_width=320):
            found = gr.HTML(elem_id="kept")
    name.change(lambda chosen: gr.update(visible=chosen == "upload"), name, upload, show_progress="hidden")
    for trigger in (button.click, rate.change, upload.upload):
        trigger(_keep, [source, name, upload, rate, blocks], found, **_LANE)
    gr.on([button.click, rate.change, upload.upload], None, cancels=fills)


def _keep(source: str, name: str, upload: Image.Image | None, rate: float, blocks: str) -> str:
    try:
        picture = upload if name == "upload" else photograph(name)
        return kept_html(keep(source, picture, rate, read_blocks(blocks)))
    except (PeftBsrError, OSError) as error:
        return error_html(error)


def _results_tab(page: gr.Blocks) -> None:
    tasks, methods = (sorted({getattr(point, name) for point in points()}) for name in ("task", "method"))
    most = max(point.peak_bytes for point in points()) / 2**20
    with gr.Row():
        task = gr.Radio(tasks, value=tasks[0], label="Images")
        axis = gr.Radio([*AXES], value=next(iter(AXES)), label="Accuracy over")
    chosen = gr.CheckboxGroup(methods, value=methods, label="Methods")
    memory = gr.Slider(50, -(-most // 50) * 50, -(-most // 50) * 50, step=10, label="Peak memory at most, MiB")
    found = gr.HTML(elem_id="results")
    gr.Markdown(conditions())

    def draw(task: str, axis: str, chosen: list[str], memory: float) -> str:
        return chart_html(choose(task, chosen or ["none"], memory), axis, methods)

    inputs = [task, axis, chosen, memory]
    for change in (page.load, *(one.change for one in inputs)):
        change(draw, inputs, found, show_progress="hidden", trigger_mode="always_last")


__all__ = ["THEME", "make_page"]
