"""The page: gradio components and their event handlers. The other modules of this package do the computation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import of gradio, which uses the network
import gradio as gr
from gradio.events import Dependency
from PIL import Image

from peft_bsr.app.html import chart_html, error_html, kept_html, plans_html
from peft_bsr.app.kept import PHOTOGRAPHS, keep, local_models, photograph, read_blocks
from peft_bsr.app.models import KNOWN, costs_of
from peft_bsr.app.planning import CARDS, CUDA_GIB, Question, fill, plans_of, python_of, shell_of
from peft_bsr.app.results import AXES, choose, conditions, points
from peft_bsr.cli.memory import OPTIMIZERS, PRECISIONS
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
    return page


def _plans_tab(page: gr.Blocks) -> list[Dependency]:
    """The events that go on estimating in the background; what a person asks for cancels them."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            source = gr.Dropdown(
                [*KNOWN], label="Model", info="or any Hub id or folder", allow_custom_value=True, elem_id="plans-model"
            )
            card = gr.Dropdown(["", *CARDS], label="Card", info=f"{CUDA_GIB} GiB of it is reserved for CUDA itself")
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
        planned = trigger(_plan, [*asked, number], shown, **_LANE)
        fills.append(planned.success(_fill, asked, None, show_progress="hidden", **_LANE))
    gr.on([button.click, memory.change], None, cancels=fills)
    number.input(_lines, [*asked, number], [shell, python], show_progress="hidden", **_LANE)
    return fills


def _of_card(card: str, memory: float, device: str) -> tuple[float, str]:
    return (CARDS[card] - CUDA_GIB, "cuda") if card else (memory, device)


def _plan(*values: Any) -> Iterator[tuple[object, ...]]:
    chosen = values[-1]
    try:
        question = Question(*values[:-1])
        depth = costs_of(question.source, question.labels).depth
        for plans in plans_of(question):
            index = min(int(chosen or 1), len(plans))
            lines = shell_of(plans[index - 1], question), python_of(plans[index - 1], question)
            numbers = [(f"{n}. gives up: {plan.gives_up}", n) for n, plan in enumerate(plans, 1)]
            yield plans_html(plans, depth), gr.update(choices=numbers, value=index, visible=True), *lines
    except (PeftBsrError, OSError) as error:
        yield error_html(error), gr.update(visible=False), "", ""


def _fill(*values: Any) -> Iterator[None]:
    with suppress(PeftBsrError):  # `_plan` shows it
        yield from fill(Question(*values))


def _lines(*values: Any) -> tuple[str, str]:
    question = Question(*values[:-1])
    plan = list(plans_of(question))[-1][int(values[-1]) - 1]
    return shell_of(plan, question), python_of(plan, question)


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
