from __future__ import annotations

import gc
import time

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from peft_bsr import BSRConfig, PeftBsrError, TrainabilityError
from peft_bsr.cost import (
    PeakMemory,
    compare,
    cost_table,
    count_flops,
    flops_by_module,
    model_memory,
    saved_activations,
    saved_by_module,
)
from peft_bsr.engine import watch_kept


def test_each_storage_counts_once_and_parameters_never():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    assert saved_activations(layer, lambda: (layer(x) + layer(x)).sum()) == x.nbytes


def test_nothing_is_saved_without_gradients():
    layer = nn.Linear(8, 8).requires_grad_(False)
    assert saved_activations(layer, lambda: layer(torch.randn(4, 8)).sum()) == 0


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_the_same_in_both_kernels(fused):
    backend = nn.attention.SDPBackend.FLASH_ATTENTION if fused else nn.attention.SDPBackend.MATH
    q, k, v = (torch.randn(2, 3, 50, 16, requires_grad=True) for _ in range(3))

    def attend() -> torch.Tensor:
        with nn.attention.sdpa_kernel(backend):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    forward = 2 * 2 * (2 * 3 * 50 * 50 * 16)
    with torch.no_grad():
        assert count_flops(attend) == forward
    backward = 5 if fused else 4  # the fused kernel forms the scores again
    assert count_flops(lambda: attend().sum().backward()) == forward + backward * forward // 2


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_module_that_is_given_a_parameter_counts_with_gradients_off(off):
    class Given(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    layer, prompt = Given(4, 5), nn.Parameter(torch.randn(3, 4))
    with off():
        assert count_flops(lambda: layer(prompt)) == 2 * 3 * 4 * 5
    assert count_flops(lambda: layer(prompt).sum().backward()) == 3 * 2 * 3 * 4 * 5


def test_compare_leaves_weights_gradients_and_modes_alone(make_model):
    model = get_peft_model(make_model(), BSRConfig())
    model.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    costs = compare({"full": make_model(), "BSR": model}, batch, repeats=1)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    full, bsr = costs["full"], costs["BSR"]
    assert bsr.trainable_parameters < full.trainable_parameters
    assert bsr.saved_bytes_per_image < full.saved_bytes_per_image
    assert bsr.forward_macs_per_image < full.forward_macs_per_image
    assert bsr.training_flops_per_image < full.training_flops_per_image
    assert bsr.step_seconds > 0


def test_a_model_that_does_not_train_is_told(make_model):
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    with pytest.raises(TrainabilityError, match="ViTForImageClassification has nothing to train"):
        compare({"frozen": make_model().requires_grad_(False)}, batch)


def test_the_table_states_its_conditions(make_model):
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    table = cost_table(compare({"full": make_model()}, batch, repeats=1), batch)
    assert "| full |" in table
    assert "| 1.00 |" in table
    for condition in ("CPU", "float32", "batch 2", "(32, 32) px", f"torch {torch.__version__}", "transformers"):
        assert condition in table


@pytest.mark.parametrize("lean", ["off", "exact", "max"])
def test_saved_by_module_adds_up_and_leaves_lean_blocks_lean(lean, make_model, images):
    model = get_peft_model(make_model("vit"), BSRConfig(trainable_blocks=[1, 3], lean=lean)).train()

    def loss() -> torch.Tensor:
        return model(pixel_values=images).logits.sum()

    found = saved_by_module(model, loss)
    assert sum(found.values()) == saved_activations(model, loss)
    spec = model.base_model.spec
    blocks = {i: sum(v for n, v in found.items() if f"{spec.blocks[i]}." in f"{n}.") for i in range(4)}
    assert blocks[0] == 0 and min(blocks[1], blocks[2], blocks[3]) > 0


@pytest.mark.parametrize(
    "settings", [{"lean": "off"}, {"lean": "exact"}, {"lean": "max"}, {"saved_activations": "int8"}]
)
def test_a_forward_without_backward_is_let_go(settings, make_model, images):
    model = get_peft_model(make_model("vit"), BSRConfig(trainable_blocks=[1, 3], **settings)).train()
    lasting = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    kept: list[StorageWeakRef] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in lasting:
            kept.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor.detach()

    def loss() -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), watch_kept(note):
            return model(pixel_values=images).logits.sum()

    loss()
    gc.collect()
    assert len(kept) > 20 and all(storage.expired() for storage in kept)
    kept.clear()
    saved_activations(model, loss)  # hooks inside of the counter's own
    gc.collect()
    assert kept and all(storage.expired() for storage in kept)


@pytest.mark.parametrize("lean", ["off", "exact", "max"])
def test_flops_by_module_adds_up_with_true_token_counts(lean, make_model, images):
    model = get_peft_model(make_model("vit"), BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[2], lean=lean))
    model.train()
    found = flops_by_module(lambda: model(pixel_values=images).logits.sum().backward())
    with torch.no_grad():
        forward = flops_by_module(lambda: model(pixel_values=images))
    blocks = [f"base_model.model.{name}" for name in model.base_model.spec.blocks]
    for counts in (found, forward):
        outside = sum(counts[f"base_model.model.{name}"] for name in ("vit.embeddings", "classifier"))
        assert sum(counts[block] for block in blocks) + outside == counts[""]
    assert found[blocks[0]] == forward[blocks[0]] == forward[blocks[1]]  # frozen before the first trained: no backward
    assert forward[blocks[1]] > forward[blocks[2]] > forward[blocks[3]]
    assert found[blocks[1]] > 2.5 * forward[blocks[1]]
    assert 1.9 * forward[blocks[2]] < found[blocks[2]] < (3 if lean == "max" else 2.5) * forward[blocks[2]]


def test_model_memory_follows_a_step(make_model, images):
    model = get_peft_model(make_model("vit"), BSRConfig(trainable_blocks=[3])).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    before = model_memory(model, optimizer)
    size = sum(p.nbytes for p in trained)
    assert (before.trainable_bytes, before.gradient_bytes, before.optimizer_bytes) == (size, 0, 0)
    assert before.frozen_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - size
    model(pixel_values=images).logits.sum().backward()
    optimizer.step()
    after = model_memory(model, optimizer)
    assert after.gradient_bytes == size
    assert after.optimizer_bytes == 2 * size + 4 * len(trained)  # two moments and a step counter each
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight = tied[0].weight
    assert model_memory(tied).trainable_bytes == 4 * (16 + 4 + 4)


def test_peak_memory_sees_what_is_freed_before_the_end():
    with PeakMemory() as memory:
        torch.ones(2**24).add_(1)  # 64 MiB, gone at once
    assert 60 * 2**20 < memory.added_bytes < 100 * 2**20
    with PeakMemory() as memory:
        pass
    assert memory.added_bytes < 8 * 2**20


def test_peaks_of_other_devices_are_refused():
    with pytest.raises(PeftBsrError, match=r"`device='meta'`: peaks can be measured on CUDA, MPS and the CPU only"):
        PeakMemory("meta")


def test_the_peak_on_mps_is_the_most_of_many_looks(monkeypatch):
    allocated = [100]
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: allocated[0])
    with PeakMemory("mps") as memory:
        allocated[0] = 700
        time.sleep(0.2)
        allocated[0] = 150
    assert (memory.start_bytes, memory.peak_bytes, memory.added_bytes) == (100, 700, 600)
