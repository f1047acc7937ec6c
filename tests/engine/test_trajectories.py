"""30 steps of training: however a block keeps what its backward needs, they are the same; and the same as last year's.

`python tests/engine/test_trajectories.py` prints `PINNED`. Print it anew only if what a step computes is meant to
change, and say so: it is there to show when all levels drift together.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig
from peft_bsr.cost import saved_activations

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"image_size": 32, "patch_size": 8}  # 17 tokens
HALVED = {"trainable_blocks": [1, 3], "keep_rate": 0.5}
CONFIGS = {
    "bsr": lambda **how: BSRConfig(**HALVED, **how),
    "bsr low-rank": lambda **how: BSRConfig(**HALVED, trainable="lora", r=4, **how),
    "bsr low-rank everywhere": lambda **how: BSRConfig(
        trainable_blocks="every:1", keep_rate=1.0, trainable="lora", r=4, **how
    ),
    "alast": lambda **how: ALaSTConfig(token_multiple=1, **how),
    "alast drawn": lambda **how: ALaSTConfig(token_multiple=1, trainable_blocks_per_step=2, selection="sample", **how),
}
LEVELS = {  # name -> (lean, use_reentrant)
    "exact": ("exact", None),
    "max": ("max", None),
    "checkpointed": ("off", False),
    "checkpointed, reentrant": ("off", True),
    "exact, checkpointed": ("exact", False),
}
PINNED_STEPS = (0, 9, 19, 29)
PINNED = {  # (loss, gradient norm) in these steps
    "bsr": [(1.2381, 2.8488), (0.86568, 1.9428), (0.45484, 1.8822), (0.12493, 0.80125)],
    "bsr low-rank": [(1.0331, 1.7646), (1.223, 2.192), (0.71895, 1.5417), (0.44782, 1.5579)],
    "bsr low-rank everywhere": [(1.184, 2.6016), (1.0157, 3.5052), (0.54321, 2.0888), (0.15147, 1.0537)],
    "alast": [(1.3038, 3.1334), (0.93906, 2.214), (0.48407, 2.2214), (0.097982, 0.93578)],
    "alast drawn": [(1.3038, 4.1377), (1.0219, 2.4979), (0.64554, 2.4746), (0.40246, 1.9839)],
}


def build(name, lean, use_reentrant, numbers):
    """The model in training mode, its weights from the generator `numbers`."""
    vit = ViTForImageClassification(ViTConfig(**SIZES, num_labels=3))
    with torch.no_grad():  # not what a version of transformers starts from, and large enough that all of it matters
        for parameter in vit.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2, generator=numbers)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=numbers), alpha=0.1)
    model = get_peft_model(vit, CONFIGS[name](lean=lean)).train()
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key:
                parameter.normal_(0, 0.05, generator=numbers)
    if use_reentrant is not None:
        vit.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


@cache
def trajectory(name, lean="off", use_reentrant=None):
    """Loss and norm of all gradients in 30 steps [30, 2]."""
    numbers = torch.Generator().manual_seed(0)
    model = build(name, lean, use_reentrant, numbers)
    images = torch.randn(4, 8, 3, 32, 32, generator=numbers)
    labels = torch.randint(3, (4, 8), generator=numbers)
    # Adam would hide a gradient of the wrong size, and make steps of rounding errors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for step in range(30):
        loss = model(pixel_values=images[step % 4], labels=labels[step % 4]).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found.append([loss.item(), norm.item()])
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_level_trains_alike(name, level):
    torch.testing.assert_close(trajectory(name, *LEVELS[level]), trajectory(name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_level_keeps_less(name, level):
    """Otherwise stock blocks would be compared with themselves."""
    images, numbers = torch.randn(8, 3, 32, 32), torch.Generator()
    saved = [
        saved_activations(model, lambda model=model: model(pixel_values=images).logits.sum())
        for model in (build(name, *LEVELS[level], numbers), build(name, "off", None, numbers))
    ]
    assert saved[0] < 0.85 * saved[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stock_blocks_train_as_they_did(name):
    found = trajectory(name)[list(PINNED_STEPS)]
    torch.testing.assert_close(found, torch.tensor(PINNED[name], dtype=torch.float64), rtol=1e-3, atol=0)
    assert found[-1, 0] < 0.7 * found[0, 0], "it learns"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in CONFIGS:
        rows = [tuple(float(f"{value:.5g}") for value in row) for row in trajectory(name)[list(PINNED_STEPS)]]
        print(f'    "{name}": {rows},')
