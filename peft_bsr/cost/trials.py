"""What a block gains in a short run of its own, from a feature cache."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from peft_bsr.backbones import ModelSpec
from peft_bsr.training import FeatureCache, default_learning_rate
from peft_bsr.training.random_draws import forked_draws
from peft_bsr.tuners import BSRConfig


def gains_of_trials(
    model: nn.Module,
    spec: ModelSpec,
    samples: Dataset,
    batch_size: int,
    collate: Callable[[list[Any]], dict[str, Any]],
    progress: bool,
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    raise NotImplementedError
