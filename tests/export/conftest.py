"""Tiny models with an adapter that reduces tokens at three blocks, and what a graph of them is compared with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, DINOv3ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from peft_bsr import BSRConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from families import SUPPORTED, VIT, run_batch


class DINOv3Classifier(DINOv3ViTPreTrainedModel):
    """transformers has no DINOv3 with a head, and without one nothing may be dropped from the sequence."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__(config)
        self.backbone = DINOv3ViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.backbone(pixel_values).pooler_output))


def make_dinov3_classifier(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return DINOv3Classifier(DINOv3ViTConfig(**VIT, num_register_tokens=2, **settings)).eval()


class FirstTensor(nn.Module):
    """Takes one tensor and returns one: the logits, or the last hidden state of a model without a head."""

    def __init__(self, model: nn.Module, input_name: str) -> None:
        super().__init__()
        self.model = model
        self.input_name = input_name

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.model(**{self.input_name: inputs})
        return output.last_hidden_state if getattr(output, "logits", None) is None else output.logits


@pytest.fixture
def make_adapted() -> Callable[..., PeftModel]:
    """`make_adapted("vit")`: a model with an adapter that is away from the base model, in evaluation mode.

    It has not run yet: a graph must not depend on an eager forward before.
    """

    def make(family: str, reduction: str = "drop", **settings: Any) -> PeftModel:
        base = make_dinov3_classifier if family == "dinov3_compact" else SUPPORTED[family]
        mode = "compact" if family == "dinov3_compact" else None
        config = BSRConfig(
            trainable_blocks=[1, 3],
            reduction_blocks=[0, 1, 2],
            keep_rate=0.7,
            reduction=reduction,
            mode=mode,
            init_weights=False,
        )
        model = base(**settings)
        torch.manual_seed(0)
        return get_peft_model(model, config).eval()

    return make


@pytest.fixture
def make_wrapped(make_adapted: Callable[..., PeftModel]) -> Callable[..., tuple[FirstTensor, list[Tensor]]]:
    """A model that takes and returns one tensor, and inputs of two and of five images for it."""

    def make(family: str, **settings: Any) -> tuple[FirstTensor, list[Tensor]]:
        model = make_adapted(family, **settings)
        batches = [run_batch(model.get_base_model(), size, seed=size) for size in (2, 5)]
        (input_name,) = batches[0]
        return FirstTensor(model, input_name).eval(), [batch[input_name] for batch in batches]

    return make
