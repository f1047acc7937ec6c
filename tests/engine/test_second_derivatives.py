"""Second derivatives are right, or an error says that there are none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from peft_bsr.core import reduce_tokens
from peft_bsr.errors import ForwardError

sys.path.insert(0, str(Path(__file__).parent))

from pairs import base_of, batch_of, make


def gradient_penalty(**settings):
    model = make("vit", "off", reduction_blocks=[1, 2], **settings)
    base_of(model).set_attn_implementation("eager")  # torch's own has no second derivatives on the CPU
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and "v_proj" in n and "weight" in n]
    loss = model(**batch_of(model)).logits.sin().sum()
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)


def test_second_derivatives_of_fused_tokens_are_refused_and_others_right(monkeypatch):
    with pytest.raises(ForwardError, match=r"fused tokens have no second derivatives .* `fuse_dropped=False`"):
        gradient_penalty()
    found = gradient_penalty(fuse_dropped=False)
    monkeypatch.setattr("peft_bsr.engine.bound.reduce_tokens", plain_reduction)
    for a, b in zip(found, gradient_penalty(fuse_dropped=False), strict=True):
        torch.testing.assert_close(a, b)


def plain_reduction(tokens, origins, scores, num_prefix, keep, *others):
    if origins is None:
        origins = torch.arange(tokens.shape[1] - num_prefix).expand(len(tokens), -1)
    return reduce_tokens(tokens, origins, scores, num_prefix, keep, *others)
