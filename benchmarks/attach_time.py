"""How long attaching an adapter to ViT-B/16 takes, and how much of it is the self-test.

    python benchmarks/attach_time.py

The weights are random; they do not affect these figures.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, Plan, Reduction
from peft_bsr.backbones import probe
from peft_bsr.selftest import verify_plan

REPEATS = 5


def main() -> None:
    """Print medians in seconds."""
    vit = ViTForImageClassification(ViTConfig(num_labels=10)).eval()
    plan = Plan.static(12, [3, 7, 11], {i: Reduction(0.5) for i in (3, 6, 9)})

    def self_test() -> None:
        spec, stock = probe(vit)
        verify_plan(vit, spec, plan, stock=stock)

    image = torch.randn(1, 3, 224, 224)
    rows = {
        "for comparison: a forward of one image": [seconds(vit, image) for _ in range(REPEATS)],
        "self-test": [seconds(self_test) for _ in range(REPEATS)],
    }
    models = [ViTForImageClassification(ViTConfig(num_labels=10)).eval() for _ in range(REPEATS)]
    rows["get_peft_model(vit, BSRConfig()), all of it"] = [seconds(get_peft_model, m, BSRConfig()) for m in models]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"ViT-B/16 at 224 px, fp32, CPU ({platform.machine()}), {torch.get_num_threads()} threads, {versions}\n")
    for name, times in rows.items():
        print(f"{name:<45} {statistics.median(times):6.2f} s")


@torch.no_grad()
def seconds(run: Callable[..., Any], *args: Any) -> float:
    """How long `run(*args)` takes."""
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
