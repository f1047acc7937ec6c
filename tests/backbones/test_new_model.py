"""docs/new_model.md, run as it stands, on a toy model that needs an entry; then the whole contract on it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput

from peft_bsr import UnsupportedModelError, probe_model, register_family, unregister_family

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "contract"))

import checks  # noqa: E402

pytestmark = pytest.mark.sampled(2)


class ToyConfig(PreTrainedConfig):
    model_type = "toy_vit"

    def __init__(self, side: int = 32, hidden_size: int = 32, num_hidden_layers: int = 4, **kwargs: object) -> None:
        self.side = side
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class ToyAttention(nn.Module):
    """Four heads; queries and keys are rotated by the number of their token, which it counts by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden_states, token_numbers=None):
        if token_numbers is None:
            token_numbers = torch.arange(hidden_states.shape[1])[None]
        q, k, v = (
            project(hidden_states).unflatten(2, (4, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        angle = token_numbers[:, None, :, None] * 0.3
        q, k = (t * angle.cos() + t.roll(t.shape[-1] // 2, -1) * angle.sin() for t in (q, k))
        weights = nn.functional.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class ToyBlock(GradientCheckpointingLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = ToyAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attention(self.before(hidden_states))[0]
        return hidden_states + self.mlp(self.after(hidden_states))


class ToyViT(PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.blocks = nn.ModuleList(ToyBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, pixel_values):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        hidden_states = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return ImageClassifierOutput(logits=self.classifier(self.norm(hidden_states)[:, 0]))


def make_toy(seed: int = 0) -> ToyViT:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyViT(ToyConfig()).eval()


@pytest.fixture
def entry(monkeypatch):
    """The page's own code, run; it registers the family and uses `model`."""
    page = (ROOT / "docs" / "new_model.md").read_text()
    names: dict[str, object] = {"model": make_toy()}
    first, *blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.setitem(checks.SUPPORTED, "toy", make_toy)
    for code in blocks[:1]:
        exec(compile(code, "docs/new_model.md", "exec"), names)
    yield names, [first, *blocks[1:]]
    unregister_family("toy_vit")


def test_the_page_runs(entry):
    names, blocks = entry
    for code in blocks:
        exec(compile(code, "docs/new_model.md", "exec"), names)
    assert names["spec"].num_prefix == 1


@pytest.mark.parametrize("mode", ["compact", "full_view"])
@pytest.mark.parametrize("check", checks.CHECKS)
def test_the_toy_model_passes_the_contract(entry, check, mode):
    checks.CHECKS[check]("toy", mode)


def test_without_an_entry_it_is_refused():
    with pytest.raises(UnsupportedModelError, match="its config has no `image_size`"):
        probe_model(make_toy())


def test_with_half_an_entry_it_is_refused_all_the_same(entry):
    names, _ = entry
    rule = names["FamilyRule"]
    unregister_family("toy_vit")
    register_family("toy_vit", rule(probe_inputs=names["toy_inputs"]))
    with pytest.raises(UnsupportedModelError, match="its blocks use the position of a token inside"):
        probe_model(make_toy())


def test_an_entry_is_made_once(entry):
    names, _ = entry
    with pytest.raises(ValueError, match=r"'toy_vit' has an entry already.*unregister_family"):
        register_family("toy_vit", names["FamilyRule"]())
    with pytest.raises(KeyError):
        unregister_family("no_such_family")


def test_the_reasons_on_the_page_are_those_of_the_code():
    page = (ROOT / "docs" / "new_model.md").read_text()
    code = " ".join(re.sub(r'"\s+f?"', "", path.read_text()) for path in sorted((ROOT / "peft_bsr").rglob("*.py")))
    for reason in re.findall(r'^\| "([^"]+)"', page, re.M):
        words = reason.split(" ...")[0].replace("block 2", "block {index}")
        assert words in code, reason
