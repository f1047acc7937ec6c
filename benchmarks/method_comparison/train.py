"""Run one experiment in this process.

    python benchmarks/method_comparison/train.py lora/qv --task cifar10 --learning-rate 1e-3 --model MODEL --data DATA

The last line of the output is the result as JSON, in the layout of PEFT's method comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from controls import TRAINERS, RandomBudgets
from data import Protocol, load_task, with_pixels
from experiment import Experiment, load_base
from pixels import as_batch, decode, on_device
from time_budget import TimeBudget, TimedTrainer

from peft_bsr import ALaSTConfig, FeatureCache
from peft_bsr.cost import PeakMemory
from peft_bsr.data import collate
from peft_bsr.training import ALaSTCallback


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="folder below experiments/")
    parser.add_argument("--task", default="cifar10", help="see data.py (default cifar10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of head, adapter and image order")
    parser.add_argument("--learning-rate", type=float, required=True, help="at its highest")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch on the CPU (default: torch's default)")
    parser.add_argument("--seconds", type=float, help="train so long instead of the protocol's epochs")
    parser.add_argument(
        "--sweep", action="store_true", help="score on the validation split; without --seconds train on fewer images"
    )
    add_sources(parser)
    return parser.parse_args()


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for protocol, model and data."""
    parser.add_argument("--protocol", default="cpu", help="name in protocols/, or a .json file (default cpu)")
    parser.add_argument("--model", default="google/vit-base-patch16-224", help="Hub id or folder")
    parser.add_argument(
        "--data", type=Path, help="folder of TASK-train-*.parquet and TASK-test-*.parquet (default: the Hub)"
    )


def main() -> None:
    """Run and print."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # "the classifier is newly initialized" is what we want
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    print(json.dumps(run(args)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and score."""
    begin = time.perf_counter()
    experiment, protocol = Experiment.load(args.experiment), Protocol.load(args.protocol)
    if args.seconds is not None:
        protocol = protocol.timed()
    images = load_task(args.task, protocol, args.data)
    is_short = args.sweep and args.seconds is None
    count = min(protocol.sweep_train_images if is_short else protocol.train_images, len(images["train"]))
    scored = "validation" if args.sweep else "test"
    parts = [images["train"].select(range(count)), images[scored]]
    train, test = [
        on_device(decode(part, args.model, protocol)) if protocol.decoded else with_pixels(part, args.model)
        for part in parts
    ]
    gather = as_batch if protocol.decoded else collate
    transformers.set_seed(args.seed)
    base = load_base(args.model, images["train"].features["label"].names)
    budget = None if args.seconds is None else TimeBudget(args.seconds, experiment.params["warmup"])
    model = experiment.attach(base)
    with tempfile.TemporaryDirectory() as folder:
        train_begin = time.perf_counter()
        is_cached = experiment.params["feature_cache"]
        cache = FeatureCache.build(model, train, Path(folder) / "cache") if is_cached else None
        trainer = TRAINERS.get(experiment.params["control"], TimedTrainer)(
            model=model,
            args=training_arguments(experiment, protocol, args, folder),
            data_collator=gather if cache is None else None,
            train_dataset=train if cache is None else cache,
            eval_dataset=test,
            compute_metrics=accuracy,
            callbacks=callbacks(experiment, args.seed),
        )
        trainer.budget = budget
        with PeakMemory(trainer.args.device) as memory, nullcontext() if cache is None else cache.read_by(model):
            trainer.train()
        train_time = time.perf_counter() - train_begin
        trainer.data_collator = gather
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        score = trainer.evaluate()
        file_size = saved_size(model, Path(folder) / "trained")
    adapter = experiment.adapter()
    return {
        "run_info": {
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "total_time": round(time.perf_counter() - begin, 2),
            "experiment_name": experiment.name,
            "commit": commit(),
            "train_config": {
                **experiment.params,
                "learning_rate": args.learning_rate,
                "seed": args.seed,
                "protocol": protocol.name,
                "train_images": len(train),
                "epochs": round(trainer.state.epoch, 2),
                "seconds": args.seconds,
                "batch_size": protocol.batch_size,
            },
            "peft_config": None if adapter is None else json.loads(json.dumps(adapter.to_dict(), default=sorted)),
            "error_msg": "",
        },
        "train_info": {
            "status": "success",
            "train_time": round(train_time, 2),
            "memory_start_bytes": memory.start_bytes,
            "memory_peak_bytes": memory.peak_bytes,
            "file_size": file_size,
            "num_trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "num_total_params": sum(p.numel() for p in model.parameters()),
            "train_losses": losses,
            "metrics": [{"split": scored, "accuracy": score["eval_accuracy"], "loss": round(score["eval_loss"], 5)}],
        },
        "meta_info": meta_info(args, protocol.precision, len(test)),
    }


def training_arguments(
    experiment: Experiment, protocol: Protocol, args: argparse.Namespace, folder: str
) -> TrainingArguments:
    """TrainingArguments of the experiment and the protocol."""
    params = experiment.params
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=protocol.epochs if args.seconds is None else 10_000,  # TimeBudget ends it
        per_device_train_batch_size=protocol.batch_size,
        per_device_eval_batch_size=protocol.batch_size,
        learning_rate=args.learning_rate,
        optim=params["optimizer"],
        weight_decay=params["weight_decay"],
        lr_scheduler_type=params["lr_scheduler"],
        warmup_steps=params["warmup"],  # below 1 it is a share of all steps
        max_grad_norm=params["max_grad_norm"],
        gradient_checkpointing=params["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=args.seed,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available() and not protocol.decoded,
        bf16=protocol.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
    )


def callbacks(experiment: Experiment, seed: int) -> list[TrainerCallback]:
    """Callbacks that a method or a control needs."""
    adapter = experiment.adapter()
    found: list[TrainerCallback] = [ALaSTCallback()] if isinstance(adapter, ALaSTConfig) else []
    if experiment.params["control"] == "random_budgets":
        found.append(RandomBudgets(seed))
    return found


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images with the highest logit at their class."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def saved_size(model: nn.Module, folder: Path) -> int:
    """Bytes of what is shared: the adapter's file, or the trained parameters."""
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "model.safetensors")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def meta_info(args: argparse.Namespace, precision: str, scored_images: int) -> dict[str, Any]:
    """Settings, versions and machine of the run."""
    return {
        "model_info": {
            "model": Path(args.model).name if Path(args.model).exists() else args.model,
            "dtype": "float32" + (", bf16 autocast" if precision == "bf16" else ""),
        },
        "dataset_info": {"task": args.task, "scored_images": scored_images},
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Versions and machine."""
    packages = {"peft": peft, "transformers": transformers, "accelerate": accelerate, "datasets": datasets}
    return {
        "package_info": {f"{name}-version": package.__version__ for name, package in packages.items()},
        "system_info": {
            "system": platform.system(),
            "processor": processor_name(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
        "pytorch_info": torch.__version__,
    }


def processor_name() -> str:
    """Name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Commit of this repository, or an empty string."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


if __name__ == "__main__":
    main()
