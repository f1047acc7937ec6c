"""docs/new_method.md: its method runs, saves, loads, is planned, has a card, and is known to the command line.

In a process of its own, because a method that is registered stays so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "new_method.md"
PROGRAM = """
import contextlib, io, json, re, sys
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
torch.manual_seed(0)
vit = ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=3))
vit.save_pretrained("vit")
names = {"model": vit, "images": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
base = vit.eval()(pixel_values=names["images"]).logits

blocks = re.findall(r"^```python\\n(.*?)^```", Path(sys.argv[1]).read_text(), re.MULTILINE | re.DOTALL)
exec(compile("\\n".join(blocks), sys.argv[1], "exec"), names)

side, found = names["again"], names["expected"]
assert not torch.equal(found, base), "it trains"
attached = names["get_peft_model"](vit, names["SideConfig"]())
assert torch.equal(attached.eval()(pixel_values=names["images"]).logits, base), "it starts as the base model"
with attached.disable_adapter():
    assert torch.equal(attached(pixel_values=names["images"]).logits, base)

from peft_bsr import check_adapter
from peft_bsr.cli.main import main

check_adapter("side-adapter")
assert "a network of 8 reads the mean of their tokens" in Path("side-adapter", "README.md").read_text()
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    main(["train", "--help"])
assert "bsr, alast, losa, synqt, side" in " ".join(said.getvalue().split()), said.getvalue()
said = io.StringIO()
with contextlib.redirect_stdout(said):
    assert main(["inspect", "vit", "--json"]) == 0
assert "side" in json.loads(said.getvalue())["methods"]
print("all of it")
"""


def test_the_method_of_the_page_is_one_folder_to_everything_else(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(PAGE)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("all of it\n")
