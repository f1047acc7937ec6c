"""SynQT's configuration, families, token reduction and what does not run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTPreTrainedModel

from peft_bsr import BSRConfig, ConfigError, SynQTConfig, UnsupportedModelError, record_routes
from peft_bsr.tuners.base.layer import find_controllers

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from families import SUPPORTED, run_batch

CLASSIFIERS = ["vit", "deit", "vit_msn", "ijepa", "ast", "vivit", "videomae", "dinov2", "dinov2_swiglu", "beit"]
CLASSIFIERS += ["dinov2_registers", "beit_shared_bias", "beit_no_bias", "data2vec", "data2vec_shared_bias", "clip"]
CLASSIFIERS += ["metaclip2", "siglip", "siglip2"]
SMALL = {"num_queries": 2, "bottleneck": 4, "attention_bottleneck": 2}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_queries": 0}, "`num_queries=0` must be an integer from 1 to 65536"),
        ({"num_queries": True}, "`num_queries=True`"),
        ({"bottleneck": 4.5}, "`bottleneck=4.5`"),
        ({"attention_bottleneck": "8"}, "`attention_bottleneck='8'`"),
        ({"feature_scale": None}, "`feature_scale=None` must be a number"),
        ({"attention_scale": "x"}, "`attention_scale='x'`"),
        ({"ffn_scale": True}, "`ffn_scale=True`"),
        ({"dropout": 1.0}, r"`dropout=1.0` must be a number in \[0, 1\)"),
        ({"drop_path": -0.1}, "`drop_path=-0.1`"),
        ({"layers": []}, r"`layers=\[\]` reads no block"),
        ({"layers": [1, 1]}, r"names \[1\] more than once"),
        ({"layers": [-1]}, "has negative indices"),
        ({"layers": "all"}, "must be a list of block indices or None"),
        ({"keep_rate": 0.0}, "a rate is a number"),
        ({"reduction_blocks": [1], "keep_rate": [0.5, 0.5]}, "has 2 rates for the 1 blocks"),
        ({"score": "norm"}, "`score='norm'` is unknown"),
        ({"kept_tokens": "int4"}, "`kept_tokens='int4'` is unknown. Use one of 'full', 'bfloat16'"),
        ({"target_modules": ["q_proj"]}, "choose the blocks to read with `layers`"),
        ({"task_type": "SEQ_CLS"}, "would make PEFT train a copy of the classifier"),
    ],
    ids=repr,
)
def test_bad_values_are_refused(values, text):
    with pytest.raises(ConfigError, match=f"SynQTConfig: .*{text}"):
        SynQTConfig(**values)


def test_what_the_model_does_not_allow_is_refused_and_nothing_is_changed(make_vit, snapshot, assert_unchanged):
    model = make_vit()
    before = snapshot(model)
    with pytest.raises(ConfigError) as error:
        get_peft_model(model, SynQTConfig(layers=[3, 4], reduction_blocks=[7], keep_rate=0.5))
    assert "`layers=[3, 4]` asks for block 4, but this model has 4 blocks (0 to 3). Use indices up to 3." in str(
        error.value
    )
    assert "`reduction_blocks=[7]` asks for block 7" in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", ["vit_bare", "deit_teacher", "clip_projection", "yolos", "blip", "vjepa2"])
def test_models_without_one_classifier_or_plain_attention_are_refused(family, snapshot, assert_unchanged):
    model = SUPPORTED[family]()
    model(**run_batch(model))  # transformers puts its own hooks on at the first call
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"takes the place of the classifier|differs from the block"):
        get_peft_model(model, SynQTConfig(**SMALL))
    assert_unchanged(model, before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_every_family_with_a_classifier_trains(family, keep_rate):
    torch.manual_seed(0)
    base = SUPPORTED[family]().requires_grad_(False)
    batch = run_batch(base)
    with torch.no_grad():
        expected = base(**batch).logits
    model = get_peft_model(base, SynQTConfig(**SMALL, keep_rate=keep_rate)).train()
    assert model.peft_config["default"].mode == (
        None if keep_rate == 1 else "full_view" if family == "siglip2" else "compact"
    )
    logits = model(**batch).logits
    assert logits.shape == expected.shape
    logits.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(g.abs().sum() > 0 for n, g in gradients.items() if "prompts" in n)
    with model.eval().disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    with torch.no_grad():
        assert torch.equal(model.unload()(**batch).logits, expected)


def test_labels_give_the_models_own_loss(make_vit, images):
    model = get_peft_model(make_vit(), SynQTConfig(**SMALL)).eval()
    output = model(pixel_values=images, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([0, 2])))
    model.config.problem_type = "multi_label_classification"
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    output = model(pixel_values=images, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.binary_cross_entropy_with_logits(output.logits, labels))


class RotaryClassifier(DINOv3ViTPreTrainedModel):
    """DINOv3 has no classifier of its own in transformers."""

    def __init__(self) -> None:
        backbone = SUPPORTED["dinov3"]()
        super().__init__(backbone.config)
        self.backbone, self.classifier = backbone, nn.Linear(32, 3)

    def forward(self, pixel_values, **kwargs):
        hidden = self.backbone(pixel_values, **kwargs).last_hidden_state[:, 0]
        return ImageClassifierOutput(logits=self.classifier(hidden))


@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_queries_of_a_rotary_model_read_keys_that_are_not_rotated(images, keep_rate):
    """Where patches lie does not reach the first layer that is read: shuffled tokens give the same."""
    torch.manual_seed(0)
    base = RotaryClassifier().eval()
    model = get_peft_model(base, SynQTConfig(**SMALL, layers=[0], keep_rate=keep_rate)).eval()
    controller = find_controllers(model)[0]
    path, block = controller.paths["default"], base.backbone.get_submodule("model.layer.0")
    tokens, queries = torch.randn(1, 21, 32), torch.randn(1, 2, 32)
    order = torch.randperm(21)
    for a, b in zip(path.read(block, queries, tokens), path.read(block, queries, tokens[:, order]), strict=True):
        torch.testing.assert_close(a, b)
    assert model(pixel_values=images).logits.shape == (2, 3)


def count_calls(model, part="attention"):
    calls = []
    for i, block in enumerate(model.get_base_model().vit.layers):
        getattr(block, part).register_forward_hook(lambda *_, i=i: calls.append(i))
    return calls


@pytest.mark.parametrize("training", [True, False])
def test_blocks_run_once_without_a_graph_and_the_last_read_one_not_at_all(make_vit, images, training):
    model = get_peft_model(make_vit(depth=6), SynQTConfig(**SMALL, layers=[1, 3])).train(training)
    calls = count_calls(model)
    states = []
    model.get_base_model().vit.layers[2].mlp.register_forward_hook(lambda _m, _a, output: states.append(output))
    assert model(pixel_values=images.clone().requires_grad_()).logits.requires_grad
    assert calls == [0, 1, 2]
    assert not states[0].requires_grad and states[0].grad_fn is None


def test_nothing_stays_on_the_context(make_vit, images):
    model = get_peft_model(make_vit(), SynQTConfig(**SMALL, keep_rate=0.5))
    model(pixel_values=images)
    context = find_controllers(model)[0].context
    assert context.now.reading is context.now.route is context.now.running is context.now.owner is None


def test_all_tokens_kept_is_no_reduction_bit_for_bit(make_vit, images, run):
    outputs = []
    for settings in ({}, {"keep_rate": 1.0, "reduction_blocks": [0, 1]}, {"keep_rate": 0.5, "reduction_blocks": []}):
        torch.manual_seed(0)
        outputs.append(run(get_peft_model(make_vit(), SynQTConfig(**SMALL, **settings)).eval(), images))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("mode", ["compact", "full_view"])
def test_queries_read_the_tokens_that_bsr_would_keep(make_vit, images, mode):
    """Each layer's tokens under a reduction are LN1 of what the same block gets in a model reduced by BSR."""
    settings = {"keep_rate": 0.5, "reduction_blocks": [0, 2], "mode": mode}
    reduced = get_peft_model(make_vit(), BSRConfig(trainable_blocks=[3], **settings)).eval()
    entering = {}
    for i, block in enumerate(reduced.get_base_model().vit.layers):
        norm = block.layernorm_before
        norm.register_forward_hook(lambda _m, _a, output, i=i: entering.setdefault(i, output))
    model = get_peft_model(make_vit(), SynQTConfig(**SMALL, **settings)).eval()
    read = {}
    for controller in find_controllers(model):
        stock = controller._read
        controller._read = lambda n, b, tokens, h, i=controller.index, stock=stock: (
            read.setdefault(i, tokens) is None or stock(n, b, tokens, h)
        )
    with torch.no_grad():
        reduced(pixel_values=images)
        with record_routes(model) as routes:
            model(pixel_values=images)
    assert [t.shape[1] for t in read.values()] == ([17, 10, 10, 7] if mode == "compact" else [17, 9, 9, 5])
    for i, tokens in read.items():
        assert torch.equal(tokens, entering[i])
    assert [i for i, _ in routes] == [0, 2]


def test_a_reduction_that_nothing_is_read_behind_is_left_out(make_vit):
    model = get_peft_model(make_vit(), SynQTConfig(**SMALL, layers=[0, 1], keep_rate=0.5, reduction_blocks=[0, 1, 3]))
    blocks = model.base_model.plan().blocks
    assert [i for i, block in enumerate(blocks) if block.reduction] == [0]


@pytest.mark.parametrize("kept", ["bfloat16", "float16", "int8"])
def test_rounded_tokens_change_gradients_a_little_and_outputs_not_at_all(make_vit, images, kept):
    found = []
    for how in ("full", kept):
        torch.manual_seed(0)
        model = get_peft_model(make_vit(), SynQTConfig(**SMALL, kept_tokens=how, dropout=0.0, drop_path=0.0)).train()
        output = model(pixel_values=images, labels=torch.tensor([0, 1]))
        output.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        found.append((output.logits, gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert 0 < float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 2e-2


def test_the_probe_leaves_the_random_state_alone(make_vit):
    model = make_vit()
    outcomes = []
    for _ in range(2):
        torch.manual_seed(11)
        adapted = get_peft_model(model, SynQTConfig(**SMALL))
        outcomes.append(find_controllers(adapted)[0].synqt_params["default"].prompts.detach().clone())
        model = adapted.unload()
    assert torch.equal(*outcomes)
