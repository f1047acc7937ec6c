"""Cached look-ups are repeated when the model changes: lean blocks do what they do with `lean="off"`."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_bsr import BSRConfig

sys.path.insert(0, str(Path(__file__).parent))

from pairs import CONFIG, assert_alike, base_of, batch_of, make, step, stock_halves

pytestmark = [pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning"), pytest.mark.sampled(2)]


def layer(model, index=1):
    return base_of(model).vit.layers[index]


def replace_linear(model):
    torch.manual_seed(1)
    layer(model).mlp.fc1 = nn.Linear(32, 48).double()
    layer(model).mlp.fc2 = nn.Linear(48, 32).double()


def replace_norm(model):
    layer(model, 2).layernorm_after = nn.LayerNorm(32, eps=0.1).double()


def replace_what_a_wrapper_runs(model):
    torch.manual_seed(1)
    fc1 = layer(model).mlp.fc1
    fc1.base_layer = nn.Linear(32, 64).double()
    if isinstance(fc1.bsr_params["default"], nn.Linear):
        fc1.bsr_params["default"] = nn.Linear(32, 64).double()


def replace_activation(model):
    layer(model, 2).mlp.activation_fn = nn.SiLU()


def unknown_activation(model):
    layer(model, 2).mlp.activation_fn = nn.Softplus()


def replace_mlp(model):
    torch.manual_seed(1)
    layer(model, 2).mlp = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32)).double()


def append_to_mlp(model):
    replace_mlp(model)
    step(model)
    layer(model, 2).mlp.append(nn.Tanh())


def set_dropouts(model):
    for module in layer(model).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3


def set_attention_dropout(model):
    layer(model).attention.attention_dropout = layer(model).attention.dropout_prob = 0.3
    base_of(model).config.attention_probs_dropout_prob = 0.3


def some_in_evaluation(model):
    set_dropouts(model)
    set_attention_dropout(model)
    layer(model).attention.eval()
    layer(model, 3).eval()


def add_dropout_to_the_block(model):
    layer(model).dropout = nn.Dropout(0.2)


def evaluation_and_back(model):
    model.eval()(**batch_of(model))
    model.train()


def half_precision(model):
    model.float().to(torch.bfloat16)


def single_precision(model):
    model.float()


def there_and_back(model):
    model.float().double()


def assign_weights(model):
    torch.manual_seed(2)
    states = {n: t + 0.1 * torch.randn_like(t) for n, t in model.state_dict().items()}
    model.load_state_dict(states, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bsr_" in name)


def copy_weights(model):
    model.load_state_dict({n: t * 1.1 for n, t in model.state_dict().items()})


def new_data(model):
    for parameter in layer(model).parameters():
        parameter.data = parameter.data * 1.2


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrize(model):
    for name in ("mlp.fc2", "attention.v_proj", "layernorm_after"):
        nn.utils.parametrize.register_parametrization(layer(model, 2).get_submodule(name), "weight", Doubled())


def parametrize_and_back(model):
    parametrize(model)
    step(model)
    nn.utils.parametrize.remove_parametrizations(layer(model, 2).mlp.fc2, "weight")


def weight_norm(model):
    nn.utils.weight_norm(layer(model, 2).mlp.fc1).weight_g.data.mul_(2)


def prune(model):
    from torch.nn.utils import prune

    prune.l1_unstructured(layer(model, 2).attention.q_proj, "weight", 0.5)


def eager_attention(model):
    base_of(model).set_attn_implementation("eager")


def unfreeze(model):
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def other_hidden_class(model):
    class Wide(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) * 3

    layer(model, 2).mlp.fc2.__class__ = Wide


CHANGES = {f.__name__: f for f in list(globals().values()) if callable(f) and getattr(f, "__module__", "") == __name__}
CHANGES = {name: f for name, f in CHANGES.items() if name not in ("layer", "Doubled")}
TOLERANCE = {"half_precision": 4e-2, "single_precision": 1e-5}
SAME = ("evaluation_and_back", "there_and_back", "eager_attention", "unfreeze")  # outputs do not change


@functools.cache
def made(lean, trainable):
    model = make("vit", lean, trainable=trainable)
    return model, step(model)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_runs_as_with_lean_off(name, trainable):
    results = {}
    for lean in ("off", "exact", "max"):
        model, before = made(lean, trainable)
        model = copy.deepcopy(model)
        step(model)
        CHANGES[name](model)
        results[lean] = step(model)
        output = results[lean]["output 0"].double()
        assert torch.allclose(output, before["output 0"], atol=1e-6) is (name in (*SAME, "single_precision"))
        model.eval()
        with torch.no_grad():
            results[lean]["output evaluated"] = model(**batch_of(model)).logits
    for lean in ("exact", "max"):
        assert_alike(results[lean], results["off"], TOLERANCE.get(name, 1e-9), about=lean)


def test_adapters_come_go_and_merge():
    """After each change: outputs and gradients of a training step, and what ran stock."""
    models = {lean: make("vit", lean) for lean in ("off", "exact", "max")}
    for lean, model in models.items():
        torch.manual_seed(4)
        settings = {**CONFIG, "trainable_blocks": [2, 3], "keep_rate": 1.0, "trainable": "lora"}
        model.add_adapter("other", BSRConfig(lean=lean, **settings))
    changes = [
        lambda m: m.set_adapter("other"),
        lambda m: m.set_adapter("default"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.delete_adapter("other"),
    ]
    for number, change in enumerate(changes):
        results = {}
        for lean, model in models.items():
            change(model)
            for parameter in base_of(model).classifier.parameters():
                parameter.requires_grad_(True)  # a part of the base model trains, too
            results[lean] = step(model)
            with model.disable_adapter():
                results[lean]["output disabled"] = model(**batch_of(model)).logits.detach()
        assert_alike(results["exact"], results["off"], about=f"{number} exact")
        assert_alike(results["max"], results["off"], about=f"{number} max")
        assert stock_halves(models["exact"]) == {}


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_and_autocast_switched_on_later(autocast):
    results = {}
    for lean in ("off", "exact", "max"):
        model = make("vit", lean).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = step(model)
            base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
            found = step(model)
            base_of(model).gradient_checkpointing_disable()
            assert_alike(found, plain, 1e-6)
            assert_alike(step(model), plain, 0.0)
        results[lean] = found
    for lean in ("exact", "max"):
        assert_alike(results[lean], results["off"], 2e-2 if autocast else 1e-5)


def test_functional_calls_use_the_weights_that_they_are_given():
    results = []
    for lean in ("exact", "max", "off"):
        model = make("vit", lean)
        step(model)
        base, batch = base_of(model), batch_of(model)
        weights = {n: (p.detach() * 1.1).requires_grad_(p.requires_grad) for n, p in base.named_parameters()}
        logits = torch.func.functional_call(base, weights, (), batch).logits
        wanted = {n: w for n, w in weights.items() if w.requires_grad}
        gradients = torch.autograd.grad(logits.square().mean(), list(wanted.values()), allow_unused=True)
        found = {n: g for n, g in zip(wanted, gradients, strict=True) if g is not None}
        results.append(found | {"output": logits.detach()})
        assert stock_halves(model) == {}
    assert len(results[2]) > 20
    assert_alike(results[0], results[2])
    assert_alike(results[1], results[2])


def test_weights_that_are_quantized_later():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    results = {}
    for lean in ("off", "exact", "max"):
        model = make("vit", lean, trainable="lora").float()
        step(model)
        config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
        torchao.quantize_(layer(model), config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "base" in name)
        assert type(layer(model).mlp.fc1.base_layer.weight) is not nn.Parameter
        results[lean] = step(model)
    for lean in ("exact", "max"):
        assert_alike(results[lean], results["off"], 1e-4)


def test_sharded_weights(tmp_path):
    """FSDP2 on one process: it replaces classes and parameters, and its own hooks do not count."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        results = []
        for lean in ("exact", "max", "off"):
            model = make("vit", lean)
            step(model)
            for block in base_of(model).vit.layers:
                fsdp.fully_shard(block, mesh=mesh)
            fsdp.fully_shard(model, mesh=mesh)
            found = step(model)
            results.append({n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in found.items()})
            assert stock_halves(model) == {}
        assert_alike(results[0], results[2])
        assert_alike(results[1], results[2])
    finally:
        torch.distributed.destroy_process_group()
