"""Several tasks on one vision transformer: mixtures of experts in a few blocks, trained with Accelerate.

    python examples/multitask_moe.py
    accelerate launch --num_processes 2 examples/multitask_moe.py --mixed-precision bf16
    python examples/multitask_moe.py --model MODEL --task cifar10=train.parquet,test.parquet --task beans=beans

Without `--task`, three tasks are made from scikit-learn's digits: which digit, whether it is odd, and how much ink it
took. The same command continues a killed run; `--experts 0` trains dense blocks instead.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, get_cosine_schedule_with_warmup

from peft_bsr import BSRConfig, MoEConfig, TaskConfig, verify_trainability
from peft_bsr.data import load_images, load_processor, put_aside, to_pixels
from peft_bsr.training import TaskBatchSampler, TaskDataset, collate_tasks
from peft_bsr.training.metrics import add_outputs, metric_of

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import find_model, make_parser, size_of


class Progress:
    """Progress of the run; saved with every checkpoint."""

    def __init__(self) -> None:
        self.epoch = self.batch = self.updates = 0

    def state_dict(self) -> dict[str, int]:
        """As numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """From numbers."""
        vars(self).update(state)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.set_defaults(learning_rate=2e-4)  # of the runs in docs/multitask.md
    parser.add_argument("--task", action="append", default=[], help="NAME=DATASET, or NAME=train.parquet,test.parquet")
    parser.add_argument("--train-images", type=int, help="at most so many of each task")
    parser.add_argument("--test-images", type=int, help="at most so many of each task")
    parser.add_argument("--experts", type=int, default=8, help="experts in each trained block; 0 = dense (default 8)")
    parser.add_argument("--top-k", type=int, default=2, help="experts per token (default 2)")
    parser.add_argument("--expert-type", default="full", help='"full" or "lora" (default full)')
    parser.add_argument("--keep-rate", type=float, default=0.7, help="tokens kept at each reduction (default 0.7)")
    parser.add_argument("--sampler", default="round_robin", help='or "proportional", "temperature"')
    parser.add_argument("--epochs", type=int, default=3, help="default 3")
    parser.add_argument("--max-updates", type=int, help="stop after so many optimizer steps")
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="batches per optimizer step (default 1)")
    parser.add_argument("--mixed-precision", default="no", help='"no", "bf16" or "fp16"')
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--output", type=Path, default=Path("outputs/multitask"), help="default outputs/multitask")
    return parser.parse_args()


def made_of_digits() -> dict[str, tuple[TaskConfig, Dataset, Dataset]]:
    """Three tasks on the same images, of two kinds."""
    images = put_aside(load_images(), validation_size=0)
    data = {"train": images.train, "test": images.test}
    ink = {split: [float(np.asarray(image).mean() / 128 - 0.6) for image in data[split]["image"]] for split in data}
    labels = {split: np.array(data[split]["label"]) for split in data}
    tasks = {"digits": TaskConfig("digits", 10), "odd": TaskConfig("odd", 2), "ink": TaskConfig("ink", 1, "regression")}
    of_task = {"digits": labels, "odd": {split: label % 2 for split, label in labels.items()}, "ink": ink}
    parts = {}
    for name, task in tasks.items():
        both = [
            data[split].remove_columns("label").add_column("label", list(of_task[name][split]))
            for split in ("train", "test")
        ]
        parts[name] = (task, *both)
    return parts


def load_tasks(args: argparse.Namespace) -> dict[str, tuple[TaskConfig, Dataset, Dataset]]:
    """Name -> task, training and test images with the columns `image` and `label`."""
    parts = {} if args.task else made_of_digits()
    for given in args.task:
        name, _, source = given.partition("=")
        if "," in source:
            train, test = source.split(",")
            images = load_images(train)
            both = (images.train, load_images(test, labels=images.labels).train)
        else:
            images = put_aside(load_images(source), validation_size=0)
            both = (images.train, images.test)
        parts[name] = (TaskConfig(name, len(images.labels)), *both)
    limits = (args.train_images, args.test_images)
    return {
        name: (
            task,
            *(d.shuffle(seed=0).select(range(min(len(d), n or len(d)))) for d, n in zip(both, limits, strict=True)),
        )
        for name, (task, *both) in parts.items()
    }


def with_pixels(data: Dataset, task: TaskConfig, processor: Any) -> Dataset:
    """Add `pixel_values` and `labels`, computed on access."""
    is_number = task.kind == "regression"

    def preprocess(rows: dict[str, list[Any]]) -> dict[str, Any]:
        labels = [torch.tensor([label], dtype=torch.float32) if is_number else label for label in rows["label"]]
        return {"pixel_values": list(to_pixels(rows["image"], processor)), "labels": labels}

    return data.with_transform(preprocess)


def evaluate(model: Any, tests: dict[str, Any], tasks: list[TaskConfig], accelerator: Accelerator) -> dict[str, float]:
    """Each task's metric on its test images."""
    model.eval()
    results = {}
    for task in tasks:
        metric = metric_of(task)
        for batch in tests[task.name]:
            with torch.no_grad():
                logits = model(pixel_values=batch["pixel_values"], task=task.name).logits
            logits, labels = accelerator.gather_for_metrics((logits.contiguous(), batch["labels"]))
            if accelerator.is_main_process:
                add_outputs(metric, task, logits, labels)
        if accelerator.is_main_process:
            found = metric.compute()
            results[task.name] = found.get("mean", next(iter(found.values())))
    model.train()
    return results


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def save_checkpoint(accelerator: Accelerator, output: Path, updates: int) -> None:
    """Write a checkpoint under a temporary name, then rename it, so a killed run keeps the last complete one."""
    whole, unfinished = output / f"checkpoint-{updates}", output / "unfinished-checkpoint"
    if whole.exists():
        return
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(whole)
        for old in checkpoints(output)[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def cut_log(log: Path, updates: int) -> None:
    """Remove log lines after the checkpoint: these updates are repeated."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    unfinished = log.with_suffix(".unfinished")
    unfinished.write_text("".join(lines[:updates]))
    unfinished.replace(log)


def main() -> None:
    """Train or continue, evaluate, save the adapter."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation
    )
    set_seed(args.seed)
    parts = load_tasks(args)
    tasks = [task for task, _, _ in parts.values()]
    source, model_name = find_model(args.model)
    processor = load_processor(source, size_of(args))
    moe = MoEConfig(args.experts, args.top_k, expert_type=args.expert_type) if args.experts else None
    base = AutoModelForImageClassification.from_pretrained(source)
    model = get_peft_model(base, BSRConfig(tasks=tasks, moe=moe, keep_rate=args.keep_rate)).train()

    train = TaskDataset({name: with_pixels(d, task, processor) for name, (task, d, _) in parts.items()})
    sampler = TaskBatchSampler(train, args.batch_size, args.sampler, seed=args.seed)
    loader = DataLoader(train, batch_sampler=sampler, collate_fn=collate_tasks)
    tests = {
        name: DataLoader(with_pixels(d, task, processor), batch_size=64, collate_fn=collate_tasks)
        for name, (task, _, d) in parts.items()
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    total = args.epochs * len(sampler) // args.gradient_accumulation  # Accelerate steps it once per process
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(20, total // 10), total)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    tests = {name: accelerator.prepare(test) for name, test in tests.items()}

    progress, log = Progress(), args.output / "log.jsonl"
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator.register_for_checkpointing(progress)
    if found := checkpoints(args.output):
        accelerator.load_state(str(found[-1]))
        accelerator.print(f"continuing at update {progress.updates}")
    if accelerator.is_main_process:
        cut_log(log, progress.updates)
    verify_trainability(model, optimizer)
    limit = args.max_updates or float("inf")
    while progress.epoch < args.epochs and progress.updates < limit:
        loader.set_epoch(progress.epoch)  # otherwise a resumed run counts from 0, and so does the sampler
        sampler.set_epoch(progress.epoch)  # the loader does not pass it on with several processes
        rest = accelerator.skip_first_batches(loader, progress.batch) if progress.batch else loader
        for batch in rest:
            with accelerator.accumulate(model):
                output = model(**batch)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            progress.batch += 1
            if accelerator.sync_gradients:
                progress.updates += 1
                if accelerator.is_main_process:
                    line = {"update": progress.updates, "task": tasks[int(batch["task_ids"][0])].name}
                    with log.open("a") as file:
                        file.write(json.dumps({**line, "loss": output.loss.item()}) + "\n")
                if progress.updates % args.save_every == 0:
                    save_checkpoint(accelerator, args.output, progress.updates)
                if progress.updates >= limit:
                    break
        else:
            progress.epoch, progress.batch = progress.epoch + 1, 0
    save_checkpoint(accelerator, args.output, progress.updates)
    results = evaluate(model, tests, tasks, accelerator)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output / "adapter")
        (args.output / "results.json").write_text(json.dumps(results, indent=2))
        print(f"{model_name}, {progress.updates} updates: {json.dumps(results)}")
    accelerator.wait_for_everyone()  # gloo may still hold gathered tensors: freeing both at once can deadlock
    accelerator.end_training()


if __name__ == "__main__":
    main()
