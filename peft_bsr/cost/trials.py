"""Gain of each block when it is trained alone for a short run, from a feature cache."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from peft_bsr.backbones import ModelSpec
from peft_bsr.training import FeatureCache, default_learning_rate
from peft_bsr.training.types import MapStyleDataset
from peft_bsr.tuners import BSRConfig

_HELD_OUT = 5  # every fifth sample
Loss = Callable[[nn.Module, Mapping[str, object]], Tensor]
Collate = Callable[[list[Any]], dict[str, Any]]


def gains_of_trials(
    model: nn.Module,
    spec: ModelSpec,
    samples: MapStyleDataset,
    loss_of: Loss,
    *,
    batch_size: int,
    epochs: int,
    collate: Collate,
    progress: bool,
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Decrease of the held-out loss against the head alone, for each block: trained whole, and with a low-rank update.

    Args:
        model: Model without adapters; copies of it are trained.
        spec: Spec of the model.
        samples: Samples; four fifths are used for training, one fifth is held out.
        loss_of: (model, batch) -> loss.
        batch_size: Samples per step.
        epochs: Epochs over the training samples.
        collate: Makes a batch from samples.
        progress: Whether to show a progress bar.
    """
    held = list(range(0, len(samples), _HELD_OUT))
    trained = [index for index in range(len(samples)) if index % _HELD_OUT]
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    gains: dict[str, list[dict[str, float]]] = {"full": [], "lora": []}
    head_loss = None
    count = spec.last_read + 1
    bar = tqdm(total=2 * count + 1, desc="Trials", unit="run", disable=not progress)

    def run(block: int, form: str, folder: str, head_alone: bool = False) -> float:
        torch.manual_seed(0)
        config = BSRConfig(trainable_blocks=[block], reduction_blocks=[], trainable=form)
        adapted = get_peft_model(copy.deepcopy(model), config)
        cache = FeatureCache.build(
            adapted, samples, folder, collate=collate, batch_size=batch_size, progress=False, check_all=False
        )
        inside = [p for n, p in adapted.named_parameters() if p.requires_grad and f".{spec.blocks[block]}." in n]
        if head_alone:
            for parameter in inside:
                parameter.requires_grad_(False)
        ids = set(map(id, inside))
        head = [p for p in adapted.parameters() if p.requires_grad and id(p) not in ids]
        groups = [{"params": head, "lr": default_learning_rate("linear")}]
        if not head_alone:
            groups.append({"params": inside, "lr": default_learning_rate("bsr", {"trainable": form})})
        optimizer = torch.optim.AdamW(groups)
        with cache.read_by(adapted):
            adapted.train()
            for _ in range(epochs):
                for batch in DataLoader(Subset(cache, trained), batch_size, shuffle=True):
                    loss_of(adapted, batch).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            adapted.eval()
            with torch.no_grad():
                losses = [
                    loss_of(adapted, batch).item() * len(batch["labels"])
                    for batch in DataLoader(Subset(cache, held), batch_size)
                ]
        bar.update()
        return sum(losses) / len(held)

    with bar, torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda):
        for block in range(count):
            with tempfile.TemporaryDirectory() as folder:
                if head_loss is None:
                    head_loss = run(block, "full", folder, head_alone=True)
                for form, found in gains.items():
                    found.append({"block": head_loss - run(block, form, folder)})
    for found in gains.values():
        found.extend({"block": 0.0} for _ in range(spec.depth - count))  # blocks that the output does not depend on
    return gains["full"], gains["lora"]


__all__ = ["Collate", "gains_of_trials"]
