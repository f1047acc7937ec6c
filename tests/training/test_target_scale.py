"""Values are trained on a scale of their own, and the last layer of every method takes it over exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import UnsupportedModelError
from peft_bsr.cli.methods import ALL_METHODS, attach
from peft_bsr.training.target_scale import TargetScale, output_layer

VALUES = np.array([[1000.0, 0.1], [3000.0, 0.3], [2000.0, 0.2], [4000.0, -0.1]])


def tiny() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=2)).eval()


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_scale_goes_into_the_last_layer(method, tmp_path):
    scale = TargetScale.of(VALUES)
    model = attach(method, tiny(), {}).eval()
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        scale.fold_into(model, pixels[:1])
        after = model(pixel_values=pixels).logits
    assert after.numpy() == pytest.approx(scale.restore(before.numpy()), rel=1e-4)
    assert not np.allclose(after, before)


def test_batches_are_scaled():
    scale = TargetScale.of(VALUES)
    batch = scale.collate([{"pixel_values": torch.zeros(3, 4, 4), "labels": list(row)} for row in VALUES])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].mean(0).numpy() == pytest.approx(0, abs=1e-6)
    assert batch["labels"].std(0, correction=0).numpy() == pytest.approx(1)
    assert scale.restore(batch["labels"].numpy()) == pytest.approx(VALUES, rel=1e-5)


def test_a_model_whose_last_layer_cannot_take_it_over():
    model = tiny()
    model.classifier.bias = None
    with pytest.raises(UnsupportedModelError, match="no trained Linear module with a bias gives its `logits`"):
        output_layer(model, torch.randn(1, 3, 32, 32))
