"""Where gradients go, where they do not, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_bsr import BSRConfig
from peft_bsr.cost import saved_activations

CONFIG = {"trainable_blocks": [2, 3], "reduction_blocks": [1, 2]}


def loss_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model(pixel_values=images)
    logits = getattr(output, "logits", None)
    return (output.last_hidden_state if logits is None else logits).square().mean()


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_exactly_the_plan_gets_a_gradient(family, trainable, make_model, images):
    model = get_peft_model(make_model(family), BSRConfig(**CONFIG, trainable=trainable, init_weights=False)).train()
    loss_of(model, images).backward()
    spec = model.base_model.spec
    expected = {
        f"base_model.model.{spec.blocks[i]}.{leaf}"
        for i in (2, 3)
        for leaf in spec.param_modules
        if trainable == "full" or hasattr(make_model(family).get_submodule(f"{spec.blocks[i]}.{leaf}"), "in_features")
    } | {f"base_model.model.{name}" for name in spec.head}
    if family == "vit_bare":
        expected.remove("base_model.model.pooler.dense")  # this loss does not read the pooler
    if family == "clip_bare":
        expected.remove("base_model.model.post_layernorm")
    found = {n.split(".bsr_params.")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert found == expected
    assert not [n for n, p in model.named_parameters() if p.grad is not None and ".bsr_params." not in n]


def test_gradients_equal_those_of_the_plain_model(family, make_model, images):
    """Without reduction, a trained copy gets the gradient that the block has in full fine-tuning."""
    plain = make_model(family).train()
    loss_of(plain, images).backward()
    model = get_peft_model(make_model(family), BSRConfig(**CONFIG | {"keep_rate": 1.0})).train()
    loss_of(model, images).backward()
    gradients = {
        n.replace("base_model.model.", "").replace(".bsr_params.default", ""): p.grad
        for n, p in model.named_parameters()
    }
    compared = 0
    for name, parameter in plain.named_parameters():
        if gradients.get(name) is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-7, rtol=1e-5)
            compared += 1
    assert compared >= 32


def saved(model: torch.nn.Module, images: torch.Tensor) -> int:
    return saved_activations(model, lambda: loss_of(model.train(), images))


@pytest.mark.parametrize("keep_rate", [0.5, 1.0])
def test_input_require_grads_puts_no_frozen_block_into_the_graph(keep_rate, make_model, images):
    model = get_peft_model(make_model(), BSRConfig(**CONFIG | {"keep_rate": keep_rate}))
    plain = saved(model, images)
    model.enable_input_require_grads()
    assert saved(model, images) == plain


def test_frozen_leading_blocks_save_nothing(make_model, images):
    early, late = (
        saved(get_peft_model(make_model(), BSRConfig(trainable_blocks=[i, 3], keep_rate=1.0)), images) for i in (0, 2)
    )
    assert late < 0.65 * early


def test_evaluation_lets_input_gradients_through(make_model, images):
    """Saliency maps need them; only training cuts the graph."""
    model = get_peft_model(make_model(), BSRConfig(**CONFIG)).eval()
    pixels = images.clone().requires_grad_()
    loss_of(model, pixels).backward()
    assert pixels.grad.abs().sum() > 0


def test_leading_blocks_stay_in_evaluation_mode(make_model, images):
    base = make_model("vit").train()
    dropout = [m for m in base.modules() if isinstance(m, torch.nn.Dropout)]
    for module in dropout[1:]:  # not that of the embeddings
        module.p = 0.5
    model = get_peft_model(base, BSRConfig(trainable_blocks=[2, 3], reduction_blocks=[]))
    seen = []
    model.base_model.model.vit.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for _ in range(2):
        model.train()(pixel_values=images)
    assert torch.equal(*seen)
    modes = [[m.training for m in block.modules()] for block in model.base_model.model.vit.layers]
    assert [any(m[1:]) for m in modes] == [False, False, True, True] and all(m[0] for m in modes)
    with model.disable_adapter():
        assert all(m.training for m in model.base_model.model.vit.layers[0].modules())
    assert not any(m.training for m in model.base_model.model.vit.layers[0].children())
    assert all(m.training for m in model.unload().modules())
