"""Saved activations, FLOPs, step time and peak memory of every experiment, relative to full fine-tuning.

    python benchmarks/method_comparison/costs.py --model MODEL

They do not depend on images or seed, so they are measured once; existing results are not measured again. Each
experiment's steps alternate with those of full fine-tuning on the same batch, so other load slows both. Run it on an
idle machine. The peak is that of a new process in which glibc returns freed tensors at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.extend(str(folder) for folder in Path(__file__).parents[:2])
from data import Protocol
from experiment import Experiment, load_base
from launch import add_experiments, add_results, results_of, stored
from own_process import in_own_process
from train import add_sources, environment

from peft_bsr.cost import PeakMemory, compare
from peft_bsr.training.side_effect_free import side_effect_free

REFERENCE = "full_finetuning/all"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_experiments(parser)
    parser.add_argument("--again", action="store_true", help="also measure what has results")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each (default 7)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    add_sources(parser)
    add_results(parser)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.peak_of:
        model = ready(Experiment.load(args.peak_of), args.model)
        print(json.dumps(peak_bytes(model, random_batch(model, Protocol.load(args.protocol).batch_size))))
        return
    if Protocol.load(args.protocol).precision != "fp32":
        raise SystemExit(f"--protocol {args.protocol}: costs are measured in fp32, and it trains in another precision.")
    path = results_of(args) / "costs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = stored(path)
    # steps from a feature cache are not steps on images
    chosen = [e for e in Experiment.chosen(args.only) if not e.params["feature_cache"]]
    for experiment in tqdm(chosen, unit="experiment"):
        cost = found.setdefault(experiment.name, {})
        if args.again or "step_to_full" not in cost:
            cost |= measure(experiment, args)
        if args.again or "peak_bytes" not in cost:
            cost["peak_bytes"] = peak_in_own_process(experiment, args)
        path.write_text(json.dumps(found, indent=2) + "\n")


def measure(experiment: Experiment, args: argparse.Namespace) -> dict[str, Any]:
    """All figures except the peak."""
    full = ready(Experiment.load(REFERENCE), args.model)
    batch = random_batch(full, Protocol.load(args.protocol).batch_size)
    reference, cost = compare({"full": full, "this": ready(experiment, args.model)}, batch, args.repeats).values()
    return {
        "saved_bytes_per_image": cost.saved_bytes_per_image,
        "saved_to_full": cost.saved_bytes_per_image / reference.saved_bytes_per_image,
        "forward_macs_per_image": cost.forward_macs_per_image,
        "training_flops_per_image": cost.training_flops_per_image,
        "step_seconds": cost.step_seconds,
        "step_to_full": cost.step_seconds / reference.step_seconds,
        "batch_size": len(batch["labels"]),
        **environment(),
    }


def peak_in_own_process(experiment: Experiment, args: argparse.Namespace) -> int:
    """`peak_bytes`, in a new process."""
    arguments = ["--peak-of", experiment.name, "--model", args.model, "--protocol", args.protocol]
    return in_own_process(__file__, *arguments)


def peak_bytes(model: nn.Module, batch: dict[str, Tensor], parts: int = 1) -> int:
    """Peak of gradients, AdamW's state, activations and workspace over two steps, without the weights.

    Args:
        model: The model from `ready`.
        batch: One part of a step's images.
        parts: Parts whose gradients accumulate, of which two are run.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    with side_effect_free(model):
        model(**batch).loss.backward()  # lets libraries allocate their own memory first
        model.zero_grad(set_to_none=True)
        with PeakMemory(batch["labels"].device) as memory:
            optimizer = torch.optim.AdamW(trained, lr=0.0)
            for parameter in trained:  # create the state of all blocks: ALaST's train in turn
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                for _ in range(min(parts, 2)):
                    model(**batch).loss.backward()
                optimizer.step()
    return memory.added_bytes


def ready(experiment: Experiment, source: str) -> nn.Module:
    """The model in training mode, on the GPU if there is one."""
    base = load_base(source, [str(i) for i in range(10)]).to("cuda" if torch.cuda.is_available() else "cpu")
    model = experiment.attach(base)
    if experiment.params["gradient_checkpointing"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def random_batch(model: nn.Module, count: int) -> dict[str, Tensor]:
    """Random images of the model's image size."""
    size = getattr(model.config, "vision_config", model.config).image_size
    height, width = (size, size) if isinstance(size, int) else size
    device = next(model.parameters()).device
    return {
        "pixel_values": torch.randn(count, 3, height, width, device=device),
        "labels": torch.randint(10, (count,), device=device),
    }


if __name__ == "__main__":
    main()
