"""One of two processes that torchrun starts: ALaST, with one batch a step in the first process and two in the second.

torchrun --nproc-per-node 2 tests/distributed/unequal.py FOLDER
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peft_bsr import verify_trainability
from tests.distributed.cases import STEPS, batch_of, make_model, make_optimizer, weights_of

CASE = "alast_sample"


def main() -> None:
    """Train with DDP; what each process has at the end, and its schedule's state on the way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank = dist.get_rank()
    model = make_model(CASE)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = make_optimizer(model)
    state = model.base_model.schedule
    drawn, inside, between = [], [], []
    for step in range(STEPS):
        batches = [batch_of(CASE, step, half) for half in ([0], [1, 2])[rank]]
        for batch in batches:
            with nullcontext() if batch is batches[-1] else wrapped.no_sync():
                (wrapped(**batch).loss / 3).backward()
        drawn.append(state().selected)
        inside.append(state().pack())
        restored = copy.deepcopy(state())
        restored.unpack(inside[-1])
        restored.next_step()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 2  # DDP takes the mean of the processes
        optimizer.step()
        optimizer.zero_grad()
        between.append(state().pack())
        assert restored.pack().equal(between[-1])
        if rank == 1:
            verify_trainability(wrapped, optimizer)  # in one process alone
            model.train()
    found = {"drawn": drawn, "inside": inside, "between": between, "weights": weights_of(model)}
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
    del wrapped  # see tests/invariant/processes.py
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
