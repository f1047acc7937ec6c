"""One of the processes that torchrun starts, in a plain torch loop: trains what each job says and writes what came out.

    torchrun --nproc-per-node 2 tests/distributed/worker.py FOLDER JOBS

JOBS is a list in JSON, see `Job`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_bsr import PeftBsrError
from tests.distributed.cases import STATIC, STEPS, make_model, make_optimizer, probe_batch, train, weights_of


@dataclass
class Job:
    """What to train.

    Attributes:
        name: Of the file that gets what came out.
        case: Name in `cases.CONFIGS`.
        how: "ddp", "fsdp2" (block by block), "fsdp2_root" (the model as a whole) or "alone".
        first: Step to begin with.
        last: Step to stop before.
        load: A checkpoint to go on from.
        save: Where to leave one at the end.
        dies_at: The second process is killed in this step, once; each step leaves a checkpoint then.
    """

    name: str
    case: str
    how: str
    first: int = 0
    last: int = STEPS
    load: str | None = None
    save: str | None = None
    dies_at: int | None = None


def wrap(how: str, model: Any, is_static: bool) -> nn.Module:
    """DDP without a search for unused parameters where the plan is static; FSDP2."""
    if how == "alone":
        return model
    if how == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=not is_static)
    spec = model.base_model.spec
    for block in spec.blocks if how == "fsdp2" else ():
        fully_shard(model.get_base_model().get_submodule(spec.full_name(block)))
    return fully_shard(model)


class Checkpoint:
    """Model and optimizer as torch's distributed checkpoint keeps them, for any number of processes."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def load(case: str, checkpoint: Checkpoint, place: str | Path) -> None:
    """Go on from a checkpoint. ALaST's blocks that were never drawn have no moments in it; they begin at zero."""
    planner = dcp.DefaultLoadPlanner(allow_partial_load=case not in STATIC)
    dcp.load({"training": checkpoint}, checkpoint_id=place, planner=planner)


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Do one job; losses and weights."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make_model(job.case)
    wrapped = wrap(job.how, model, job.case in STATIC)
    optimizer = make_optimizer(model)
    checkpoint = Checkpoint(wrapped, optimizer)
    halves = [rank] if world_size == 2 else [0, 1]
    losses: list[float] = []
    if job.load is not None:
        load(job.case, checkpoint, job.load)
    if job.dies_at is None:
        losses += train(job.case, wrapped, optimizer, halves, range(job.first, job.last))
    else:
        losses += train_until_killed(job, folder / job.name, wrapped, optimizer, checkpoint)
    if job.save is not None:
        dcp.save({"training": checkpoint}, checkpoint_id=job.save)
    weights = weights_of(model)
    with model.disable_adapter(), torch.no_grad():
        disabled = wrapped.eval()(**probe_batch(job.case)).logits
    return {"losses": losses, "weights": weights, "disabled": disabled}


def train_until_killed(
    job: Job, folder: Path, wrapped: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> list[float]:
    """Train with a checkpoint at each step; go on from the last whole one."""
    rank = dist.get_rank()
    folder.mkdir(exist_ok=True)
    done = max((int(path.name) for path in folder.glob("[0-9]*") if (path / "whole").exists()), default=0)
    if done:
        load(job.case, checkpoint, folder / str(done))
    losses = []
    for step in range(done, job.last):
        if step == job.dies_at and rank == 1 and not (folder / "was_killed").exists():
            (folder / "was_killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        losses += train(job.case, wrapped, optimizer, [rank], [step])
        dcp.save({"training": checkpoint}, checkpoint_id=folder / str(step + 1))
        (folder / str(step + 1) / "whole").touch()
    return losses


def main() -> None:
    """Do all jobs; what goes wrong in one is written in its place."""
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)

    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    for job in (Job(**job) for job in jobs):
        try:
            found = run(job, folder)
        except PeftBsrError as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        except (Exception, CheckpointException):
            if job.dies_at is not None:
                raise  # the other one is gone; torchrun starts both anew
            found = {"error": traceback.format_exc()}
        found["restarts"] = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        torch.save(found, folder / f"{job.name}-{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
