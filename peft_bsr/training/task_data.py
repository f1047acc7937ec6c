"""Several datasets as one, in batches for a model with tasks."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from peft_bsr.errors import ConfigError
from peft_bsr.training.types import Batch, Example, MapStyleDataset

STRATEGIES = ("round_robin", "proportional", "temperature")


class TaskDataset(Dataset):
    """Concatenated datasets, each example with the index of its task.

    Args:
        datasets: Task -> dataset of dicts, in the order of the adapter's tasks.

    Examples:
        >>> data = TaskDataset({"a": [{"labels": 1}], "b": [{"labels": 5}]})
        >>> len(data), data[1]
        (2, {'labels': 5, 'task_ids': 1})
    """

    def __init__(self, datasets: Mapping[str, MapStyleDataset]) -> None:
        self.datasets = dict(datasets)
        self.ends = list(accumulate(len(dataset) for dataset in self.datasets.values()))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        task = bisect_right(self.ends, index)
        start = self.ends[task - 1] if task else 0
        return {**list(self.datasets.values())[task][index - start], "task_ids": task}


class TaskBatchSampler(Sampler[list[int]]):
    """Batches of one task each, for a `TaskDataset`. All are full; the data of a task is repeated when used up.

    Batches depend on seed and epoch alone, so a resumed run (`accelerate.skip_first_batches`) gets the same ones.

    Args:
        data: The data.
        batch_size: Images per batch.
        strategy: Order of the tasks: `"round_robin"` (as in the paper), `"proportional"` (at random by dataset size) or
            `"temperature"` (by size ** (1 / temperature); between the two others). Default `"round_robin"`.
        temperature: Temperature above 0. Default 2.
        seed: Random seed. Default 0.
        num_batches: Batches per epoch. Default None: the number of full batches in the data.

    Raises:
        ConfigError: If the strategy is unknown, or a number is not above 0.

    Examples:
        >>> data = TaskDataset({"a": [{}] * 4, "b": [{}] * 2})
        >>> [data[batch[0]]["task_ids"] for batch in TaskBatchSampler(data, batch_size=2)]
        [0, 1, 0]
    """

    def __init__(
        self,
        data: TaskDataset,
        batch_size: int,
        strategy: str = "round_robin",
        temperature: float = 2.0,
        seed: int = 0,
        num_batches: int | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"`strategy={strategy!r}` is unknown. Use one of {', '.join(map(repr, STRATEGIES))}.")
        if batch_size < 1 or temperature <= 0 or (num_batches is not None and num_batches < 1):
            raise ConfigError(f"{batch_size=}, {temperature=} and {num_batches=} must be above 0.")
        self.sizes = [len(dataset) for dataset in data.datasets.values()]
        if min(self.sizes) < 1:
            raise ConfigError(f"every task needs data; there are {self.sizes} examples of {list(data.datasets)}.")
        self.starts = [end - size for end, size in zip(data.ends, self.sizes, strict=True)]
        self.batch_size = batch_size
        self.drop_last = True  # for accelerate: every batch is full
        self.strategy, self.temperature, self.seed = strategy, temperature, seed
        self.num_batches = num_batches or sum(max(1, size // batch_size) for size in self.sizes)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, that determines the batches."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of each batch."""
        generator = random.Random(f"{self.seed} {self.epoch}")
        power = 1.0 if self.strategy == "proportional" else 1 / self.temperature
        chances = [size**power for size in self.sizes]
        left: list[list[int]] = [[] for _ in self.sizes]
        for step in range(self.num_batches):
            if self.strategy == "round_robin":
                task = step % len(self.sizes)
            else:
                (task,) = generator.choices(range(len(self.sizes)), chances)
            while len(left[task]) < self.batch_size:
                order = generator.sample(range(self.sizes[task]), self.sizes[task])
                left[task] += [self.starts[task] + index for index in order]
            batch, left[task] = left[task][: self.batch_size], left[task][self.batch_size :]
            yield batch


def collate_tasks(examples: Sequence[Example]) -> Batch:
    """A batch for a model with tasks, for a DataLoader or the Trainer.

    Args:
        examples: Dicts with `pixel_values`, `labels` or `label`, and `task_ids` (an index) or `task` (a name); other
            entries are ignored. Labels of several tasks may have different shapes.

    Returns:
        `pixel_values`, `task_ids` [B] or `task` (a list of names), and `labels` if there are any: a tensor, or a list
        if their shapes differ.
    """
    batch: Batch = {"pixel_values": torch.stack([torch.as_tensor(e["pixel_values"]) for e in examples])}
    if "task_ids" in examples[0]:
        batch["task_ids"] = torch.tensor([int(example["task_ids"]) for example in examples])
    elif "task" in examples[0]:
        batch["task"] = [example["task"] for example in examples]
    name = next((name for name in ("labels", "label") if name in examples[0]), None)
    if name is not None:
        labels: list[Tensor] = [torch.as_tensor(example[name]) for example in examples]
        is_even = len({(label.shape, label.dtype) for label in labels}) == 1
        batch["labels"] = torch.stack(labels) if is_even else labels
    return batch


__all__ = ["STRATEGIES", "TaskBatchSampler", "TaskDataset", "collate_tasks"]
