"""Traps that other libraries fall into silently (each was measured), in a loop of one's own and in Trainer.

Steps are plain SGD on the same batches, so that a trap shows as weights that differ from those of the run without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BeitConfig, BeitForImageClassification, Trainer

from peft_bsr import (
    ALaSTConfig,
    BSRConfig,
    MoEConfig,
    SynQTConfig,
    TrainabilityCallback,
    TrainabilityError,
    verify_trainability,
)
from tests.conftest import FAMILIES, SIZES
from tests.training.test_trainer import Blobs, make_trainer

pytestmark = pytest.mark.sampled(2)

CONFIGS = {
    "bsr": BSRConfig(trainable_blocks=[2, 3], reduction_blocks=[1, 2]),
    "lora": BSRConfig(trainable_blocks=[2, 3], reduction_blocks=[2], trainable="lora", lean="max", init_weights=False),
    "moe": BSRConfig(trainable_blocks=[2, 3], tasks={"blobs": 3}, moe=MoEConfig(num_experts=3, top_k=1)),
    "alast": ALaSTConfig(trainable_blocks_per_step=2, selection="sample"),
    "synqt": SynQTConfig(layers=[1, 3], dropout=0.0, drop_path=0.0),
}
METHODS = sorted(CONFIGS)
BATCH = 4


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def attach(base: nn.Module, method: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base, copy.deepcopy(CONFIGS[method]))


def bare(model: nn.Module, folder: Path, steps: int, loss_of: Callable[..., Any] | None = None) -> None:
    """A loop of one's own, which looks first whether it trains."""
    data = Blobs(96, seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    verify_trainability(model, optimizer)
    model.train()
    for step in range(steps):
        rows = [data[i] for i in range(step * BATCH, (step + 1) * BATCH)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "adapter")


def trainer(model: nn.Module, folder: Path, steps: int, loss_of: Callable[..., Any] | None = None, **more: Any) -> None:
    """The same steps by Trainer."""

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return None

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs).loss if loss_of is None else loss_of(model, inputs)

    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **more}
    run = make_trainer(
        model,
        folder,
        **settings,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        eval_strategy="no",
    )
    run.__class__ = InOrder
    run.add_callback(TrainabilityCallback())
    run.train()
    run.save_model(str(folder / "adapter"))


@pytest.fixture(params=[bare, trainer], ids=["bare", "trainer"])
def train(request: pytest.FixtureRequest) -> Callable[..., None]:
    return request.param


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "_params." in n}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def reference(make_model, method: str, folder: Path, steps: int = 2, **settings: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = attach(make_model(), method)
    start = trained(model)
    bare(model, folder / "reference", steps, **settings)
    end = trained(model)
    assert sum(not torch.equal(end[name], tensor) for name, tensor in start.items()) > 0.6 * len(start)
    return end


def test_both_loops_take_the_same_steps(make_model, method, tmp_path):
    model = attach(make_model(), method)
    trainer(model, tmp_path, 2)
    assert_near(trained(model), reference(make_model, method, tmp_path))


@pytest.mark.sampled(3)
def test_input_gradients_put_no_frozen_block_into_the_graph(make_model, method, train, tmp_path):
    """1. `enable_input_require_grads` cost a factor of four; both loops stop if a frozen block joins the graph."""
    model = attach(make_model(), method)
    model.enable_input_require_grads()
    train(model, tmp_path, 2)
    assert_near(trained(model), reference(make_model, method, tmp_path))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_however_and_whenever_enabled(make_model, method, train, use_reentrant, when, tmp_path):
    """2. Reentrant checkpointing trained 2 of 34 tensors; enabled before the adapter, PEFT asks for input gradients."""
    base = make_model()
    if when == "before":
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model = attach(base, method)
    if when == "after":
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    train(model, tmp_path, 2)
    assert_near(trained(model), reference(make_model, method, tmp_path))


def two_forwards(model: nn.Module, batch: Any) -> torch.Tensor:
    other = {**batch, "pixel_values": batch["pixel_values"].flip(-1) * 2}
    return model(**batch).loss + model(**other).loss


def make_beit() -> nn.Module:
    """Its biases of relative positions must follow the tokens of their own forward; a ViT has nothing of that kind."""
    torch.manual_seed(0)
    settings = {"use_relative_position_bias": True, "drop_path_rate": 0.0, "layer_scale_init_value": 1.0}
    model = BeitForImageClassification(BeitConfig(**SIZES, **settings, num_labels=3)).eval()
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.uniform_(parameter, -2, 2)
    return model


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize(
    ("make_model", "method"),
    [
        (make_beit, "bsr"),
        (make_beit, "lora"),
        (FAMILIES["vit"], "moe"),
        (make_beit, "alast"),
        (FAMILIES["vit"], "synqt"),
    ],
    ids=["beit-bsr", "beit-lora", "vit-moe", "beit-alast", "vit-synqt"],
)
def test_two_forwards_before_a_backward(make_model, method, train, use_reentrant, tmp_path):
    """3. State of the latest forward, read in a recomputation, gave gradients wrong by 0.6 to 1.1."""
    torch.manual_seed(0)
    model = attach(make_model(), method)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    train(model, tmp_path, 2, loss_of=two_forwards)
    assert_near(trained(model), reference(make_model, method, tmp_path, loss_of=two_forwards))


@pytest.mark.parametrize("method", ["alast", "bsr", "synqt"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_as_large_as_the_kept_tokens(make_model, method, training, tmp_path):
    """4. A residual with the old token count broadcasts where sizes happen to match."""
    base = make_model()
    config = BSRConfig(trainable_blocks=[2, 3], reduction_blocks=[1]) if method == "bsr" else CONFIGS[method]
    model = get_peft_model(base, copy.deepcopy(config)).train(training)
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # 1 + 8 + 1 tokens stay
    together = model(pixel_values=images).logits
    alone = torch.cat([model(pixel_values=image[None]).logits for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_rotating_blocks_before_the_optimizer_exists(make_model, train, tmp_path):
    """6. A draw freezes blocks; an optimizer made after it misses them for good."""
    model = attach(make_model(), "alast").train()
    model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.sum().backward()  # a look at the loss, and blocks are drawn
    with pytest.raises(TrainabilityError, match="are meant to train, but the optimizer does not hold them"):
        train(model, tmp_path, 2)


def test_rotating_reaches_every_block(make_model, train, tmp_path):
    model = attach(make_model(), "alast")
    start = trained(model)
    train(model, tmp_path, 8)
    moved = {
        n.split("layers.")[1][0] for n, p in trained(model).items() if "layers" in n and not torch.equal(p, start[n])
    }
    assert moved == {"0", "1", "2", "3"}


@pytest.mark.sampled(3)
def test_an_adapter_loaded_again_goes_on_training(make_model, method, train, tmp_path):
    """Resuming must not leave frozen what trained: every part moves on, and the steps are those of one run."""
    if method == "alast":
        pytest.skip("its draws depend on the step: tests/training/test_alast_trainer.py resumes it")
    train(attach(make_model(), method), tmp_path, 1)
    model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    start = trained(model)
    train(model, tmp_path / "more", 1)
    unmoved = [n for n, p in trained(model).items() if torch.equal(p, start[n])]
    assert len(unmoved) < 0.4 * len(start)
    frozen = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    with pytest.raises((TrainabilityError, ValueError), match=r"is_trainable=True|empty parameter list"):
        train(frozen, tmp_path / "frozen", 1)


@pytest.mark.sampled(3)
def test_the_head_is_saved(make_model, method, train, tmp_path):
    """A head that is trained and not saved loads as a random one."""
    model = attach(make_model(), method)
    train(model, tmp_path, 2)
    other = make_model()
    nn.init.normal_(other.classifier.weight)
    reloaded = PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    images = Blobs(3, seed=5).images
    with torch.no_grad():
        assert torch.equal(reloaded(pixel_values=images).logits, model.eval()(pixel_values=images).logits)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("train", [bare, pytest.param(trainer, marks=pytest.mark.slow)], ids=["bare", "trainer"])
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_compiled_blocks_follow_the_freezing(make_model, method, train, when, tmp_path):
    """7. One graph per pattern of freezing: blocks are compiled one by one, before or after the adapter comes."""
    base = make_model()
    blocks = list(base.vit.layers)
    torch.compiler.reset()
    for block in blocks if when == "before" else ():
        block.compile(backend="eager")
    model = attach(base, method)
    for block in blocks if when == "after" else ():
        block.compile(backend="eager")
    train(model, tmp_path, 2)
    assert_near(trained(model), reference(make_model, method, tmp_path))
