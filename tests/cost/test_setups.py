"""Predictions for autocast, optimizers, offloading and compiled models, against what is really kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError
from peft_bsr.cost import Setup, estimate, plan_for_budget, saved_activations
from peft_bsr.cost.setup import library_bytes, optimizer_bytes
from peft_bsr.cost.ways import Way, ways_of

SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 384}
SIZES |= {"image_size": 112, "patch_size": 16, "num_labels": 5}
BF16 = torch.bfloat16
BSR = {"trainable_blocks": [0, 2], "reduction_blocks": [1], "keep_rate": 0.6}
CONFIGS = {
    "full": lambda: None,
    "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    "exact": lambda: BSRConfig(**BSR),
    "max": lambda: BSRConfig(**BSR, lean="max"),
    "int8": lambda: BSRConfig(**BSR, lean="max", saved_activations="int8"),
    "bfloat16": lambda: BSRConfig(**BSR, frozen_weights="bfloat16"),
}


def bare() -> torch.nn.Module:
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(**SIZES))


def real(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model, config = ViTForImageClassification(ViTConfig(**SIZES)), CONFIGS[name]()
    return (model if config is None else get_peft_model(model, config)).train()


@pytest.mark.parametrize("name", ["full", "exact", "bfloat16"])
def test_saved_activations_under_autocast(name):
    model, images = real(name), torch.randn(2, 3, 112, 112)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", BF16):
            logits = model(pixel_values=images).logits
        return logits.float().sum()

    found = estimate(bare(), CONFIGS[name](), batch_size=2, autocast=BF16)
    assert found.saved_bytes == pytest.approx(saved_activations(model, loss), rel=0.02)
    assert found.saved_bytes < estimate(bare(), CONFIGS[name](), batch_size=2).saved_bytes


@pytest.mark.parametrize("name", ["exact", "full", "lora", "max", "int8"])
@pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning")  # int8 steps aside
@pytest.mark.parametrize("autocast", [BF16, None])
@pytest.mark.slow
def test_kept_bytes_of_a_compiled_model(name, autocast):
    """Counted on the graph of a real model, by the sizes of what its only node holds."""
    torch._dynamo.reset()
    model, images = real(name), torch.randn(2, 3, 112, 112)
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = compiled(pixel_values=images).logits
    node = logits.grad_fn
    while type(node).__name__ != "CompiledFunctionBackward":
        node = node.next_functions[0][0]
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in node.saved_tensors}
    kept = sum(size for storage, size in held.items() if storage not in weights)
    setup = Setup(batch_size=2, autocast=autocast, compile=True)
    found = estimate(bare(), CONFIGS[name](), setup)
    assert found.saved_bytes == pytest.approx(kept, rel=0.01)
    eager = estimate(bare(), CONFIGS[name](), replace(setup, compile=False))
    assert name == "int8" or found.saved_bytes <= 1.06 * eager.saved_bytes


def test_alast_is_predicted_as_it_runs_uncompiled():
    config = ALaSTConfig(trainable_blocks_per_step=2)
    assert estimate(bare(), config, compile=True).saved_bytes == estimate(bare(), config).saved_bytes


def test_states_of_8_bit_adamw_are_those_of_torchao():
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((256, 96), (4100,), (64, 64), (40, 100), (7,))]
    optimizer = optim.AdamW8bit(parameters)
    held = 0
    for parameter in parameters:
        for signed in (True, False):
            state = optimizer._new_buffer(parameter, signed)
            inner = [getattr(state, name) for name in getattr(state, "tensor_attrs", ())] or [state]
            held += sum(tensor.nbytes for tensor in inner)
    assert optimizer_bytes("adamw_8bit", parameters) == (held, 0)
    assert held < 0.5 * optimizer_bytes("adamw", parameters)[0]


def test_offloaded_optimizer_states_are_in_host_memory():
    here, there = (estimate(bare(), batch_size=2, device="cuda", optimizer=f"adamw_{o}") for o in ("fused", "offload"))
    small = sum(p.nbytes for p in bare().parameters() if p.numel() < 4096)
    assert there.optimizer_bytes == 2 * small
    assert there.host_bytes == 2 * (here.optimizer_bytes - there.optimizer_bytes)  # states, weights, gradients
    assert here.host_bytes == 0
    assert here.total_bytes - there.total_bytes == here.optimizer_bytes - there.optimizer_bytes


def test_offloaded_checkpoints_keep_inputs_of_blocks_in_host_memory():
    setup = Setup(batch_size=64, device="cuda", gradient_checkpointing=True)
    here, there = (estimate(bare(), setup=replace(setup, gradient_checkpointing=how)) for how in (True, "offload"))
    inputs = 3 * 64 * 50 * 96 * 4  # of 3 blocks, 50 tokens, fp32
    assert there.host_bytes == inputs
    assert here.saved_bytes - there.saved_bytes == pytest.approx(inputs, rel=0.01)
    assert there.total_bytes < here.total_bytes and there.training_flops == here.training_flops


@pytest.mark.parametrize(
    ("config", "expected"), [(":4096:2:16:8", 2 * 8519680), (":4096:8", 2 * 2**25), (":0:0", 0), ("", 2 * 8519680)]
)
def test_workspaces_of_cublas(config, expected, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (library_bytes("cuda"), library_bytes("cpu")) == (expected, 0)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="has nothing to offload to the CPU"):
        Setup(optimizer="adamw_offload")
    with pytest.raises(ConfigError, match="cannot be predicted with `compile=True`"):
        Setup(device="cuda", compile=True, gradient_checkpointing="offload")
    with pytest.raises(ConfigError, match=r"`autocast=torch.float64` must be torch.bfloat16, torch.float16 or None"):
        estimate(bare(), autocast=torch.float64)
    with pytest.raises(TypeError, match="batchsize"):
        estimate(bare(), batchsize=3)


def test_a_plan_leaves_out_what_does_not_pay():
    setup = Setup(batch_size=16, device="cuda", autocast=BF16, optimizer="adamw_8bit", gradient_checkpointing="offload")
    full, _, lora, _, frozen = plan_for_budget(bare(), "1GB", setup, limit=5)
    assert full.setup == replace(setup, gradient_checkpointing=False)
    assert full.declined == ("offloaded checkpointing: it fits without",)
    assert lora.setup.optimizer == "adamw_fused"
    assert "adamw_8bit: AdamW's state is " in lora.declined[-1] and "declined: adamw_8bit" in lora.describe()
    assert frozen.config.frozen_weights == "bfloat16" and "frozen weights are in bfloat16" in frozen.gives_up


def test_ways_that_are_declined_say_why():
    setting = ({"trainable_blocks": "last:1"}, "")
    compiled = list(ways_of(setting, Setup(device="cuda", compile=True, autocast=torch.float16), torch.float32))
    reasons = [way for way in compiled if isinstance(way, str)]
    assert [reason.partition(":")[0] for reason in reasons] == [
        "frozen weights in bfloat16",
        "saved activations in int8",
        "offloaded checkpointing",
    ]
    eager = [way for way in ways_of(setting, Setup(device="cuda"), torch.float32) if isinstance(way, Way)]
    assert [way.setup.gradient_checkpointing for way in eager] == [False, False, False, True, "offload"]
    assert [way.config.lean for way in eager] == ["exact", "max", "max", "exact", "exact"]
