"""One of two processes that train together: `torchrun --nproc-per-node 2 processes.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.invariant.ways import WAYS, build, data, train


def main() -> None:
    """Write loss and gradient norm of each step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numbers = torch.Generator().manual_seed(0)
    model = DistributedDataParallel(build("bsr", WAYS["exact"], numbers))
    found = train(model, data(numbers), steps=10, rank=dist.get_rank(), processes=dist.get_world_size())
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    del model  # the last reference to the group must not be DDP's reducer's: it joins gloo's thread, holding the GIL
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
