"""Plans for a budget: what is chosen fits, when it is really run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
from peft import get_peft_model
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from peft_bsr import BSRConfig, ConfigError
from peft_bsr.cost import BudgetPlan, Estimate, PlanCosts, Setup, estimate, parse_size, plan_for_budget
from peft_bsr.cost.budget import plan_setting
from peft_bsr.cost.ways import RECOMMENDED, ConfigFields, Way, settings_of, ways_of

VIT = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
BATCH = 16
BUDGETS = ["300MB", *(pytest.param(size, marks=pytest.mark.slow) for size in ("150MB", "120MB", "80MB", "64MB"))]

# a process whose resident set is measured: what the training adds to what was there before the model
RUN = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification
from peft_bsr import BSRConfig

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

torch.set_num_threads(1)
question = json.loads(sys.argv[1])

def run(config, checkpointing, batch, steps):
    torch.manual_seed(0)
    model = inner = ViTForImageClassification(ViTConfig(**question["vit"]))
    if config is not None:
        model = get_peft_model(model, BSRConfig(**config))
    if checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    images = torch.randn(batch, 3, 224, 224)
    gc.collect()
    for _ in range(steps):
        model(pixel_values=images).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

run(question["config"], question["checkpointing"], 1, 1)  # libraries load what they need
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
before = status("RssAnon")
Path("/proc/self/clear_refs").write_text("5")
high = status("VmHWM")
run(question["config"], question["checkpointing"], question["batch"], 2)
print(json.dumps({"rise": status("VmHWM") - high, "before": before}))
"""


def vit() -> torch.nn.Module:
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(**VIT))


def measured_rise(plan: BudgetPlan) -> int:
    config = (
        None if plan.config is None else {name: getattr(plan.config, name) for name in get_type_hints(ConfigFields)}
    )
    question = {"vit": VIT, "config": config, "checkpointing": plan.setup.gradient_checkpointing, "batch": BATCH}
    result = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(question)],
        capture_output=True,
        text=True,
        check=False,
        env={"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["rise"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("memory", BUDGETS)
def test_what_is_chosen_fits_when_it_is_run(memory):
    plan = plan_for_budget(vit(), memory, batch_size=BATCH, limit=1)[0]
    predicted = plan.estimate.total_bytes
    assert predicted <= parse_size(memory)
    found = measured_rise(plan)
    assert found <= parse_size(memory), plan.describe()
    assert found == pytest.approx(predicted, rel=0.1, abs=8e6), plan.describe()


@pytest.mark.slow
def test_more_memory_gives_up_less():
    plans = plan_for_budget(vit(), "10GB", batch_size=BATCH)
    assert plans[0].config is None and not plans[0].setup.gradient_checkpointing
    assert all(plan.estimate.total_bytes <= 10**10 for plan in plans)
    assert len({plan.gives_up for plan in plans}) == len(plans) == 14
    small = plan_for_budget(vit(), 10**8, batch_size=BATCH)
    assert len(small) < len(plans) and small[0].config is not None
    assert "gives up: " in small[0].describe() and "BSRConfig(" in small[0].describe()


def test_a_model_that_an_adapter_froze_can_be_planned_for():
    left = get_peft_model(ViTForImageClassification(ViTConfig(**VIT)), BSRConfig()).unload()
    found, expected = (plan_for_budget(m, "10GB", batch_size=BATCH, limit=1)[0] for m in (left, vit()))
    assert found.estimate == expected.estimate and found.config is None


@pytest.mark.slow
def test_too_little_names_the_smallest():
    with pytest.raises(ConfigError, match=r"`memory='10MB'` is too little .* The smallest plan takes \d+ MiB") as error:
        plan_for_budget(vit(), "10MB", batch_size=4)
    assert "trainable='lora'" in str(error.value)
    smallest = int(re.search(r"takes (\d+) MiB", str(error.value)).group(1))
    with pytest.raises(ConfigError, match=rf"takes {smallest} MiB, .*; you gave {smallest - 1} MiB:\n *{smallest} MiB"):
        plan_for_budget(vit(), f"{smallest - 1}.01MiB", batch_size=4)


def test_that_nothing_fits_is_known_from_the_plans_that_take_least(monkeypatch):
    asked = []
    huge = Estimate(*[2**40] * 6, saved_bytes=0, training_flops=0, batch_size=1, trainable_parameters=1)
    monkeypatch.setattr("peft_bsr.cost.plan_costs.estimate", lambda _, config, setup: asked.append(config) or huge)
    with pytest.raises(ConfigError, match="is too little"):
        plan_for_budget(vit(), "1GB")
    assert {None if config is None else config.trainable_blocks for config in asked} == {None, "last:1"}


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(ConfigError, match=rf"`limit={limit}` must be at least 1"):
        plan_for_budget(vit(), "1GB", limit=limit)


@pytest.mark.parametrize("memory", ["2 gigs", "-1", 0, True, None, "1.5.2GB"])
def test_sizes_that_are_none(memory):
    with pytest.raises(ConfigError, match="is not understood"):
        parse_size(memory)


def test_sizes():
    assert [parse_size(s) for s in ("2GB", "2 GiB", "1.5KB", 7, "512")] == [2 * 10**9, 2**31, 1500, 7, 512]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "setting",
    [
        None,
        {"trainable_blocks": "every:2"},
        {"trainable_blocks": "every:1", "reduction_blocks": [], "trainable": "lora"},
        {"trainable_blocks": "last:1"},
    ],
)
def test_ways_are_tried_by_flops(setting):
    """The first that fits is taken, so none after it may take fewer."""
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_hidden_layers=4))
    ways = list(ways_of((setting, ""), Setup(batch_size=2), torch.float32))
    assert all(isinstance(way, Way) for way in ways)
    flops = [estimate(model, way.config, way.setup).training_flops for way in ways]
    assert flops == sorted(flops)
    assert flops[-1] > flops[0]


SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
WITHOUT_TOKENS = {
    "stages": lambda: SwinForImageClassification(SwinConfig(**SWIN)),
    "no attention": lambda: ConvNextForImageClassification(
        ConvNextConfig(image_size=32, depths=[1, 1, 2, 1], hidden_sizes=[8, 8, 16, 16])
    ),
}


@pytest.mark.parametrize("name", WITHOUT_TOKENS)
def test_a_model_in_which_no_token_can_be_dropped(name):
    """Plans keep all tokens; each of them can be attached."""
    model = WITHOUT_TOKENS[name]()
    plans = plan_for_budget(model, "1GB", batch_size=2)
    assert len({plan.gives_up for plan in plans}) == len(plans) == 9
    for plan in plans[1:]:
        assert get_peft_model(WITHOUT_TOKENS[name](), plan.config).base_model.plan().trained_blocks
    less = plans[0].estimate.total_bytes // 2
    assert all(plan.config.saved_activations == "full" for plan in plan_for_budget(model, less, batch_size=2, limit=2))


def test_the_recommended_plan_is_the_balanced_preset_and_its_line_says_all_of_it():
    costs = PlanCosts(vit())
    setting = next(setting for setting in settings_of(costs.spec) if setting[0] == RECOMMENDED)
    plan = plan_setting(costs, setting, "10GB", Setup(batch_size=BATCH))
    assert plan.is_recommended
    described = eval(re.search(r"BSRConfig\(.*?\)", plan.describe())[0])
    for config in (described, BSRConfig(preset="balanced")):
        assert {name: getattr(config, name) for name in RECOMMENDED} == RECOMMENDED
