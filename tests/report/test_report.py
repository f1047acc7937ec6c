from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from peft import get_peft_model
from PIL import Image

from peft_bsr import BSRConfig
from peft_bsr.cost import Cost
from peft_bsr.report import Results, RunRecord, write_report
from peft_bsr.report.charts import _nice, bar_chart, heat_map, line_chart
from peft_bsr.training import BudgetRecord
from peft_bsr.tuners import describe_plan
from peft_bsr.viz import kept_token_pictures


class Page(HTMLParser):
    """Which elements there are, and whether each is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def model(make_model):
    return get_peft_model(make_model(), BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1, 2]))


def _parts(*sizes):
    """Of four blocks and the head, MiB."""
    *blocks, head = sizes
    return {"embeddings": 0, **{str(i): size * 2**20 for i, size in enumerate(blocks)}, "head": head * 2**20}


@pytest.fixture
def full_record(model, images, tmp_path):
    confusion = tmp_path / "confusion.png"
    Image.new("RGB", (8, 8)).save(confusion)
    pictures = np.random.default_rng(0).random((2, 32, 32, 3))
    spec, plan = model.base_model.spec, model.base_model.plan()
    return RunRecord(
        title="BSR of <b>vit</b>",
        spec=spec,
        plan=plan,
        description=describe_plan(model.peft_config["default"], spec, plan),
        headline={"test accuracy": "50 %"},
        log_history=[
            {"step": 1, "loss": 2.0, "learning_rate": 1e-3},
            {"step": 2, "loss": 1.0, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_runtime": 3.0},
            {"step": 4, "eval_loss": 1.6, "eval_accuracy": 0.4, "eval_mean_error": 0.2},
        ],
        kept_step=2,
        results=Results(
            "Results on 4 test images",
            tables=[("By class", ("class", "F1"), [("<b>cat", "0.5")])],
            confusion=confusion,
            worst=[(Image.new("RGB", (400, 300)), "file: a.png\nlabel: <i>owl")],
        ),
        memory={"predicted": 3 * 2**20, "measured": 5 * 2**20},
        memory_note="Of this process.",
        saved_by_block={"full": _parts(1, 1, 1, 1, 0.5), "BSR": _parts(0, 0.5, 0.25, 0.1, 0.1)},
        costs={"full": Cost(10**6, 2**22, 1e9, 4e9, 2.0), "BSR": Cost(10**5, 2**20, 1e9, 1e9, 0.5)},
        conditions="CPU, batch 2.",
        images=pictures,
        titles=["cat & dog", "owl"],
        kept=kept_token_pictures(model, images, pictures),
        budgets=[BudgetRecord(s, (0.5, 0.9, 1.0, 0.7), (2, 3)) for s in (5, 6, 7)],
        settings={"model": "vit"},
        versions={"torch": "2"},
        command="peft-bsr train",
    )  # fmt: skip


def test_a_page_has_all_there_is_and_needs_nothing_else(full_record, tmp_path):
    text = write_report(full_record, tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    for heading in ("What trains", "Training", "Results on 4 test images", "Confusion matrix",
                    "Images with the highest loss", "Peak memory", "Memory over the blocks",
                    "Compared with full fine-tuning", "Kept tokens", "Budgets", "How it was made"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    sources = [value for _, attributes in page.seen for key, value in attributes.items() if key in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", text), "nothing from the network, nothing that runs"
    assert "prefers-color-scheme: dark" in text
    assert '<meta name="viewport"' in text
    assert text.count("BSR of &lt;b&gt;vit&lt;/b&gt;") == 2
    assert "<b>" not in text
    assert "cat &amp; dog" in text
    assert "<td>0.25</td>" in text, "a quarter of the first's time"
    assert sum(tag == "img" for tag, _ in page.seen) == 2 * (1 + 2) + 2, "kept tokens, confusion matrix, worst image"
    charts = [attributes["aria-label"] for tag, attributes in page.seen if tag == "svg"]
    curves = ["loss", "accuracy", "mean error", "learning rate"]
    assert charts[1:5] == [f"{name} by optimizer step" for name in curves], "what speaks of speed has no curve"
    assert text.count('class="mark" d=') == 4 and text.count("kept: step 2") == 4
    assert "<td>&lt;b&gt;cat</td><td>0.5</td>" in text and "label: &lt;i&gt;owl" in text
    assert "<td>predicted</td><td>3</td>" in text and "<td>measured</td><td>5</td>" in text


def test_a_picture_that_is_not_there_is_explained(model, tmp_path):
    results = Results("Results", note="200 classes are too many.")
    text = write_report(RunRecord("bare", None, None, results=results), tmp_path / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Confusion matrix"]
    assert "200 classes are too many." in text


def test_a_run_that_diverged_has_a_report(tmp_path):
    log = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": math.nan, "eval_accuracy": 0.1},
        {"step": 3, "loss": math.inf},
    ]
    text = write_report(RunRecord("bare", None, None, log_history=log), tmp_path / "report.html").read_text()
    assert re.findall(r'aria-label="(.*?)"', text) == ["loss by optimizer step", "accuracy by optimizer step"]


def test_what_is_not_known_has_no_place(model, tmp_path):
    record = RunRecord("bare", model.base_model.spec, model.base_model.plan())
    text = write_report(record, tmp_path / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["What trains"]


def test_blocks_have_the_colour_of_what_they_do(model, tmp_path):
    text = write_report(
        RunRecord("bare", model.base_model.spec, model.base_model.plan()), tmp_path / "report.html"
    ).read_text()
    assert re.findall(r'<rect class="bar (\w+)"', text) == ["frozen", "s0", "s1", "s0"]


def test_charts_stay_inside_of_themselves():
    charts = (
        line_chart({"a": [(1, 0.0), (50, 3.0)], "b": [(25, 1.0)]}, "step", "loss"),
        line_chart({"a": [(3, 0.7)]}, "step", "accuracy"),
        line_chart({"a": [(3, 0.7), (4, 0.8)]}, "step", "accuracy", mark=9),
        bar_chart([0.0, 5.0, 2.0], "MiB", last="rest"),
        bar_chart(list(range(1, 49)), "tokens"),
        heat_map([[0.1] * 1000, [1.0] * 1000], lambda value: "red", (1, 1000), "step", "budget"),
    )
    for chart in charts:
        _, low, width, height = map(float, re.search(r'viewBox="([^"]+)"', chart)[1].split())
        xs = [float(x) for x in re.findall(r'\b(?:x|cx)="(-?[\d.]+)"', chart)]
        ys = [float(y) for y in re.findall(r'\b(?:y|cy)="(-?[\d.]+)"', chart)]
        bars = re.findall(r'x="(-?[\d.]+)" y="-?[\d.]+" width="([\d.]+)"', chart)
        assert min(xs) >= 0
        assert max(xs) <= width
        assert min(ys) >= low
        assert max(ys) <= low + height
        assert all(float(x) + float(w) <= width for x, w in bars)
        assert "nan" not in chart


def test_bars_are_as_high_as_they_say():
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"><title>', bar_chart([0, 1, 2], "MiB", top=4))]
    assert heights[0] == 0
    assert heights[2] == pytest.approx(2 * heights[1], abs=0.2)


@pytest.mark.parametrize(("value", "top"), [(0, 1), (0.13, 0.15), (1, 1), (65, 80), (100, 100), (101, 150)])
def test_axes_end_at_round_numbers(value, top):
    assert _nice(value) == pytest.approx(top)
