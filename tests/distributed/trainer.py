"""One of the processes that `accelerate launch` starts: the Trainer with each method, and a file of what came out.

accelerate launch --multi_gpu --num_processes 2 tests/distributed/trainer.py FOLDER NAME CASES STEPS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_bsr import ALaSTConfig
from peft_bsr.training import ALaSTCallback
from tests.distributed.cases import STATIC, batch_of, make_model, weights_of

BATCH_SIZE = 4  # of all processes together
NUM_STEPS = 6


class StopAt(TrainerCallback):
    """Ends a run at a step, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


class Images(Dataset):
    """48 images of three classes; in cases of a part with text."""

    def __init__(self, case: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(48, 3, 32, 32, generator=generator)
        self.words = batch_of(case, 0, 0).get("input_ids")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.words is None:
            return {"pixel_values": self.images[index], "labels": torch.tensor(index % 3)}
        words = self.words[index % 3]
        return {"pixel_values": self.images[index], "input_ids": words, "labels": words}


def train(folder: Path, name: str, case: str, steps: int) -> None:
    """Train up to a step, going on from the checkpoint in `folder` if there is one; rank 0 writes what came out.

    Args:
        folder: Gets `case`, with a checkpoint after every second step.
        name: Of the file.
        case: See `cases.CONFIGS`.
        steps: To stop at. The learning rate falls until step `NUM_STEPS`, wherever a run stops.
    """
    model = make_model(case)
    arguments = TrainingArguments(
        output_dir=str(folder / case),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-3,
        adam_epsilon=1e-3,  # a key's bias has no gradient but rounding, which Adam would make steps of
        logging_steps=1,
        save_steps=2,
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
        ddp_find_unused_parameters=case not in STATIC,
        use_cpu=True,
    )
    arguments.per_device_train_batch_size = BATCH_SIZE // arguments.world_size
    trainer = Trainer(model=model, args=arguments, train_dataset=Images(case))
    if isinstance(model.peft_config["default"], ALaSTConfig):
        trainer.add_callback(ALaSTCallback())
    trainer.add_callback(StopAt(steps))
    checkpoints = sorted((folder / case).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if trainer.is_world_process_zero():
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        found = {"losses": losses, "weights": weights_of(model), "processes": trainer.args.world_size}
        torch.save(found, folder / f"{name}-{case}.pt")


def main() -> None:
    """Train each case."""
    folder, name, cases, steps = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    for case in cases:
        train(folder, name, case, steps)


if __name__ == "__main__":
    main()
