"""Saved activations, FLOPs and step time of every experiment, each beside full fine-tuning on the same batch.

    python benchmarks/method_comparison/costs.py --model MODEL

Neither the images nor the seed changes them, so they are measured once. Each experiment's steps are timed in turn
with those of full fine-tuning, so that what else the machine does slows both. Run it while the machine is idle.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from data import Protocol
from experiment import Experiment, load_base
from launch import add_results, results_of
from train import add_sources, environment

from peft_bsr.cost import compare

REFERENCE = "full_finetuning/all"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these experiments (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each (default 7)")
    add_sources(parser)
    add_results(parser)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = Protocol.load(args.protocol).batch_size
    path = results_of(args) / "costs.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for experiment in tqdm([e for e in Experiment.all() if not args.only or e.name in args.only], unit="experiment"):
        full, this = (ready(e, args.model, device) for e in (Experiment.load(REFERENCE), experiment))
        models = {"full": full, "this": this}
        batch = {
            "pixel_values": torch.randn(batch_size, 3, *image_size(full), device=device),
            "labels": torch.randint(10, (batch_size,), device=device),
        }
        reference, cost = compare(models, batch, args.repeats).values()
        found[experiment.name] = {
            "saved_bytes_per_image": cost.saved_bytes_per_image,
            "saved_to_full": cost.saved_bytes_per_image / reference.saved_bytes_per_image,
            "forward_macs_per_image": cost.forward_macs_per_image,
            "training_flops_per_image": cost.training_flops_per_image,
            "step_seconds": cost.step_seconds,
            "step_to_full": cost.step_seconds / reference.step_seconds,
            "batch_size": batch_size,
            **environment(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")


def ready(experiment: Experiment, source: str, device: str) -> nn.Module:
    """The model as it trains."""
    base = load_base(source, [str(i) for i in range(10)]).to(device)
    model = experiment.attach(base)
    if experiment.params["gradient_checkpointing"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def image_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) in pixels."""
    size = getattr(model.config, "vision_config", model.config).image_size
    return (size, size) if isinstance(size, int) else tuple(size)


if __name__ == "__main__":
    main()
