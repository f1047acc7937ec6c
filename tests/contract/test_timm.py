"""timm's ViT and EVA (including its DINOv3) through transformers' TimmWrapper; skipped if timm is not installed."""

from __future__ import annotations

from collections.abc import Callable

import checks
import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="timm is not installed")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
ARCHITECTURES = {  # name -> architecture, arguments, number of prefix tokens, whether blocks use positions
    "timm_vit": ("vit_tiny_patch16_224", {}, 1, False),
    "timm_vit_layer_scale": ("vit_tiny_patch16_224", {"init_values": 0.1}, 1, False),
    "timm_vit_mean": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, 0, False),
    "timm_vit_registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "dynamic_img_size": True}, 4, False),
    "timm_eva02": ("eva02_tiny_patch14_224", {}, 1, True),
    "timm_dinov3": ("vit_small_patch16_dinov3", {"num_reg_tokens": 2}, 3, True),
}


def maker(name: str) -> Callable[..., nn.Module]:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    architecture, arguments, _, _ = ARCHITECTURES[name]

    def make(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = TimmWrapperConfig(
                architecture=architecture,
                num_labels=3,
                model_args={**SMALL, **arguments},
                pretrained_cfg={"input_size": (3, 32, 32)},
            )
            return TimmWrapperForImageClassification(config).eval()

    return make


@pytest.fixture(params=ARCHITECTURES)
def family(request, monkeypatch):
    monkeypatch.setitem(checks.SUPPORTED, request.param, maker(request.param))
    return request.param


@pytest.mark.parametrize("mode", ["compact", "full_view"])
@pytest.mark.parametrize("check", [name for name in checks.CHECKS if name != "gradients"])
def test_contract(family, check, mode):
    checks.CHECKS[check](family, mode)


def test_its_checkpointing_works_without_reduction_and_is_refused_with_one(family):
    """timm checkpoints around a block's call, so the recomputation has no route: it raises an error."""
    for keep_rate in (1.0, 0.7):
        model = checks.attach(family, None, keep_rate=keep_rate).train()
        base = model.base_model.model
        loss = model(**checks.run_batch(base)).logits.square().sum()
        loss.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        base.timm_model.set_grad_checkpointing(True)
        loss = model(**checks.run_batch(base)).logits.square().sum()
        if keep_rate < 1:
            with pytest.raises(RuntimeError, match="gradient checkpointing wraps the block's call"):
                loss.backward()
            continue
        loss.backward()
        assert expected
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name])


def test_model_spec(family):
    from peft_bsr import probe_model

    spec = probe_model(maker(family)())
    assert (spec.num_prefix, spec.uses_positions) == ARCHITECTURES[family][2:]
    assert spec.scores_from == "sdpa"
