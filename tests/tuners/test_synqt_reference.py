"""Outputs equal a literal reference; parameters, saved activations and gradients are what the paper's design says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import SynQTConfig
from peft_bsr.cost import saved_activations
from peft_bsr.tuners.base.layer import find_controllers
from peft_bsr.tuners.synqt.layer import Reading, SynQTHead

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))

import synqt

PARAMETERS = {1: 2_622_866, 4: 2_650_514, 16: 2_761_106}
MIB_PER_IMAGE = {1: 8.4, 4: 11.3, 16: 22.6}


def randomize(model: torch.nn.Module) -> None:
    """Adapters start as the identity, which would hide whatever is wrong inside."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "synqt_params" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def synqt_vit(make_vit, **settings):
    torch.manual_seed(1)
    base = make_vit()
    with torch.no_grad():
        for p in base.parameters():  # away from the tiny start, where attention is uniform
            p.add_(torch.randn_like(p) * 0.1)
    model = get_peft_model(base, SynQTConfig(num_queries=3, bottleneck=6, attention_bottleneck=2, **settings))
    randomize(model)
    return model.eval()


def weights_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def expected_features(model, images):
    base, controllers = model.get_base_model(), find_controllers(model)
    with torch.no_grad():
        embedded = base.vit.embeddings(images).double().numpy()
    blocks = [weights_of(layer) for layer in base.vit.layers]
    layers = {r.index: weights_of(r.synqt_params["default"]) for r in controllers if r.synqt_params}
    eps = base.config.layer_norm_eps
    return np.stack([synqt.features(x, blocks, layers, base.config.num_attention_heads, eps) for x in embedded])


@pytest.fixture
def seen(monkeypatch):
    """Features [B, 1 + 3 L, D] that the head got."""
    found = []
    stock = Reading.features
    monkeypatch.setattr(Reading, "features", lambda self: found.append(stock(self)) or found[-1])
    return found


@pytest.mark.parametrize("layers", [None, [0, 2], [1, 3]], ids=repr)
@pytest.mark.parametrize("absorbs", [True, False])
def test_features_and_logits_equal_the_reference(make_vit, images, seen, layers, absorbs):
    model = synqt_vit(make_vit, layers=layers)
    for controller in find_controllers(model):
        controller.paths["default"] = type(controller.paths["default"])(controller.spec, absorbs)
    with torch.no_grad():
        logits = model(pixel_values=images).logits
    expected = expected_features(model, images)
    assert expected.shape[1] == 1 + 3 * len(layers or range(4))
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-5, rtol=1e-5)
    head = weights_of(model.get_base_model().classifier.synqt_params["default"])
    rows = [synqt.classify(f, head, model.get_base_model().config.layer_norm_eps) for f in expected]
    np.testing.assert_allclose(logits.numpy(), np.stack(rows), atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_starts_as_the_equations_say(make_vit):
    torch.manual_seed(0)
    base = make_vit()
    with torch.no_grad():
        base.vit.layernorm.weight.uniform_()
    model = get_peft_model(base, SynQTConfig(feature_scale=0.2, attention_scale=0.3, ffn_scale=0.4))
    controllers = find_controllers(model)
    for controller in controllers:
        module = controller.synqt_params["default"]
        assert module.prompts.abs().max() <= 1 and module.prompts.std() > 0.5
        assert (module.attention_scale.item(), module.ffn_scale.item()) == pytest.approx((0.3, 0.4))
        assert (module.feature_scale is None) == (controller.index > 0)
        x = torch.randn(1, 2, 32)
        assert torch.equal(module.prompt_adapter(x), x)
    assert controllers[0].synqt_params["default"].feature_scale.item() == pytest.approx(0.2)
    head = base.classifier.synqt_params["default"]
    assert torch.equal(head.final_norm.weight, base.vit.layernorm.weight)
    assert head.final_norm.eps == base.vit.layernorm.eps


def test_no_gradient_reaches_the_backbone(make_vit, images):
    model = synqt_vit(make_vit).train()
    model.enable_input_require_grads()
    images = images.clone().requires_grad_()
    model(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("synqt_params" in name) == parameter.requires_grad, name
    assert images.grad is None


def test_gradients_are_those_of_finite_differences(make_vit, images):
    model = synqt_vit(make_vit).double()
    batch = {"pixel_values": images.double(), "labels": torch.tensor([0, 1])}
    model(**batch).loss.backward()
    for name in ("layers.1.token_router.synqt_params.default.prompts", "classifier.synqt_params.default.norm.weight"):
        parameter = model.get_parameter(f"base_model.model.{'' if name.startswith('class') else 'vit.'}{name}")
        place = (0,) * parameter.ndim
        losses = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter[place] += step
                losses.append(model(**batch).loss)
        slope = float(losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(float(parameter.grad[place]), rel=1e-4, abs=1e-9)


def test_dropout_and_drop_path_act_in_training_alone_and_blocks_stay_in_evaluation(make_vit, images):
    model = synqt_vit(make_vit)
    assert torch.equal(model(pixel_values=images).logits, model(pixel_values=images).logits)
    model.train()
    assert not torch.equal(model(pixel_values=images).logits, model(pixel_values=images).logits)
    controller = find_controllers(model)[0]
    block = model.get_base_model().vit.layers[0]
    assert controller.training and controller.synqt_params["default"].training
    assert not any(module.training for name, module in block.named_children() if name != "token_router")
    head = model.get_base_model().classifier.synqt_params["default"]
    branch = head._drop_paths(torch.ones(500, 13, 4))
    assert torch.equal(branch[:, 0], torch.ones(500, 4))
    kept = branch[:, 1:, 0] > 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(branch[:, 1:, 0][kept], torch.full((int(kept.sum()),), 1 / 0.7))


@pytest.mark.parametrize("num_queries", PARAMETERS)
def test_trainable_parameters_of_vit_base(num_queries):
    with torch.device("cpu"):
        base = ViTForImageClassification(ViTConfig(image_size=32, num_labels=10))  # the same side network as at 224 px
    model = get_peft_model(base, SynQTConfig(num_queries=num_queries))
    assert model.get_nb_trainable_parameters()[0] == PARAMETERS[num_queries] + 769 * 10


def saved_mib(**settings) -> float:
    torch.manual_seed(0)
    model = get_peft_model(ViTForImageClassification(ViTConfig(num_labels=10)), SynQTConfig(**settings)).train()
    batch = {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.tensor([0, 1])}
    return saved_activations(model, lambda: model(**batch).loss) / 2 / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("num_queries", MIB_PER_IMAGE)
def test_saved_activations_of_vit_base(num_queries):
    assert saved_mib(num_queries=num_queries) <= MIB_PER_IMAGE[num_queries]


def test_saved_activations_of_vit_base_with_fewer_tokens():
    assert saved_mib(num_queries=1, keep_rate=0.5, reduction_blocks=[3, 6, 9]) <= 5.0


def test_the_head_alone_is_refused(make_vit):
    model = synqt_vit(make_vit)
    head = model.get_base_model().classifier
    assert isinstance(head, SynQTHead)
    with pytest.raises(RuntimeError, match="was called without a forward of the model's blocks"):
        head(torch.randn(1, 32))
