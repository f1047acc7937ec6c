"""Two processes whose batches lack each other's tasks: no unused parameters, and the steps of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, MoEConfig, TaskConfig

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
TASKS = {"a": 5, "b": 3, "parts": TaskConfig("parts", 2, "segmentation"), "never": 4}
STEPS = ((0, 1), (2, 0), (1, 2))  # the task of each rank


def make_model(expert_type: str) -> PeftModel:
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(num_hidden_layers=4, num_labels=3, **TINY))
    moe = MoEConfig(4, 2, expert_type=expert_type)
    return get_peft_model(base, BSRConfig(trainable_blocks=[1, 3], tasks=TASKS, moe=moe, init_weights=False)).train()


def batch_of(step: int, rank: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    images, task = torch.randn(3, 3, 32, 32, generator=generator), STEPS[step][rank]
    labels = torch.randint(2, (3, 32, 32) if task == 2 else (3,), generator=generator)
    return {"pixel_values": images, "task": list(TASKS)[task], "labels": labels}


def train(model: torch.nn.Module, inner: PeftModel, ranks: list[int]) -> dict[str, object]:
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for step in range(len(STEPS)):
        for rank in ranks:
            loss = model(**batch_of(step, rank)).loss
            (loss / len(ranks)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: tensor for name, tensor in inner.state_dict().items() if "bsr_params" in name}
    weights = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in weights.items()}
    return {"losses": losses, "weights": weights}


def run_rank(rank: int, world_size: int, folder: str, how: str, expert_type: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    model = make_model(expert_type)
    if how == "ddp":
        wrapped: torch.nn.Module = DistributedDataParallel(model)
    else:
        for block in model.base_model.model.vit.layers:
            fully_shard(block)
        wrapped = fully_shard(model)
    torch.save(train(wrapped, model, [rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("expert_type", ["full", "lora"])
def test_ranks_with_different_tasks_do_the_steps_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, expert_type: str
):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # which spawned processes get
    expected = train(model := make_model(expert_type), model, [0, 1])
    mp.spawn(run_rank, (2, str(tmp_path), how, expert_type), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    losses = [loss for pair in zip(first["losses"], second["losses"], strict=True) for loss in pair]
    assert losses == pytest.approx(expected["losses"], abs=1e-5)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(first["weights"][name], second["weights"][name])
