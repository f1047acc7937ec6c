"""Base weights of trained modules are in mapped files; results do not change."""

from __future__ import annotations

import copy
import io
import logging
import sys
import tempfile

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, MoEConfig
from peft_bsr.engine import CONTROLLER, WeightOffload
from peft_bsr.multitask import FullExperts
from peft_bsr.tuners.blocks import tuner
from peft_bsr.tuners.blocks.layer import BlockWeights

BATCH = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
MIXTURE = {"tasks": {"only": 2}, "moe": MoEConfig(num_experts=2, top_k=1)}  # one task need not be named
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


def is_mapped(tensor: torch.Tensor) -> bool:
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if "peft_bsr_" in line]
    return any(int(begin, 16) <= tensor.data_ptr() < int(end, 16) for begin, end in ranges)


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=8
    )
    return ViTForImageClassification(config).eval()


def attach(**settings: object) -> tuple[torch.Tensor, nn.Module]:
    base = vit()
    logits = base(**BATCH).logits.detach()
    torch.manual_seed(1)
    config = BSRConfig(**{"trainable_blocks": [1, 3], "init_weights": False, **settings})
    return logits, get_peft_model(base, config).eval()


def base_weights(model: nn.Module) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, BlockWeights)]
    return [p.data for layer in layers for p in layer.base_layer.parameters() if p.nbytes >= 2**16]


def mlp_weights(model: nn.Module) -> list[torch.Tensor]:
    """Of the trained blocks' own MLPs."""
    own = [p for name, p in model.named_parameters() if ".1.mlp." in name or ".3.mlp." in name]
    return [p.data for p in own if not p.requires_grad and p.nbytes >= 2**16]


@linux
def test_a_parked_module_is_mapped_and_equal():
    layer, weight_offload = nn.Linear(256, 256), WeightOffload()
    before = copy.deepcopy(layer)
    weight_offload.offload(layer)
    assert is_mapped(layer.weight) and not is_mapped(layer.bias)
    assert torch.equal(layer.weight, before.weight)
    address = layer.weight.data_ptr()
    weight_offload.offload(layer)
    assert layer.weight.data_ptr() == address
    weight_offload.clear(layer, torch.device("cpu"))
    assert not is_mapped(layer.weight) and torch.equal(layer.weight, before.weight)


def test_without_room_weights_stay_and_it_is_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    layer = nn.Linear(256, 256)
    address = layer.weight.data_ptr()
    with caplog.at_level(logging.WARNING, "peft_bsr"):
        WeightOffload().offload(layer)
    assert layer.weight.data_ptr() == address
    assert "base weights stay in memory" in caplog.text


@linux
@pytest.mark.parametrize("blocks", [[1, 3], [0, 1, 2, 3]])
def test_training_holds_no_more_weights_than_the_base_model(blocks):
    weights = sum(p.nbytes for p in vit().parameters())
    _, model = attach(trainable_blocks=blocks)
    assert all(is_mapped(tensor) for tensor in base_weights(model))
    model(**BATCH).logits.sum().backward()
    assert sum(p.nbytes for p in model.parameters() if not is_mapped(p)) <= 1.02 * weights
    assert not list_leftovers()


def list_leftovers() -> list[str]:
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "peft_bsr_" in line and "(deleted)" not in line]


@linux
def test_low_rank_updates_need_the_base_weights_in_memory():
    _, model = attach(trainable="lora")
    is_linear = [isinstance(m.base_layer, nn.Linear) for m in model.modules() if isinstance(m, BlockWeights)]
    assert any(is_linear) and not any(is_mapped(tensor) for tensor in base_weights(model))


def test_switched_off_merged_and_unloaded_as_before():
    expected, model = attach()
    adapted = model(**BATCH).logits
    assert not torch.equal(adapted, expected)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(model(**BATCH).logits, expected)
        assert torch.equal(model(**BATCH).logits, adapted)
    model.merge_adapter()
    torch.testing.assert_close(model(**BATCH).logits, adapted)
    model.unmerge_adapter()
    assert torch.equal(model(**BATCH).logits, adapted)
    base = model.unload()
    assert torch.equal(base(**BATCH).logits, expected)
    assert not any(is_mapped(p) for p in base.parameters()) or sys.platform != "linux"


def test_a_second_adapter_starts_from_the_base_weights():
    expected, model = attach()
    adapted = model(**BATCH).logits
    settings = {"trainable_blocks": [1, 3], "reduction_blocks": []}
    model.add_adapter("second", BSRConfig(**settings))
    model.add_adapter("third", BSRConfig(trainable="lora", **settings))
    for name, logits in (("second", expected), ("default", adapted), ("third", expected), ("default", adapted)):
        model.set_adapter(name)
        assert torch.equal(model(**BATCH).logits, logits), name
    model.delete_adapter("default")
    assert torch.equal(model(**BATCH).logits, expected)


@linux
def test_low_rank_updates_are_tried_on_base_weights_in_memory(monkeypatch):
    """On an accelerator, what is in a file is on the CPU: it cannot be computed with."""
    _, model = attach()
    seen, verify = [], tuner.verify_lean

    def look(base, *args):
        seen.extend(map(is_mapped, base_weights(base)))
        return verify(base, *args)

    monkeypatch.setattr(tuner, "verify_lean", look)
    monkeypatch.setattr(WeightOffload, "onload", WeightOffload.clear)  # it copies, as to an accelerator
    model.add_adapter("second", BSRConfig(trainable_blocks=[1, 3], trainable="lora"))
    assert seen and not any(seen)
    assert all(is_mapped(tensor) for tensor in base_weights(model))


def test_base_weights_under_a_deleted_copy_go_to_its_device(monkeypatch):
    _, model = attach()
    asked = {}
    monkeypatch.setattr(BlockWeights, "device", property(lambda layer: "copy" if layer.bsr_params else "file"))
    monkeypatch.setattr(WeightOffload, "onload", lambda self, module, device: asked.update({module: device}))
    model.delete_adapter("default")
    assert set(asked.values()) == {"copy"}


def test_weights_that_move_in_inference_mode_can_be_trained_with():
    _, model = attach(trainable_blocks=[1], keep_rate=1.0)
    model.add_adapter("second", BSRConfig(trainable_blocks=[2], keep_rate=1.0))
    with torch.inference_mode():
        model.set_adapter("second")
    model.set_adapter("default")
    model.train()(**BATCH).logits.sum().backward()
    with torch.inference_mode():
        merged = model.merge_and_unload()
    merged.requires_grad_(True)(**BATCH).logits.sum().backward()


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_weights_under_a_merged_adapter_change_their_dtype_with_the_model(trainable):
    expected, model = attach(trainable=trainable, reduction_blocks=[])
    model.merge_adapter()
    model.double().unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with model.disable_adapter():
        logits = model(pixel_values=BATCH["pixel_values"].double()).logits
    torch.testing.assert_close(logits.float(), expected)


def test_merging_for_good_forgets_the_files():
    _, model = attach(reduction_blocks=[])
    adapted = model(**BATCH).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**BATCH).logits, adapted)
    assert not any(is_mapped(p) for p in merged.parameters()) or sys.platform != "linux"


def test_copies_pickles_and_state_dicts_hold_the_weights():
    expected, model = attach()
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    _, other = attach(init_weights=True)
    other.load_state_dict(model.state_dict())
    adapted = model(**BATCH).logits
    for each in (copied, loaded, other):
        assert torch.equal(each(**BATCH).logits, adapted)
        with each.disable_adapter():
            assert torch.equal(each(**BATCH).logits, expected)


@linux
def test_a_change_of_dtype_parks_again():
    expected, model = attach()
    model.double()
    assert all(is_mapped(tensor) and tensor.dtype == torch.float64 for tensor in base_weights(model))
    batch = {"pixel_values": BATCH["pixel_values"].double()}
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits.float(), expected)


@pytest.mark.parametrize("settings", [{}, MIXTURE], ids=["copies", "experts"])
def test_distributed_data_parallel_leaves_parked_weights_alone(tmp_path, settings):
    _, model = attach(lean="off", **settings)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model.train())
        offloaded = [name for name, _ in model.named_parameters() if ".base_layer." in name]
        if settings:
            offloaded += [n for i in (1, 3) for n, _ in model.named_parameters() if f".{i}.mlp." in n]
        assert set(offloaded) <= parallel.parameters_to_ignore
        parallel(**BATCH).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()
    assert not hasattr(model.unload(), "_ddp_params_and_buffers_to_ignore")


@linux
def test_mlps_under_experts_are_mapped_as_long_as_the_experts_run():
    base = sum(p.nbytes for p in vit().parameters())
    expected, model = attach(**MIXTURE)
    adapted = model(**BATCH).logits
    assert all(is_mapped(tensor) for tensor in (*mlp_weights(model), *base_weights(model)))
    experts = sum(p.nbytes for m in model.modules() if isinstance(m, FullExperts) for p in m.parameters())
    own = sum(tensor.nbytes for tensor in mlp_weights(model))
    assert len(mlp_weights(model)) == 4 and experts >= 2 * own
    assert sum(p.nbytes for p in model.parameters() if not is_mapped(p)) <= 1.02 * base + experts - own
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(model(**BATCH).logits, expected)
        assert torch.equal(model(**BATCH).logits, adapted)
    assert all(is_mapped(tensor) for tensor in mlp_weights(model))
    model.double()
    assert all(is_mapped(tensor) and tensor.dtype == torch.float64 for tensor in mlp_weights(model))
    base_model = model.float().unload()
    assert torch.equal(base_model(**BATCH).logits, expected)
    assert not any(is_mapped(p) for p in base_model.parameters())


@linux
def test_experts_that_share_the_mlp_need_it_in_memory():
    _, model = attach(**MIXTURE, trainable="lora")
    assert all(is_mapped(tensor) for tensor in mlp_weights(model))
    moe = MoEConfig(num_experts=2, top_k=1, expert_type="lora")
    _, model = attach(tasks=MIXTURE["tasks"], moe=moe, trainable="lora")
    assert not any(is_mapped(tensor) for tensor in mlp_weights(model))


def test_other_adapters_beside_experts_start_from_the_pretrained_mlps():
    expected, model = attach(**MIXTURE)
    adapted = model(**BATCH).logits
    settings = {"trainable_blocks": [1, 3], "reduction_blocks": []}
    model.add_adapter("dense", BSRConfig(**settings))
    model.add_adapter("lora", BSRConfig(trainable="lora", **settings))
    model.add_adapter("experts", BSRConfig(**settings, **MIXTURE))
    for name, logits in (("dense", expected), ("default", adapted), ("lora", expected), ("default", adapted)):
        model.set_adapter(name)
        assert torch.equal(model(**BATCH).logits, logits), name
    model.set_adapter("experts")
    block = model.base_model.model.vit.layers[1]
    experts = block.get_submodule(CONTROLLER).bsr_params["experts"].experts
    assert torch.equal(experts.first_weight[1], block.mlp.fc1.base_layer.weight)
    for name in ("dense", "experts", "default"):
        model.delete_adapter(name)
    assert torch.equal(model(**BATCH).logits, expected)
    assert torch.equal(model.unload()(**BATCH).logits, expected)


def test_copies_and_pickles_hold_the_mlps_under_experts():
    expected, model = attach(**MIXTURE)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for each in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(each(**BATCH).logits, model(**BATCH).logits)
        with each.disable_adapter():
            assert torch.equal(each(**BATCH).logits, expected)
        each.set_adapter("default")
        assert sys.platform != "linux" or all(is_mapped(tensor) for tensor in mlp_weights(each))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("settings", [{}, MIXTURE], ids=["copies", "experts"])
def test_off_the_accelerator_and_back(settings):
    expected, model = attach(**settings)
    model.cuda()
    batch = {name: tensor.cuda() for name, tensor in BATCH.items()}
    adapted = model(**batch).logits
    assert all(tensor.device.type == "cpu" for tensor in base_weights(model))
    for _ in range(2):
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits.cpu(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(**batch).logits, adapted)
    model.add_adapter("second", BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[]))
    model.set_adapter("second")
    torch.testing.assert_close(model(**batch).logits.cpu(), expected, atol=1e-4, rtol=1e-4)
    base = model.unload()
    assert all(p.is_cuda for p in base.parameters())
