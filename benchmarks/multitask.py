"""Three tasks on one ViT: mixtures of experts, dense multitask and three full fine-tunes, on real images.

    python benchmarks/multitask.py try --model MODEL --data DATA    # rates, by validation images
    python benchmarks/multitask.py run --model MODEL --data DATA    # training and test accuracy
    python benchmarks/multitask.py report                           # the tables of docs/multitask.md

Images, splits, training and results of single tasks are those of `method_comparison/`: protocol `multitask`, mixed
batches, otherwise the same settings. Existing results are not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import get_peft_model
from torch.utils.data import Subset
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parent / "method_comparison"))
from data import Protocol, load_task, with_pixels
from experiment import Experiment, load_base
from launch import launch
from multitask_report import write_report
from train import accuracy, commit, environment, saved_size, training_arguments

from peft_bsr import BSRConfig, MoEConfig
from peft_bsr.training import TaskDataset, collate_tasks

HERE = Path(__file__).parent
PROTOCOL = Protocol.load("multitask")
COMPARISON = HERE / "method_comparison" / "results" / "cpu"  # same images, steps and rates for single tasks
VARIANTS = {"dense": None, "moe": MoEConfig(), "moe-lora": MoEConfig(expert_type="lora")}
RATES, KEEP_RATES = (3e-4, 1e-3, 3e-3), (0.5, 0.7, 1.0)


def main() -> None:
    """Run what is missing, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["try", "run", "report"])
    parser.add_argument("--model", default="google/vit-base-patch16-224", help="Hub id or folder")
    parser.add_argument("--data", type=Path, help="folder of TASK-train-*.parquet and so on (default: the Hub)")
    parser.add_argument("--only", nargs="*", help="of single, dense, moe, moe-lora (default: all)")
    parser.add_argument("--keep-rates", type=float, nargs="*", default=KEEP_RATES, help="default: .5, .7 and 1")
    parser.add_argument("--learning-rates", type=float, nargs="*", help="default 1e-3")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="default: 0")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "multitask", help="folder (default: ours)")
    args = parser.parse_args()
    args.protocol, args.at_once = "multitask", 1
    if args.what == "report":
        write_report(args.results, COMPARISON, PROTOCOL.tasks)
        return
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    chosen = args.only or ["single", *VARIANTS]
    for seed in args.seeds if args.what == "run" else []:
        for task in PROTOCOL.tasks if "single" in chosen else []:
            single(args, task, seed)
    for variant in [name for name in VARIANTS if name in chosen]:
        for keep_rate in args.keep_rates:
            for rate in args.learning_rates or [1e-3]:
                for seed in args.seeds if args.what == "run" else [0]:
                    several(args, variant, keep_rate, rate, seed)


def single(args: argparse.Namespace, task: str, seed: int) -> None:
    """A full fine-tune of one task, unless the comparison has its result."""
    if not (COMPARISON / task / "full_finetuning--all" / f"seed-{seed}.json").exists():
        rate = json.loads((COMPARISON / "recipes.json").read_text())["full"]["learning_rate"]
        path = args.results / "single" / task / f"seed-{seed}.json"
        launch(args, path, "full_finetuning/all", task=task, seed=seed, learning_rate=rate)


def several(args: argparse.Namespace, variant: str, keep_rate: float, rate: float, seed: int) -> None:
    """Train and score one adapter for all tasks, unless its result exists."""
    folder = "validation" if args.what == "try" else "test"
    path = args.results / folder / f"{variant}--keep{keep_rate:g}--{rate:g}" / f"seed-{seed}.json"
    if path.exists():
        return
    count = PROTOCOL.sweep_train_images if args.what == "try" else PROTOCOL.train_images
    images = {task: load_task(task, PROTOCOL, args.data) for task in PROTOCOL.tasks}
    train = TaskDataset({t: with_pixels(d["train"].select(range(count)), args.model) for t, d in images.items()})
    scored = TaskDataset({t: with_pixels(d[folder], args.model) for t, d in images.items()})
    starts = dict(zip(images, [0, *scored.ends], strict=False))
    parts = {t: Subset(scored, range(starts[t], starts[t] + len(scored.datasets[t]))) for t in images}
    tasks = {task: data["train"].features["label"].num_classes for task, data in images.items()}
    transformers.set_seed(seed)
    config = BSRConfig(tasks=tasks, moe=VARIANTS[variant], keep_rate=keep_rate)
    model = get_peft_model(load_base(args.model, ["none"]), config)
    params = json.loads((HERE / "method_comparison" / "default_training_params.json").read_text())
    settings = argparse.Namespace(learning_rate=rate, seed=seed, seconds=None)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=training_arguments(Experiment(f"multitask/{variant}", params), PROTOCOL, settings, scratch),
            data_collator=collate_tasks,
            train_dataset=train,
            eval_dataset=parts,
            compute_metrics=accuracy,
        )
        trained = trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        scores = trainer.evaluate()
        file_size = saved_size(model, Path(scratch) / "trained")
    accuracies = {task: scores[f"eval_{task}_accuracy"] for task in tasks}
    result: dict[str, Any] = {
        "variant": variant,
        "keep_rate": keep_rate,
        "learning_rate": rate,
        "seed": seed,
        "split": folder,
        "train_images": count,
        "accuracy": accuracies,
        "mean": round(sum(accuracies.values()) / len(accuracies), 5),
        "loss": round(sum(scores[f"eval_{task}_loss"] for task in tasks) / len(tasks), 5),
        "train_time": round(trained.metrics["train_runtime"], 2),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "file_size": file_size,
        "train_losses": losses,
        "model": Path(args.model).name,
        "commit": commit(),
        **environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)
    print(f"{path.parent.name} seed {seed}, {folder}: {result['mean']:.3f} {accuracies} {result['train_time']:.0f} s")


if __name__ == "__main__":
    main()
