"""How many sequence lengths a run of ALaST meets: attention and compilers plan for each anew."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 112, "patch_size": 8, "num_channels": 1, "num_labels": 10}  # 197 tokens


@pytest.mark.slow
def test_lengths_repeat_in_a_run_on_digits():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = get_peft_model(ViTForImageClassification(ViTConfig(**SIZES)), ALaSTConfig()).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    lengths: list[set[int]] = []
    for block in model.base_model.spec.blocks:
        model.get_base_model().get_submodule(block).register_forward_pre_hook(
            lambda module, args: lengths[-1].add(args[0].shape[1])
        )
    for step in range(200):
        lengths.append(set())
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:8]
        pixels = torch.nn.functional.interpolate(images[rows], size=112)
        model(pixel_values=pixels, labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    early, late = set().union(*lengths[:100]), set().union(*lengths[100:])
    budgets = model.base_model.schedule().budgets
    assert len(early) >= 6 and max(budgets) - min(budgets) > 0.05, "budgets moved"
    assert len(early | late) <= 26
    assert len(late - early) <= 3, sorted(late - early)  # budgets still move slowly; two, when this was written
    assert all(length % 8 == 0 or length == 197 for length in early | late), sorted(early | late)
