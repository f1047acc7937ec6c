"""What an attention gets next to the hidden states is found by the probe, not guessed from a shape in each forward."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput

from peft_bsr import BSRConfig, probe_model

WIDTH = 32


class TableConfig(PreTrainedConfig):
    model_type = "table_vit"

    def __init__(self, image_size: object = 32, is_fixed: bool = False, rows: int = 0, **kwargs: object) -> None:
        self.image_size, self.is_fixed, self.rows = image_size, is_fixed, rows
        self.hidden_size, self.num_hidden_layers = WIDTH, 3
        super().__init__(**kwargs)


class TableAttention(nn.Module):
    """Scales queries by a table [1, N, D] of positions; adds to its output what it makes of `context` [1, C, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden_states, table, context=None):
        q, k, v = (
            tokens.unflatten(2, (4, -1)).transpose(1, 2)
            for tokens in (self.query(hidden_states) * table, self.key(hidden_states), self.value(hidden_states))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if context is not None:
            weights = torch.arange(1, context.shape[1] + 1, dtype=context.dtype)[:, None]
            mixed = mixed + (weights * context).sum(dim=1, keepdim=True)
        return self.out(mixed), None


class TableBlock(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), TableAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, hidden_states, table, context=None):
        hidden_states = hidden_states + self.attention(self.before(hidden_states), table, context)[0]
        return hidden_states + self.mlp(self.after(hidden_states))


class TableViT(PreTrainedModel):
    config_class = TableConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(TableBlock() for _ in range(3))
        self.norm, self.classifier = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.post_init()

    def forward(self, pixel_values):
        size = self.config.image_size
        if self.config.is_fixed and pixel_values.shape[2:] != ((size, size) if isinstance(size, int) else tuple(size)):
            raise ValueError("an image of another size")
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        table, context = table_of(tokens.shape[1]), None
        if self.config.rows:
            context = torch.randn(1, self.config.rows, WIDTH, generator=torch.Generator().manual_seed(0))
        for block in self.blocks:
            tokens = block(tokens, table, context)
        return ImageClassifierOutput(logits=self.classifier(self.norm(tokens).mean(dim=1)))


def table_of(num_tokens: int) -> torch.Tensor:
    positions = torch.arange(float(num_tokens))[:, None] * torch.arange(1, WIDTH + 1)
    return (1.5 + positions.sin())[None]


def make(**kwargs):
    torch.manual_seed(0)
    return TableViT(TableConfig(**kwargs)).eval()


@pytest.mark.parametrize("is_fixed", [False, True], ids=["any size", "one size"])
def test_a_table_with_as_many_columns_as_rows_is_a_table(is_fixed):
    """32 tokens of 32 channels, an image of 4 x 8 patches: by its shape it is a mask."""
    spec = probe_model(make(image_size=(32, 64), is_fixed=is_fixed))
    assert spec.num_patches == WIDTH and spec.uses_positions
    assert dict(spec.side_inputs) == {"table": "table"}


def test_a_table_stays_one_at_a_size_where_its_shape_is_a_mask():
    """Probed with 16 tokens, run with 32: the kept tokens get their own rows, the fused one none."""
    model, seen = make(), []
    config = BSRConfig(
        trainable_blocks=[2], reduction_blocks=[1], keep_rate=0.5, reduce_at="after_block", mode="compact"
    )
    adapted = get_peft_model(model, config).eval()
    assert dict(adapted.base_model.spec.side_inputs) == {"table": "table"}
    attention = model.blocks[2].attention
    attention.register_forward_hook(lambda _m, args, kwargs, _o: seen.append(kwargs["table"]), with_kwargs=True)
    adapted(pixel_values=torch.randn(2, 3, 32, 64))
    rows = {tuple(row) for row in table_of(32)[0].tolist()}
    for table in seen[-1]:
        assert table.shape[0] < 32 and table.shape[1] == WIDTH
        assert all(tuple(row) in rows for row in table[:-1].tolist()) and not table[-1].any()


def test_an_axis_that_is_as_long_by_chance_is_left_alone():
    """A context of 16 rows next to 16 patches: it does not grow with the image."""
    assert dict(probe_model(make(rows=16)).side_inputs) == {"table": "table", "context": "other"}
    fixed = probe_model(make(rows=16, is_fixed=True))
    assert dict(fixed.side_inputs) == {"table": "table", "context": "other"}, "of one size: swapped, it would fail"
