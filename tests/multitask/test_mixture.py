"""Mixtures of experts in blocks: the literal reference, step 0, lean halves, recomputation, cost."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, MoEConfig, UnsupportedModelError, record_usage
from peft_bsr.core import TaskCall
from peft_bsr.cost import count_flops
from peft_bsr.multitask import FullExperts, Mixture, PlainMLP

pytestmark = pytest.mark.sampled(2)

_path = Path(__file__).parents[1] / "reference" / "experts.py"
_spec = importlib.util.spec_from_file_location("reference_experts", _path)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

IDS = [0, 2, 1, 1, 0, 2]
LABELS = [4, 2, 3, 0, 1, 1]


def make_mixture(renormalize=True):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
    config = MoEConfig(num_experts=5, top_k=2, renormalize=renormalize)
    values = [(m.weight, m.bias) for m in (first, second)]
    mixture = Mixture(FullExperts(*values, config), 3, 8, config, first.weight)
    for parameter in mixture.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.5)
    return mixture, PlainMLP(first, torch.nn.GELU(), second)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("tasks", [[1, 1, 1], [2, 0, 1]], ids=str)
def test_grouped_routing_equals_the_literal_one_forward_and_backward(renormalize, tasks):
    mixture, mlp = make_mixture(renormalize)
    tokens = torch.randn(3, 7, 8, requires_grad=True)
    call = TaskCall(tasks[0] if len(set(tasks)) == 1 else torch.tensor(tasks))
    experts = dict(mixture.experts.named_parameters())
    found = mixture(tokens, call, 0, mlp)
    expected = reference.mixture_of_experts(tokens, tasks, mixture.gates, experts, 2, renormalize)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights, sources = torch.randn_like(found), [tokens, *mixture.parameters()]
    gradients = [torch.autograd.grad((output * weights).sum(), sources) for output in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_step_0_equals_the_dense_model_for_every_task(make_vit, images, run, keep_rate, expert_type):
    settings = {"trainable_blocks": [1, 3], "tasks": {"a": 5, "b": 4}, "keep_rate": keep_rate}
    outputs = []
    for moe in (None, MoEConfig(num_experts=5, top_k=2, expert_type=expert_type)):
        model = get_peft_model(make_vit(), BSRConfig(**settings, moe=moe)).eval()
        heads = model.base_model.model.classifier.bsr_params["default"].heads
        for head in heads:  # the same in both
            torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
        outputs.append([run(model, images, task=task) for task in ("a", "b")])
    for dense, mixed in zip(*outputs, strict=True):
        torch.testing.assert_close(mixed, dense, atol=1e-5, rtol=1e-5)


def test_the_paper_starts_below_the_dense_model(make_vit, make_config, images, run):
    config = make_config(preset="paper", keep_rate=None, init_weights=True)
    assert (config.keep_rate, config.fuse_dropped, config.moe.renormalize) == (0.7, False, False)
    model = get_peft_model(make_vit(), config).eval()
    dense = get_peft_model(make_vit(), make_config(moe={"num_experts": 1, "top_k": 1}, init_weights=True)).eval()
    with torch.no_grad():
        for layers in (model, dense):
            for head in layers.base_model.model.classifier.bsr_params["default"].heads:
                torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(run(model, images, task="zoo"), run(dense, images, task="zoo"), atol=1e-3)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model, images, **kwargs):
    model.zero_grad()
    kwargs = kwargs or {"task_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS)}
    output = model.train()(pixel_values=images, **kwargs)
    output.loss.backward()
    return output.loss.detach(), gradients_of(model)


def same(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        scale = gradient.abs().max().clamp_min(1e-3)
        assert float((gradient - second[name]).abs().max() / scale) < tolerance, name


@pytest.mark.parametrize("lean", ["exact", "max"])
def test_lean_blocks_give_the_gradients_of_stock_ones(make_vit, make_config, images, lean, expert_type):
    found = []
    for level in ("off", lean):
        torch.manual_seed(3)
        model = get_peft_model(make_vit(), make_config(lean=level, moe={"expert_type": expert_type}))
        found.append(train_step(model, images))
        if level != "off":
            assert model.base_model.plan().blocks[1].lean.attention
    torch.testing.assert_close(found[0][0], found[1][0])
    same(found[0][1], found[1][1], 1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("lean", ["off", "exact"])
def test_checkpointing_sees_the_same_tasks_also_two_forwards_later(make_vit, make_config, images, use_reentrant, lean):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(make_vit(), make_config(lean=lean)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        labels = torch.tensor(LABELS)
        first = model(pixel_values=images, task_ids=torch.tensor(IDS), labels=labels).loss
        second = model(pixel_values=images.flip(0), task="digits", labels=labels.clamp_max(3)).loss
        (first + second).backward()
        found.append(gradients_of(model))
    same(*found)


def test_int8_activations_and_experts(make_vit, make_config, images):
    """What a forward gives is exact; gradients are off by 2 % at most."""
    found = []
    for kind in ("full", "int8"):
        torch.manual_seed(3)
        found.append(train_step(get_peft_model(make_vit(), make_config(saved_activations=kind)), images))
    (loss, exact), (rounded_loss, rounded) = found
    torch.testing.assert_close(rounded_loss, loss)
    assert exact.keys() == rounded.keys()
    expected, gradients = (torch.cat([each[name].flatten() for name in exact]) for each in (exact, rounded))
    assert 0 < (gradients - expected).norm() <= 0.02 * expected.norm()


def test_a_mixed_batch_is_its_tasks_alone(model, images, run):
    ids = torch.tensor(IDS)
    mixed = run(model, images, task_ids=ids)
    for index, task in enumerate(["zoo", "digits", "clothes"]):
        torch.testing.assert_close(mixed[task], run(model, images[ids == index], task=task), atol=1e-5, rtol=1e-5)


def test_usage_counts_tokens_of_each_task_and_expert(model, images, run):
    with record_usage(model) as usage:
        run(model, images, task_ids=IDS)
        run(model, images[:2], task="digits")
    assert sorted(usage) == [1, 3]
    counts = model.base_model.plan().token_counts(17, 1)
    for block, table in usage.items():
        tokens = counts[block][1]
        assert table.sum(1).tolist() == [2 * 2 * tokens, 4 * 2 * tokens, 2 * 2 * tokens]
    with record_usage(model) as usage:
        pass
    assert usage == {}


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_balance_loss_reaches_the_gates(make_vit, make_config, images, use_reentrant):
    losses, gates = [], []
    for weight in (0.0, 0.5):
        torch.manual_seed(3)
        model = get_peft_model(make_vit(), make_config(moe={"balance_weight": weight}))
        if use_reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        loss, gradients = train_step(model, images)
        losses.append(loss)
        gates.append({name: g for name, g in gradients.items() if "gates" in name})
    assert losses[1] > losses[0]
    assert all(not torch.allclose(gates[0][name], gates[1][name]) for name in gates[0])
    model.eval()
    with torch.no_grad():
        output = model(pixel_values=images, task="zoo", labels=torch.tensor([0] * 6))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0] * 6))
    torch.testing.assert_close(output.loss, expected)


def test_balance_loss_without_a_gradient_is_refused(make_vit, make_config, images):
    model = get_peft_model(make_vit(), make_config(moe={"balance_weight": 0.5})).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant gradient checkpointing runs the blocks without a graph"):
        model(pixel_values=images, task="zoo", labels=torch.tensor([0] * 6))


def test_noise_and_dropout_act_in_training_alone(make_vit, make_config, images, run):
    for setting in ({"noise": 5.0}, {"dropout": 0.5}):
        model = get_peft_model(make_vit(), make_config(moe=setting)).eval()
        assert torch.equal(run(model, images, task="zoo"), run(model, images, task="zoo"))
        model.train()
        assert not torch.equal(run(model, images, task="zoo"), run(model, images, task="zoo"))


def test_cost_follows_top_k(make_vit, make_config, images, run):
    def macs(**moe):
        model = get_peft_model(make_vit(), make_config(keep_rate=1.0, moe=moe)).eval()
        return count_flops(lambda: run(model, images, task="zoo")) / 2

    gate, expert = 6 * 17 * 32 * 2, 6 * 17 * 2 * 32 * 64 * 2  # both of two blocks
    assert macs(num_experts=8, top_k=3) - macs(num_experts=8, top_k=1) == 2 * expert
    assert macs(num_experts=8, top_k=2) - macs(num_experts=4, top_k=2) == 4 * gate


def paper_macs(top_k, experts, keep_rate):
    """MACs of an image on ViT-B/16: patch embedding, blocks, gates, a head of 10 classes."""
    width, hidden, tokens, total = 768, 3072, 197, 196 * 768 * 768
    for block in range(12):
        total += 4 * tokens * width**2 + 2 * tokens**2 * width
        if block in (3, 6, 9):
            tokens = 1 + -int(-(keep_rate * (tokens - 1)) // 1) if keep_rate < 1 else tokens
        copies = top_k if block in (3, 7, 11) else 1
        total += copies * 2 * tokens * width * hidden
        total += tokens * width * experts if block in (3, 7, 11) and experts else 0
    return total + width * 10


@pytest.mark.parametrize(
    ("keep_rate", "top_k", "experts", "gmacs"),
    [(1.0, 1, 0, 17.56), (1.0, 4, 16, 25.94), (0.7, 4, 16, 15.82), (0.5, 4, 16, 11.19)],
)
def test_the_papers_macs_by_rule(keep_rate, top_k, experts, gmacs):
    assert paper_macs(top_k, experts, keep_rate) / 1e9 == pytest.approx(gmacs, abs=0.011)


@pytest.mark.slow
@pytest.mark.parametrize(("keep_rate", "gmacs"), [(1.0, 25.94), (0.7, 15.82), (0.5, 11.19)])
def test_the_papers_macs_and_parameters_measured(keep_rate, gmacs):
    base = ViTForImageClassification(ViTConfig(num_labels=10))
    tasks = {"cifar10": 10, "cifar100": 100, "pets": 37, "flowers": 102, "food": 101}
    config = BSRConfig(tasks=tasks, moe=MoEConfig(renormalize=False), keep_rate=keep_rate, fuse_dropped=False)
    model = get_peft_model(base, config).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        measured = count_flops(lambda: model(pixel_values=image, task="cifar10")) / 2
    assert measured == pytest.approx(paper_macs(4, 16, keep_rate), rel=1e-3)
    assert measured / 1e9 == pytest.approx(gmacs, abs=0.02)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    replaced = 3 * sum(p.numel() for p in model.base_model.model.vit.layers[3].parameters() if not p.requires_grad)
    head = sum(
        p.numel()
        for name in ("vit.layernorm", "classifier")
        for p in model.base_model.model.get_submodule(name).base_layer.parameters()
    )
    assert trained / 1e6 == pytest.approx(234, abs=0.5)
    assert (total - replaced - head) / 1e6 == pytest.approx(298.5, abs=0.3)


def test_blocks_that_are_no_plain_mlp_are_refused(images):
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    gated = Dinov2ForImageClassification(Dinov2Config(**sizes, use_swiglu_ffn=True, num_labels=3))
    with pytest.raises(UnsupportedModelError, match="experts are copies of an MLP of two Linear modules"):
        get_peft_model(gated, BSRConfig(tasks={"a": 2}, moe=MoEConfig(4, 2)))
    assert get_peft_model(gated, BSRConfig(tasks={"a": 2})).eval()(images).logits.shape == (6, 2)


def test_the_balance_loss_of_an_accumulated_step_counts_once(make_vit, make_config, images):
    torch.manual_seed(3)
    model = get_peft_model(make_vit(), make_config(moe={"balance_weight": 1.0})).train()
    batch = {"pixel_values": images, "task_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS)}
    whole = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(12)).loss, whole / 2)


def test_one_expert_is_balanced(make_vit, make_config, images):
    model = get_peft_model(make_vit(), make_config(moe={"num_experts": 1, "top_k": 1, "balance_weight": 1.0})).train()
    batch = {"pixel_values": images, "task_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS)}
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
