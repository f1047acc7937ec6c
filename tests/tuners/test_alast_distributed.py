"""ALaST on two processes: the same draws and budgets, and the steps of one process that sees the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
STEPS = 4


def make_model() -> PeftModel:
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(num_hidden_layers=4, num_labels=3, **TINY))
    return get_peft_model(base, ALaSTConfig(trainable_blocks_per_step=2, selection="sample")).train()


def train(model: torch.nn.Module, inner: PeftModel, rank: int, world_size: int) -> dict[str, object]:
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    draws = []
    for seed in range(STEPS):
        generator = torch.Generator().manual_seed(seed)
        images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(3, (4,), generator=generator)
        model(pixel_values=images[rank::world_size], labels=labels[rank::world_size]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        draws.append(inner.base_model.schedule().drawn)
    weights = {name: tensor for name, tensor in inner.state_dict().items() if "bsr_params" in name}
    return {"draws": draws, "state": inner.base_model.schedule().pack(), "weights": weights}


def run_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    model = make_model()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    torch.save(train(wrapped, model, rank, world_size), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_do_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # which spawned processes get
    expected = train(model := make_model(), model, 0, 1)
    mp.spawn(run_rank, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["draws"] == second["draws"] == expected["draws"]
    assert torch.equal(first["state"], second["state"])
    budgets = [packed.view(torch.float64)[0] for packed in (first["state"], expected["state"])]
    torch.testing.assert_close(*budgets, rtol=0, atol=1e-5)
    for name, tensor in expected["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-4, atol=1e-5)
