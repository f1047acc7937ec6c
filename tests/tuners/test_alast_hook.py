"""torch's hook on optimizers is there only while a schedule is."""

from __future__ import annotations

import subprocess
import sys

HOOKS = """
import copy, gc, io, torch
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
import peft_bsr
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
make = lambda: ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **sizes))
found = [len(hooks)]  # after the import
bsr = get_peft_model(make(), peft_bsr.BSRConfig())
found.append(len(hooks))  # with a method that needs none
model = get_peft_model(make(), peft_bsr.ALaSTConfig())
reference = copy.deepcopy(model)
torch.save(model, file := io.BytesIO())
found.append(len(hooks))  # with two schedules
del model
gc.collect()
found.append(len(hooks))  # with the copy alone
reference.unload()
del reference
gc.collect()
found.append(len(hooks))  # without any
file.seek(0)
loaded = torch.load(file, weights_only=False).train()
found.append(len(hooks))  # with an unpickled one
optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
for _ in range(2):
    loaded(pixel_values=torch.randn(1, 3, 32, 32)).logits.sum().backward()
    optimizer.step()
found.append(loaded.base_model.schedule().step)
print(found)
"""


def test_optimizers_are_watched_only_while_there_is_a_schedule():
    result = subprocess.run([sys.executable, "-c", HOOKS], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.strip() == "[0, 0, 1, 1, 0, 1, 2]", result.stdout + result.stderr
