from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    Dinov2Backbone,
    Dinov2Config,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
)

from peft_bsr import (
    ALaSTConfig,
    BSRConfig,
    ConfigError,
    UnsupportedModelError,
    probe_model,
    register_family,
    unregister_family,
)
from peft_bsr.backbones import find_rule, quiet, seed

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}

EXPECTED = {  # prefix tokens, head, prefix positions read, patches read
    "vit": (1, ("vit.layernorm", "classifier"), (0,), False),
    "vit_bare": (1, ("layernorm", "pooler.dense"), (0,), True),
    "deit": (2, ("deit.layernorm", "classifier"), (0,), False),
    "deit_teacher": (2, ("deit.layernorm", "cls_classifier", "distillation_classifier"), (0, 1), False),
    "vit_msn": (1, ("vit.layernorm", "classifier"), (0,), False),
    "dinov2": (1, ("dinov2.layernorm", "classifier"), (0,), True),
    "dinov2_registers": (4, ("dinov2_with_registers.layernorm", "classifier"), (0,), True),
    "clip": (1, ("classifier",), (), True),
    "clip_bare": (1, ("post_layernorm",), (0,), True),
}


def test_column_of_every_family(family, make_model):
    spec = probe_model(make_model(family))
    assert (spec.num_prefix, spec.head, spec.reads_prefix, spec.reads_patches) == EXPECTED[family]
    assert (spec.depth, spec.width, spec.grid, spec.patch_size) == (4, 32, (4, 4), (8, 8))
    assert spec.num_tokens == spec.num_prefix + 16


def test_probing_leaves_no_trace(family, make_model):
    model = make_model(family).train()
    first = next(model.children())
    first.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    probe_model(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_frozen_model_is_probed_alike(make_model):
    assert probe_model(make_model().requires_grad_(False)) == probe_model(make_model())


def test_half_precision_models_are_probed_alike(make_model):
    assert probe_model(make_model().bfloat16()) == probe_model(make_model())


REFUSED = {
    "BERT (text)": (
        lambda: BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30)
        ),
        "it takes text, not images",
    ),
    "a convolutional network": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "no list of equal blocks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_with_the_reason_and_what_is_supported(name):
    make, reason = REFUSED[name]
    model = make().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        probe_model(model)
    message = str(caught.value)
    assert "see docs/new_model.md" in message or "Use PEFT's LoRA for it; docs/compatibility.md lists" in message
    assert len(message) < 250
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not [h for m in model.modules() for h in m._forward_hooks.values() if "peft_bsr" in h.__module__]


def test_the_last_block_that_counts(make_model):
    """A backbone's `out_indices` and some dense heads leave the last blocks unread."""
    assert probe_model(make_model()).last_read == 3
    backbone = Dinov2Backbone(Dinov2Config(**SIZES, mlp_ratio=2, out_indices=[1, 2]))
    spec = probe_model(backbone)
    assert spec.last_read == 1
    assert spec.reads_patches
    get_peft_model(backbone, BSRConfig(trainable_blocks=[0, 1], reduction_blocks=[]))


@pytest.mark.parametrize("config", [BSRConfig(trainable_blocks=[1, 3]), ALaSTConfig()], ids=["bsr", "alast"])
def test_blocks_that_would_train_for_nothing_are_refused(config):
    backbone = Dinov2Backbone(Dinov2Config(**SIZES, mlp_ratio=2, out_indices=[1, 2]))
    with pytest.raises(ConfigError, match=r"3 would train without effect.*with blocks 0 to 1\."):
        get_peft_model(backbone, config)


def test_positions_that_nothing_tells_are_refused(make_model, monkeypatch):
    """An attention that counts its tokens by itself cannot run on fewer."""
    model = make_model("vit")
    attention_class = type(model.vit.layers[0].attention)
    stock = attention_class.forward

    def forward(self, hidden_states, *args, **kwargs):
        ramp = torch.linspace(0, 1, hidden_states.shape[1])[None, :, None]
        return stock(self, hidden_states + ramp, *args, **kwargs)

    monkeypatch.setattr(attention_class, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="so they cannot run on fewer tokens"):
        probe_model(model)


def test_a_fresh_table_of_zeros_does_not_hide_that_positions_count():
    """Data2Vec makes its bias inside the attention; without its entry, nothing would select the kept tokens' part."""
    model = Data2VecVisionForImageClassification(Data2VecVisionConfig(**SIZES, use_relative_position_bias=True)).eval()
    assert (
        not model.data2vec_vision.encoder.layer[0]
        .attention.attention.relative_position_bias.state_dict()["relative_position_bias_table"]
        .any()
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert probe_model(model).uses_positions
    rule = find_rule(model)
    unregister_family("data2vec-vision")
    try:
        with pytest.raises(UnsupportedModelError, match="its blocks use the position of a token inside"):
            probe_model(model)
    finally:
        register_family("data2vec-vision", rule)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tokens_that_do_not_depend_on_the_image_are_special_only_at_the_ends(make_model):
    model = make_model("vit")

    def blank_the_middle(_module, _args, embeddings):
        embeddings[:, 7] = 0.5
        return embeddings

    model.vit.embeddings.register_forward_hook(blank_the_middle)
    with pytest.raises(UnsupportedModelError, match=r"are among the patches, at \[0, 7\]"):
        probe_model(model)


def test_the_roles_of_leaves_do_not_depend_on_their_names(make_model):
    """ViT's and the older layout's parts (VideoMAE still has it) are called the same."""
    config = VideoMAEConfig(**{**SIZES, "image_size": 16}, num_frames=4)
    old = probe_model(VideoMAEForVideoClassification(config))
    new = probe_model(make_model("vit"))
    assert set(old.canonical_names) == set(new.canonical_names)
    assert old.paths["mlp.1"] == "output.dense"
    assert new.paths["mlp.1"] == "mlp.fc2"


def test_weights_on_the_meta_device_are_refused(make_model):
    with pytest.raises(UnsupportedModelError, match="meta device"):
        probe_model(make_model().to("meta"))


def test_random_numbers_of_other_devices_are_left_alone(make_model, monkeypatch):
    """`torch.manual_seed` seeds every device, CUDA before its first use too: the user's own seed would be lost."""
    model, seeded = make_model(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    get_peft_model(model, BSRConfig(trainable="lora"))
    assert not seeded
    torch.manual_seed(42)
    assert seeded == [42]


def test_the_random_state_of_an_apple_gpu_is_restored(monkeypatch):
    """There is none here: a generator of the CPU stands in for its own."""
    generator = torch.Generator()
    monkeypatch.setattr(torch.mps, "manual_seed", generator.manual_seed)
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    model, weight = nn.Linear(1, 1), SimpleNamespace(device=torch.device("mps", 0), is_inference=lambda: False)
    monkeypatch.setattr(model, "parameters", lambda: iter([weight]))
    before = generator.get_state()
    with quiet(model):
        seed(model)
        assert not torch.equal(generator.get_state(), before)
    assert torch.equal(generator.get_state(), before)
