"""50 steps of training: however it is run, they are the same; and the same as they were.

`python -m tests.invariant.test_trajectories` prints `PINNED`. Print it again only if what a step computes is meant to
change, and say so: it shows when all ways drift together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.cli.main import main
from peft_bsr.cost import saved_activations
from tests.distributed.launch import launch
from tests.invariant.ways import CONFIGS, STEPS, WAYS, Way, build, data, is_possible, train, trajectory

PAIRS = [(name, way) for name in CONFIGS for way in WAYS if is_possible(name, WAYS[way])]
LESS = [pair for pair in PAIRS if not (WAYS[pair[1]].is_compiled or WAYS[pair[1]].is_cached or WAYS[pair[1]].parts > 1)]
CASES = [  # compiling takes most of a minute
    pytest.param(*pair, marks=pytest.mark.slow if WAYS[pair[1]].is_compiled else ()) for pair in PAIRS
]
PINNED_STEPS = (0, 9, 19, 29, 49)
PINNED: dict[str, list[tuple[float, float]]] = {  # (loss, gradient norm) in these steps
    "bsr": [(1.2381, 2.8488), (0.86568, 1.9428), (0.45484, 1.8822), (0.12493, 0.80125), (0.0097402, 0.088904)],
    "bsr low-rank": [(1.0331, 1.7646), (1.223, 2.192), (0.71895, 1.5417), (0.44782, 1.5579), (0.021273, 0.24742)],
    "bsr low-rank everywhere": [
        (1.184, 2.6016),
        (1.0157, 3.5052),
        (0.54321, 2.0888),
        (0.15147, 1.0537),
        (0.011191, 0.11796),
    ],
    "alast": [(1.3038, 3.1334), (0.93906, 2.214), (0.48407, 2.2214), (0.097982, 0.93578), (0.0061101, 0.058844)],
    "alast sampled": [(1.3038, 4.1377), (1.0219, 2.4979), (0.64554, 2.4746), (0.40246, 1.9839), (0.047708, 0.72739)],
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_way_trains_alike(name, way):
    torch.testing.assert_close(trajectory(name, WAYS[way]), trajectory(name), rtol=2e-5, atol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_no_way_drifts_to_one_side(name, way):
    """Rounding errors have both signs: their mean over all steps is far below what a single step is allowed."""
    found, expected = trajectory(name, WAYS[way]), trajectory(name)
    assert (((found - expected) / expected).mean(0).abs() < 3e-6).all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "way"), LESS)
def test_every_level_keeps_less(name, way):
    """Otherwise stock blocks would be compared with themselves."""
    images, numbers = torch.randn(8, 3, 32, 32), torch.Generator()
    saved = [
        saved_activations(model, lambda model=model: model(pixel_values=images).logits.sum())
        for model in (build(name, WAYS[way], numbers), build(name, Way(), numbers))
    ]
    assert saved[0] < 0.85 * saved[1]


@pytest.mark.parametrize("lean", ["exact", "max"])
@pytest.mark.parametrize("name", CONFIGS)
def test_halves_run_as_planned(name, lean):
    """One that fails its test at attach runs as its own modules instead, or as the original, and trains like them."""
    blocks = build(name, Way(lean), torch.Generator()).base_model.plan().blocks
    for block in blocks:
        if block.in_graph:
            assert block.lean.attention and block.lean.mlp and not block.lean.as_modules
    if blocks[-1].reduction is None:
        assert blocks[-1].lean.num_queries == 1, "the head reads the class token alone"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stock_blocks_train_as_they_did(name):
    found = trajectory(name)[list(PINNED_STEPS)]
    torch.testing.assert_close(found, torch.tensor(PINNED[name], dtype=torch.float64), rtol=1e-3, atol=0)
    assert found[-1, 0] < 0.7 * found[0, 0], "it learns"


def test_two_processes_train_as_one(tmp_path):
    launch(str(Path(__file__).with_name("processes.py")), tmp_path, processes=2)
    found = torch.tensor([json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)], dtype=torch.float64)
    together = torch.stack([found[:, :, 0].mean(0), found[0, :, 1]], dim=1)
    torch.testing.assert_close(together, trajectory("bsr")[: len(together)], rtol=2e-5, atol=0)


def test_int8_is_right_on_average():
    """One gradient is off by its random rounding; the mean of many is not, to either side."""

    def gradient(**settings):
        numbers = torch.Generator().manual_seed(0)
        model, batch = build("bsr", WAYS["exact"], numbers, **settings), data(numbers)[:8]
        images = torch.stack([row["pixel_values"] for row in batch])
        model(pixel_values=images, labels=torch.stack([row["labels"] for row in batch])).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    exact, projections, errors = gradient(), [], []
    for seed in range(24):
        torch.manual_seed(seed)
        found = gradient(saved_activations="int8")
        projections.append(found @ exact / exact.square().sum() - 1)
        errors.append((found - exact).norm() / exact.norm())
    residuals = torch.stack(projections)
    assert min(errors) > 1e-4 and max(errors) < 0.05, "rounded, but near"
    assert residuals.mean().abs() < 3 * residuals.std() / len(residuals) ** 0.5


COMMAND_WAYS: dict[str, list[str]] = {
    "off": ["--set", "lean=off"],
    "exact": ["--set", "lean=exact"],
    "max": ["--set", "lean=max"],
    "checkpointed": ["--set", "lean=off", "--trainer", "gradient_checkpointing=true"],
    "accumulated": ["--set", "lean=exact", "--batch-size", "4", "--trainer", "gradient_accumulation_steps=2"],
    "cached": ["--set", "lean=exact", "--cache"],
}


@pytest.fixture(scope="module")
def command_losses(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """Logged losses of `peft-bsr train` run in one of the `COMMAND_WAYS`."""
    base = tmp_path_factory.mktemp("base")
    vit = build("bsr", Way(), torch.Generator().manual_seed(0)).unload()
    assert isinstance(vit, ViTForImageClassification)
    vit.save_pretrained(base)
    (base / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}})
    )

    @cache
    def losses(way: str) -> list[float]:
        output = tmp_path_factory.mktemp("trained")
        asked = ["train", "--model", str(base), "--dataset", "digits", "--output", str(output), "--max-steps", "10"]
        asked += ["--batch-size", "8", "--set", "trainable_blocks=[1,3]", "--trainer", "logging_steps=1"]
        asked += ["--no-measuring", "--test-size", "0.05", "--validation-size", "0.05"]
        assert main([*asked, *COMMAND_WAYS[way], "--trainer", "save_strategy=steps", "--trainer", "save_steps=10"]) == 0
        (state,) = output.rglob("trainer_state.json")
        log = json.loads(state.read_text())["log_history"]
        return [row["loss"] for row in log if "loss" in row]

    return losses


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", [way for way in COMMAND_WAYS if way != "off"])
def test_the_command_line_trains_alike(command_losses, way):
    assert len(command_losses("off")) == 10
    rounded = 1e-3 if way == "cached" else 2e-4  # the command keeps cached tokens in half precision
    assert command_losses(way) == pytest.approx(command_losses("off"), rel=rounded)


@pytest.mark.slow
def test_a_real_model_trains_alike():
    """ViT-Ti with its pretrained weights, 50 steps on real images: off, exact, max, checkpointed."""
    place = os.environ.get("PEFT_BSR_VIT_TINY")
    if not place:
        pytest.skip("PEFT_BSR_VIT_TINY names no folder with ViT-Ti's weights")
    from peft import get_peft_model
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images[:32], dtype=torch.float32)[:, None] / 8 - 1
    pixels = torch.nn.functional.interpolate(pixels, (224, 224), mode="bilinear").expand(-1, 3, -1, -1)
    samples = [{"pixel_values": p, "labels": int(label)} for p, label in zip(pixels, digits.target, strict=False)]
    found = {}
    for way in ("off", "exact", "max", "checkpointed"):
        torch.manual_seed(0)
        vit = ViTForImageClassification.from_pretrained(place, num_labels=10, ignore_mismatched_sizes=True)
        model = get_peft_model(vit, BSRConfig(lean="off" if way == "checkpointed" else way)).train()
        if way == "checkpointed":
            vit.gradient_checkpointing_enable({"use_reentrant": False})
        found[way] = torch.tensor(train(model, samples, learning_rate=1e-3), dtype=torch.float64)
    for way in ("exact", "max", "checkpointed"):
        torch.testing.assert_close(found[way], found["off"], rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"# {STEPS} steps")
    for name in CONFIGS:
        rows = [tuple(float(f"{value:.5g}") for value in row) for row in trajectory(name)[list(PINNED_STEPS)]]
        print(f'    "{name}": {rows},')
