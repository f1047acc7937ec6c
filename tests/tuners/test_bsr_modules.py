"""Which modules a BSR adapter trains: filters, `modules_to_save`, task types, low-rank updates."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, PeftModelForSequenceClassification, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file

from peft_bsr import BSRConfig

pytestmark = pytest.mark.sampled(2)

LINEARS = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {"mlp.fc1", "mlp.fc2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_base_starts_as_the_base_model(make_vit, images, run, trainable, dtype):
    inputs = images.to(dtype)
    expected = run(make_vit().to(dtype), inputs)
    config = BSRConfig(trainable_blocks=[1, 3], trainable=trainable, keep_rate=1.0)
    model = get_peft_model(make_vit().to(dtype), config, autocast_adapter_dtype=False).eval()
    assert torch.equal(run(model, inputs), expected)
    model = get_peft_model(make_vit().to(dtype), config).eval()
    torch.testing.assert_close(run(model, inputs), expected, atol=2e-2, rtol=2e-2)


def test_lora_scaling_is_alpha_over_r(make_vit, images, run):
    outputs = []
    for alpha, factor in ((8, 1.0), (4, 2.0)):
        config = BSRConfig(trainable_blocks=[3], trainable="lora", keep_rate=1.0, r=4, lora_alpha=alpha)
        model = get_peft_model(make_vit(), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    parameter.copy_(values * (factor if "lora_B" in name else 1))
        outputs.append(run(model, images))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], run(make_vit(), images), atol=1e-3)


def test_modules_to_save_takes_the_classifier(make_vit, make_config, images, run, tmp_path):
    model = get_peft_model(make_vit(), make_config(modules_to_save=["classifier"])).eval()
    assert isinstance(model.base_model.model.classifier, ModulesToSaveWrapper)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(0.5)
    expected = run(model, images)
    model(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {key for key in keys if "classifier" in key} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, adapter_name="q_proj").eval()
    assert torch.equal(run(loaded, images), expected)
    with model.disable_adapter():
        assert torch.equal(run(model, images), run(make_vit(), images))
    assert torch.equal(run(model.unload(), images), run(make_vit(), images))


@pytest.mark.parametrize("first", [["classifier"], None], ids=["first_saves", "second_saves"])
def test_adapters_with_and_without_modules_to_save_are_combined_or_refused_whole(
    make_vit, images, run, snapshot, assert_unchanged, first
):
    """Either both adapters work side by side, or the second one is refused before anything was changed."""
    settings = {"trainable_blocks": [1, 3], "init_weights": False, "keep_rate": 1.0}
    second = None if first else ["classifier"]
    model = get_peft_model(make_vit(), BSRConfig(**settings, modules_to_save=first)).eval()
    before, output = snapshot(model), run(model, images)
    try:
        model.add_adapter("second", BSRConfig(**settings, modules_to_save=second))
    except ValueError:
        assert_unchanged(model, before)
    else:
        model.set_adapter("second")
        assert not torch.equal(run(model, images), output)
        model.set_adapter("default")
    assert torch.equal(run(model, images), output)
    assert torch.equal(run(model.unload(), images), run(make_vit(), images))


def test_task_type_sequence_classification(make_vit, make_config, images, run, tmp_path):
    model = get_peft_model(make_vit(), make_config(task_type=TaskType.SEQ_CLS)).eval()
    assert isinstance(model, PeftModelForSequenceClassification)
    output = model(pixel_values=images, labels=torch.tensor([0, 1]))
    output.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    assert all(p.grad is not None for p in trained.values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert torch.equal(run(loaded, images), run(model, images))


FILTERS = [
    ({"target_modules": ["q_proj", "v_proj"]}, {"attention.q_proj", "attention.v_proj"}),
    ({"target_modules": ["attention.query", "mlp.0"]}, {"attention.q_proj", "mlp.fc1"}),
    ({"exclude_modules": ["norm1", "norm2", "mlp.1"]}, LINEARS - {"mlp.fc2"}),
    ({"target_modules": ["mlp.fc1"]}, {"mlp.fc1"}),
    ({"target_modules": r".*\.mlp\.fc\d"}, {"mlp.fc1", "mlp.fc2"}),
    ({"exclude_modules": ["fc1", "layernorm_before", "layernorm_after"]}, LINEARS - {"mlp.fc1"}),
    ({"exclude_modules": r".*(attention|layernorm_).*"}, {"mlp.fc1", "mlp.fc2"}),
    ({"target_modules": ["q_proj", "fc1"], "exclude_modules": ["fc1"]}, {"attention.q_proj"}),
]


@pytest.mark.parametrize(("filters", "param_modules"), FILTERS, ids=[repr(filters) for filters, _ in FILTERS])
def test_target_and_exclude_modules(make_vit, make_config, trainable, images, filters, param_modules):
    model = get_peft_model(make_vit(), make_config(**filters))
    names = {
        n.replace("base_model.model.", "").split(".bsr_params")[0]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert names == {f"vit.layers.{i}.{leaf}" for i in (1, 3) for leaf in param_modules} | {
        "vit.layernorm",
        "classifier",
    }
    model.train()(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_exclude_modules_may_name_the_head(make_vit, make_config):
    model = get_peft_model(make_vit(), make_config(exclude_modules=["classifier"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("classifier" in name for name in trained)
    assert any("vit.layernorm" in name for name in trained)
