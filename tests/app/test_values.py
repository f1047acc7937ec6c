"""What the app computes is what the Python API says."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from peft_bsr import BSRConfig, ConfigError, HubError, UsageError
from peft_bsr.app import planning
from peft_bsr.app.html import chart_html, error_html, kept_html, plans_html
from peft_bsr.app.kept import keep, load, photograph, read_blocks
from peft_bsr.app.models import KNOWN, config_of, costs_of
from peft_bsr.app.planning import Question, accuracies_of, fill, known_plans, plans_of, python_of, shell_of
from peft_bsr.app.results import AXES, choose, pareto, plan_key, points
from peft_bsr.cost import Estimate, Setup, count_flops, plan_for_budget
from peft_bsr.cost.budget import plan_setting
from peft_bsr.cost.ways import LORA, RECOMMENDED, settings_of
from peft_bsr.data import load_processor, to_pixels
from peft_bsr_cli import main, make_parser

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "method_comparison"


def answered(question: Question, count: int) -> list:
    """The first list of so many plans."""
    return next(plans for plans in plans_of(question) if len(plans) >= count)


def test_plans_come_one_by_one_and_the_last_list_is_that_of_plan_for_budget(tiny):
    question = Question(str(tiny), gib=1.0, batch_size=4, labels=3)
    lists = list(plans_of(question))
    grown = [len(plans) for plans in lists]
    assert grown == sorted(grown) and {after - before for before, after in pairwise(grown)} == {0, 1}
    expected = plan_for_budget(costs_of(str(tiny), 3), "1GiB", Setup(batch_size=4, optimizer="adamw_fused"))
    assert [plan.describe() for plan in lists[-1]] == [plan.describe() for plan in expected]
    html = plans_html(lists[-1], 4)
    assert [int(n) for n in re.findall(r"<h3>(\d+)\.", html)] == list(range(1, len(expected) + 1))
    assert all(plan.gives_up in html for plan in expected)


def test_what_is_known_comes_first_and_costs_no_estimate(tiny, monkeypatch):
    """The first answer to a fresh question is what is likely to fit; another budget starts with what is known."""
    question = Question(str(tiny), gib=1.0, batch_size=3)
    assert known_plans(question) == []
    (first,) = answered(question, 1)
    assert first.gives_up == settings_of(costs_of(str(tiny), 10).spec)[-1][1]
    monkeypatch.setattr("peft_bsr.cost.plan_costs.estimate", lambda *_: pytest.fail("estimated again"))
    other = replace(question, gib=0.5)
    assert known_plans(other) == [first] and next(plans_of(other)) == [first]


def test_that_nothing_fits_is_known_from_the_plans_that_take_least(tiny, monkeypatch):
    asked = []
    huge = Estimate(*[2**40] * 6, saved_bytes=0, training_flops=0, batch_size=5, trainable_parameters=1)
    monkeypatch.setattr("peft_bsr.cost.plan_costs.estimate", lambda _, config, setup: asked.append(config) or huge)
    with pytest.raises(ConfigError, match="is too little"):
        list(plans_of(Question(str(tiny), gib=1, batch_size=5)))
    assert {None if config is None else config.trainable_blocks for config in asked} == {None, "last:1"}


@pytest.mark.slow
def test_too_little_memory_names_the_smallest_plan(tiny):
    with pytest.raises(ConfigError, match=r"`memory='0.0001GiB'` is too little .* The smallest plan takes"):
        list(plans_of(Question(str(tiny), gib=0.0001, batch_size=4, labels=3)))


@pytest.mark.slow
def test_after_fill_no_budget_estimates_anything(tiny, monkeypatch):
    list(fill(Question(str(tiny), gib=1.0, batch_size=2)))
    monkeypatch.setattr("peft_bsr.cost.plan_costs.estimate", lambda *_: pytest.fail("estimated again"))
    least = costs_of(str(tiny), 10)(None, Question(str(tiny), gib=1.0, batch_size=2).setup).total_bytes
    for gib in (1.0, least / 2**30, 0.8 * least / 2**30):
        assert list(plans_of(Question(str(tiny), gib=gib, batch_size=2)))


def test_the_lines_of_a_plan_run_it(tiny, monkeypatch):
    """The Python is executed up to the trainer, the flags of the shell are read by the command."""
    from peft_bsr.cli import train

    question = Question(str(tiny), gib=1.0, batch_size=4, labels=3)
    plan = answered(question, 3)[1]
    scope: dict = {}
    lines = python_of(plan, question).splitlines()
    assert lines[-1].startswith("Trainer(")
    exec("\n".join(lines[:-1]), scope)
    assert scope["arguments"].per_device_train_batch_size == 4
    trains = sum(p.numel() for p in scope["model"].parameters() if p.requires_grad)
    assert trains == plan.estimate.trainable_parameters
    words = shell_of(plan, question).split()
    assert words[0] == "peft-bsr"
    args = make_parser("train", train).parse_args(words[1:])
    assert str(args.model) == str(tiny)


def test_the_lines_for_an_adapter_train_its_base_model(tiny, tmp_path):
    get_peft_model(ViTForImageClassification.from_pretrained(tiny), BSRConfig()).save_pretrained(tmp_path)
    question = Question(str(tiny), gib=1.0, batch_size=4, labels=3)
    plan, same = answered(question, 1)[0], replace(question, source=str(tmp_path))
    assert python_of(plan, same) == python_of(plan, question) and shell_of(plan, same) == shell_of(plan, question)


def test_the_python_lines_train_where_the_models_own_class_takes_no_labels(tmp_path):
    """A distilled DeiT is saved from a class without a loss; a bare DINOv2 has no head."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes)).save_pretrained(tmp_path / "deit")
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path / "headless")
    for name in ("deit", "headless"):
        question = Question(str(tmp_path / name), gib=1.0, batch_size=2, labels=3)
        scope: dict = {}
        exec("\n".join(python_of(answered(question, 1)[-1], question).splitlines()[:-2]), scope)
        output = scope["model"](pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2]))
        assert output.loss.requires_grad and output.logits.shape == (2, 3)


def test_a_plan_ends_although_its_costs_were_forgotten(tiny):
    lists = plans_of(Question(str(tiny), gib=1.0, batch_size=2, labels=4))
    next(lists)
    costs_of.cache_clear()
    calls = 0
    for calls, _ in enumerate(lists, 1):
        assert calls < 100
    assert calls


@pytest.mark.parametrize("source", list(KNOWN))
def test_each_offered_model_can_be_made_without_weights(source):
    costs = costs_of(source, 10)
    assert costs.spec.depth >= 12
    assert all(p.is_meta for p in costs.model.parameters())
    assert config_of(source).model_type in ("vit", "deit", "dinov2", "clip", "siglip")


def test_a_plan_of_an_older_list_leaves_the_page_as_it_is(tiny, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (`pip install 'peft-bsr[app]'`)")
    from peft_bsr.app import page

    values, nothing = (str(tiny), 1.0, 4), (gradio.skip(), gradio.skip())
    question, session = Question(*values), SimpleNamespace(session_hash="me")
    monkeypatch.setattr(page, "_latest", {"me": page._Asked(values)})
    assert page._lines(session, "of another question") == nothing
    assert page._lines(SimpleNamespace(session_hash="gone"), "anything") == nothing
    plan = answered(question, 1)[0]
    assert page._lines(session, plan.gives_up) == (shell_of(plan, question), python_of(plan, question))


def test_what_cannot_be_planned_says_why(tmp_path, tiny):
    with pytest.raises(HubError, match="no folder"):
        list(plans_of(Question(str(tmp_path / "none"), gib=4)))
    with pytest.raises(UsageError, match="batch_size=0"):
        Question(str(tiny), gib=4, batch_size=0)
    with pytest.raises(UsageError, match="Select one"):
        Question("", gib=4)
    said = error_html(UsageError("a <b> & c"))
    assert "a &lt;b&gt; &amp; c" in said and 'role="alert"' in said


def test_kept_tokens_are_counted_at_the_size_of_the_image(tmp_path):
    """DINOv2 takes images of any size, and is probed at another one."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 96, "patch_size": 4}
    Dinov2ForImageClassification(Dinov2Config(**sizes)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    view = keep(str(tmp_path), photograph("flower.jpg"), 0.5, [1, 2])
    assert view.all_tokens == 1 + 24 * 24 and view.tokens == [1 + 288 + 1, 1 + 145 + 1]


DIFFERENT = {
    "merged": {"reduction": "merge", "keep_rate": 0.5},
    "fused": {"keep_rate": 0.5},
    "dropped": {"keep_rate": 0.5, "fuse_dropped": False},
    "fused by another score": {"keep_rate": 0.5, "score": "received"},
    "by another score": {"keep_rate": 0.5, "fuse_dropped": False, "score": "received"},
    "all tokens": {"keep_rate": 1.0},
    "gradients of half": {"keep_rate": 1.0, "gradient_tokens": 0.5},
    "queries": {"keep_rate": 1.0, "target_modules": ["attention.query"]},
    "without values": {"keep_rate": 1.0, "exclude_modules": ["attention.value"]},
    "low-rank": {"keep_rate": 1.0, "trainable": "lora"},
    "int8": {"keep_rate": 1.0, "saved_activations": "int8"},
    "rank 4": {"keep_rate": 1.0, "trainable": "lora", "r": 4},
}


def test_plans_with_other_gradients_have_other_accuracies(tiny):
    keys = {}
    for name, fields in DIFFERENT.items():
        found = set()
        for lean in ("off", "exact", "max"):
            model = ViTForImageClassification.from_pretrained(tiny)
            attached = get_peft_model(model, BSRConfig(**fields, lean=lean))
            found.add(plan_key(attached.peft_config["default"], attached.base_model.plan()))
        (keys[name],) = found
    assert len(set(keys.values())) == len(DIFFERENT), keys


def test_the_recommended_plans_have_accuracies():
    costs = costs_of(next(source for source in KNOWN if "tiny" in source), 10)
    for fields, experiment in ((RECOMMENDED, "bsr/from3-lora-merge"), (LORA, "bsr/qv-lora-max")):
        setting = next(one for one in settings_of(costs.spec) if one[0] is not None and one[0] | fields == one[0])
        plan = plan_setting(costs, setting, "8GiB", Setup(batch_size=4))
        expected = {point.task: point.accuracy for point in points() if point.experiment == experiment}
        assert expected and accuracies_of(plan, costs.spec.depth) == pytest.approx(expected)


def test_kept_tokens_are_those_of_the_adapter(tiny):
    view = keep(str(tiny), photograph("flower.jpg"), 0.5, [1, 2])
    model = get_peft_model(
        ViTForImageClassification.from_pretrained(tiny), BSRConfig(keep_rate=0.5, reduction_blocks=[1, 2])
    ).eval()
    pixels = to_pixels([photograph("flower.jpg")], load_processor(str(tiny)))
    with torch.no_grad():
        assert view.flops == count_flops(lambda: model(pixel_values=pixels)) < view.all_flops
        lengths = [state.shape[1] for state in model(pixel_values=pixels, output_hidden_states=True).hidden_states]
    assert [one.block for one in view.kept] == [1, 2] and view.kept[0].share == 0.5
    assert view.all_tokens == lengths[1] == 17 and view.tokens == lengths[2:4]
    assert kept_html(view).count("<img") == 3


def test_a_change_of_the_rate_redraws_and_leaves_the_model_alone(tiny):
    model, _ = load(str(tiny))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    picture = photograph("china.jpg")
    few, many = (keep(str(tiny), picture, rate, [1]) for rate in (0.3, 0.8))
    assert few.kept[0].share < many.kept[0].share and few.flops < many.flops
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_images_and_blocks_that_cannot_be_used_are_refused(tiny):
    with pytest.raises(UsageError, match="no image"):
        keep(str(tiny), None, 0.5)
    with pytest.raises(UsageError, match="the limit is 50,000,000"):
        keep(str(tiny), Image.new("1", (10_000, 5_001)), 0.5)
    with pytest.raises(UsageError, match="indices from 0"):
        read_blocks("one, two")
    assert read_blocks(" 3, 6,9 ") == [3, 6, 9] and read_blocks(" ") is None


def test_a_large_model_is_not_loaded(tiny, monkeypatch):
    monkeypatch.setattr("peft_bsr.app.kept.MOST_PARAMETERS", 10)
    load.cache_clear()
    with pytest.raises(UsageError, match="M parameters"):
        load(str(tiny))


def test_points_are_the_committed_results():
    """Each number is that of the results beside the benchmark; nothing is left out, losing ones neither."""
    costs = json.loads((BENCHMARK / "results" / "cpu" / "costs.json").read_text())
    expected = {}
    for path in (BENCHMARK / "results" / "cpu").glob("*/*/seed-*.json"):
        task, experiment = path.parts[-3], path.parts[-2].replace("--", "/")
        if experiment in costs:
            accuracy = json.loads(path.read_text())["train_info"]["metrics"][0]["accuracy"]
            expected.setdefault((task, experiment), set()).add(accuracy)
    assert {(point.task, point.experiment): set(point.accuracies) for point in points()} == expected
    assert all(point.peak_bytes == costs[point.experiment]["peak_bytes"] for point in points())
    assert all(point.experiment in point.command and point.task in point.command for point in points())


@pytest.mark.parametrize("axis", list(AXES))
def test_nothing_beats_the_front(axis):
    chosen = choose("cifar10")
    front = pareto(chosen, axis)
    assert 1 < len(front) < len(chosen)
    for point in chosen:
        beaten = [f for f in front if f.accuracy >= point.accuracy and f.cost(axis) <= point.cost(axis)]
        assert beaten, f"{point.experiment} is neither on the front nor beaten by it"
    html = chart_html(chosen, axis, sorted({point.method for point in chosen}))
    assert html.count("<button") == len(chosen)
    assert all(point.command in html for point in chosen)


def test_filters_leave_what_they_say():
    assert {point.method for point in choose("cifar10", ["lora"])} == {"lora"}
    assert all(point.peak_bytes <= 200 * 2**20 for point in choose("cifar10", memory=200))
    assert "No experiment matches" in chart_html([], next(iter(AXES)), [])


def test_a_plan_of_the_benchmark_shows_its_accuracy():
    """`BSRConfig()` on 12 blocks is the benchmark's `bsr/spread`, and full fine-tuning itself."""
    question = Question("WinKawaks/vit-tiny-patch16-224", gib=64, batch_size=2)
    full = answered(question, 2)[0]
    rows = [p for p in points() if p.experiment.startswith("full_finetuning/") and p.task == "cifar10"]
    scores = [score for row in rows for score in row.accuracies]
    assert accuracies_of(full, 12)["cifar10"] == pytest.approx(sum(scores) / len(scores))
    assert accuracies_of(full, 24) == {}
    spread = [p for p in points() if p.experiment in ("bsr/spread-exact", "bsr/spread-max")]
    assert len({point.plan for point in spread}) == 1 and spread[0].plan is not None


def test_cards_leave_room():
    assert all(planning.USABLE * gib > 7 for gib in planning.CARDS.values())


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("page", "serving"):
        monkeypatch.delitem(sys.modules, f"peft_bsr.app.{name}", raising=False)
    assert main(["app"]) == 1
    assert "pip install 'peft-bsr[app]'" in capsys.readouterr().err
    assert main(["app", "--port", "0"]) == 2
