"""LoSA's tokens equal a literal reference; gradients, parameters and saved activations are what its design says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import LoSAConfig, record_routes
from peft_bsr.cost import estimate, saved_activations
from peft_bsr.engine import MixerWeights, mix_tokens
from peft_bsr.tuners.base.layer import find_controllers

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))

import losa

TOKEN = 197 * 768 * 4 / 2**20  # MiB of one token tensor of ViT-B/16


def weights_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": "every:2"},
        {"layers": [0, 1]},
        {"token_mixing": False},
        {"keep_rate": 0.5, "fuse_dropped": False},
        {"keep_rate": 0.5, "mode": "full_view", "reduce_at": "after_block"},
        {"keep_rate": 0.5, "fuse_dropped": False, "layers": [0, 2], "reduction_blocks": [1, 3]},
    ],
    ids=str,
)
def test_the_heads_tokens_are_the_references(make_vit, images, settings):
    """In training the head's norm gets the class token alone; in evaluation all tokens."""
    model = get_peft_model(make_vit(), LoSAConfig(r=4, token_r=3, init_weights=False, **settings)).eval()
    vit, stock, given = model.get_base_model().vit, [], []
    # a block's own output, before it is refined, is what its second residual gives: dropout is the identity here
    controllers = find_controllers(model)
    for controller in controllers:
        refine = controller.refine
        controller.refine = lambda block, tokens, route, refine=refine: (
            stock.append(tokens.double().numpy()),
            refine(block, tokens, route),
        )[1]
    vit.layernorm.register_forward_pre_hook(lambda _m, args: given.append(args[0].double().numpy()))
    with torch.no_grad(), record_routes(model) as routes:
        model(images)
    mixers = {c.index: weights_of(c.bsr_params["default"]) for c in controllers if len(c.bsr_params)}
    assert sorted(mixers) == model.base_model.layers()
    found = dict(routes) if model.base_model.plan().mode == "compact" else {}
    for image in range(2):
        places, alive = [], np.arange(17)
        for index in range(4):
            alive = found[index].places()[image].numpy() if index in found else alive
            places.append(alive)
        expected = losa.refined([output[image] for output in stock], mixers, places)
        np.testing.assert_allclose(given[0][image], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("by_image", [True, False])
def test_the_recomputed_gradient_is_autograds(with_tokens, by_image):
    torch.manual_seed(0)
    batch, number, width, rank = 2, 7, 12, 3
    shapes = [(width,), (width,), (rank, width), (rank,), (width, rank), (width,)]
    per_image = (batch,) if by_image else ()
    shapes += [(*per_image, rank, number), (rank,), (*per_image, number, rank), (*per_image, number)] * with_tokens
    given = [torch.randn(2, number, width), *map(torch.randn, shapes)]

    def gradients(function):
        inputs = [tensor.double().requires_grad_() for tensor in given]
        output = function(inputs[0], MixerWeights(*inputs[1:]), 1e-5)
        return [output.detach(), *torch.autograd.grad((output * output.detach().cos()).sum(), inputs)]

    expected = gradients(lambda tokens, weights, eps: weights.mix(tokens, eps))
    for found, exact in zip(gradients(mix_tokens), expected, strict=True):
        assert float((found - exact).norm() / exact.norm()) < 1e-10
    tokens, weights = given[0], MixerWeights(*(tensor.requires_grad_() for tensor in given[1:]))
    whole, rounded = (mix_tokens(tokens, weights, 1e-5, kept) for kept in ("full", "int8"))
    assert torch.equal(whole, rounded)  # the forward does not change
    own = [tensor for tensor in weights if tensor is not None]
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(t.square().sum(), own)]) for t in (whole, rounded))
    assert 0 < (a - b).norm() < 0.05 * a.norm()


def test_second_derivatives_are_refused(make_vit, images):
    model = get_peft_model(make_vit(), LoSAConfig(r=2, token_r=2, init_weights=False)).train()
    parameter = model.get_parameter("base_model.model.vit.layers.1.token_router.bsr_params.default.channel_down.weight")
    (gradient,) = torch.autograd.grad(model(images).logits.sum(), parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("settings", "parameters", "mib"),
    [
        ({}, 382_524 + 18_432, 12 * TOKEN),
        pytest.param(
            {"r": 8, "token_r": 8, "layers": "every:4", "kept_tokens": "int8"},
            (197_052 + 18_432) // 4,
            3 * TOKEN * 13 / 48,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["all", "every fourth in int8"],
)
def test_vit_b_keeps_and_trains_what_is_promised(settings, parameters, mib):
    """And the head's norm nothing, because it reads the class token alone."""
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(num_labels=10))
    found = estimate(vit, LoSAConfig(**settings), batch_size=2)
    head = 2 * 768 + 769 * 10
    assert found.trainable_parameters == parameters + head
    assert found.saved_bytes / 2 / 2**20 == pytest.approx(mib, rel=0.02)


@pytest.mark.slow
def test_what_is_estimated_is_kept(make_vit, images):
    config = LoSAConfig(r=4, token_r=4, keep_rate=0.5, kept_tokens="int8")
    expected = estimate(make_vit(), config, batch_size=2).saved_bytes
    model = get_peft_model(make_vit(), config).train()
    assert saved_activations(model, lambda: model(images, labels=torch.tensor([0, 1])).loss) == pytest.approx(
        expected, rel=0.02
    )
