"""A tiny base model in a folder, and adapters on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from peft_bsr import BSRConfig

LABELS = {0: "cat", 1: "dog", 2: "owl", 3: "yak"}


@pytest.fixture
def base(make_model: Callable, tmp_path: Path) -> Path:
    """A base model with 3 classes and its image processor."""
    make_model().save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make_adapter(base: Path) -> Callable[..., PeftModel]:
    """An adapter for 4 classes, away from the base model."""

    def make(config: Any = None) -> PeftModel:
        model = AutoModelForImageClassification.from_pretrained(
            base, id2label=LABELS, label2id={n: i for i, n in LABELS.items()}, ignore_mismatched_sizes=True
        )
        return get_peft_model(model, config or BSRConfig(init_weights=False)).eval()

    return make
