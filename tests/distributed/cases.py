"""What is trained on one process and on two: a tiny model under each method, always in the same steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from peft_bsr import ALaSTConfig, BSRConfig, LoSAConfig, MoEConfig, SynQTConfig, TaskConfig

# wide enough that the base weights under trained copies are offloaded (64 KiB and more)
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 32, "patch_size": 8}
TASKS = {"a": 5, "b": 3, "parts": TaskConfig("parts", 2, "segmentation"), "never": 4}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
TASK_OF = ((0, 1), (2, 0), (1, 2), (0, 0))  # of each half of each step's batch
STEPS = 4


def _bsr(**settings: Any) -> BSRConfig:
    return BSRConfig(**{"trainable_blocks": [1, 3], "init_weights": False, **settings})


def _tasks(expert_type: str) -> BSRConfig:
    return _bsr(tasks=TASKS, moe=MoEConfig(4, 2, expert_type=expert_type))


CONFIGS = {
    "bsr_whole": lambda: _bsr(keep_rate=1.0),
    "bsr_reduced": _bsr,
    "bsr_stock_blocks": lambda: _bsr(lean="off"),
    "bsr_max": lambda: _bsr(lean="max"),
    "bsr_merged": lambda: _bsr(preset="balanced", reduction_blocks=[1, 2], r=4),
    "bsr_gradient_tokens": lambda: _bsr(keep_rate=1.0, gradient_tokens=0.5),
    "bsr_int8": lambda: _bsr(saved_activations="int8"),
    "bsr_bfloat16": lambda: _bsr(frozen_weights="bfloat16"),
    "bsr_lora": lambda: _bsr(trainable="lora", r=4),
    "bsr_lora_whole": lambda: _bsr(trainable="lora", r=4, keep_rate=1.0),
    "tasks_full": lambda: _tasks("full"),
    "tasks_lora": lambda: _tasks("lora"),
    "synqt": lambda: SynQTConfig(num_queries=2, bottleneck=4, attention_bottleneck=2, dropout=0.0, drop_path=0.0),
    "synqt_reduced": lambda: SynQTConfig(num_queries=2, bottleneck=4, keep_rate=0.5, dropout=0.0, drop_path=0.0),
    "losa": lambda: LoSAConfig(init_weights=False),
    "losa_reduced": lambda: LoSAConfig(layers="every:2", keep_rate=0.5, reduction_blocks=[1], init_weights=False),
    "alast": lambda: ALaSTConfig(trainable_blocks_per_step=2),
    "part": lambda: _bsr(trainable_blocks=[1, 2]),
    "part_lora": lambda: _bsr(trainable_blocks=[1, 2], trainable="lora", r=4),
    "part_beside_lora": lambda: _bsr(trainable_blocks=[1, 2]),
    "alast_sample": lambda: ALaSTConfig(trainable_blocks_per_step=2, selection="sample"),
}
STATIC = [case for case in CONFIGS if not case.startswith("alast")]


def make_base(case: str = "") -> PreTrainedModel:
    """Four blocks, 17 tokens, 3 classes; in cases of a part the tower of a LLaVA. Always the same weights."""
    torch.manual_seed(0)
    if not case.startswith("part"):
        return ViTForImageClassification(ViTConfig(num_hidden_layers=4, num_labels=3, **SIZES))
    vision, text = CLIPVisionConfig(num_hidden_layers=4, **SIZES), LlamaConfig(**TEXT)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=59))


def make_model(case: str, config: PeftConfig | None = None) -> PeftModel:
    """A model with the adapter of `case`, in training mode; always the same weights."""
    base, name = make_base(case), "default"
    torch.manual_seed(1)
    if case == "part_beside_lora":
        targets = r".*language_model.*\.(q_proj|v_proj)"
        base, name = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False)), "vision"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the second adapter
        return get_peft_model(base, config or CONFIGS[case](), adapter_name=name).train()


def batch_of(case: str, step: int, half: int) -> dict[str, Any]:
    """One half of a step's batch, 3 images."""
    generator = torch.Generator().manual_seed(10 * step + half)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    if case.startswith("part"):
        words = torch.randint(3, 59, (3, 20), generator=generator)
        words[:, 1:17] = 59  # a place for each patch
        return {"pixel_values": images, "input_ids": words, "labels": words}
    if not case.startswith("tasks"):
        return {"pixel_values": images, "labels": torch.randint(3, (3,), generator=generator)}
    task = TASK_OF[step % len(TASK_OF)][half]
    labels = torch.randint(2, (3, 32, 32) if task == 2 else (3,), generator=generator)
    return {"pixel_values": images, "task": list(TASKS)[task], "labels": labels}


def make_optimizer(inner: PeftModel) -> torch.optim.Optimizer:
    """Over all parameters of the adapter; with momentum, so that it has a state."""
    parameters = [p for p in inner.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train(
    case: str, model: nn.Module, optimizer: torch.optim.Optimizer, halves: Sequence[int], steps: Sequence[int]
) -> list[float]:
    """Train on these halves of these steps' batches; the losses."""
    losses = []
    for step in steps:
        for half in halves:
            loss = model(**batch_of(case, step, half)).loss
            (loss / len(halves)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, of all processes together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights_of(inner: PeftModel) -> dict[str, Tensor]:
    """All parameters under the names that they have without a wrapper."""
    return {name: whole(parameter) for name, parameter in inner.named_parameters()}


def probe_batch(case: str) -> dict[str, Tensor]:
    """Three images to look at outputs with."""
    batch = batch_of("part" if case.startswith("part") else "bsr", 99, 0)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
