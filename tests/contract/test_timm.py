"""timm's architectures through transformers' TimmWrapper: `make test-timm`. Skipped if timm is not installed."""

from __future__ import annotations

import re
from collections.abc import Callable

import checks
import pytest
import timm_families
import torch
from peft import get_peft_model
from timm_families import NO_REDUCTION, REFUSED, SUPPORTED, Blocks, Refused, Tokens, arguments_of
from torch import nn

from peft_bsr import BSRConfig, UnsupportedModelError, probe_model

timm = pytest.importorskip("timm", reason="timm is not installed; `make test-timm` has it")

# in both modes; the others in their default mode
THOROUGH = ("timm_vit", "timm_vit_mean", "timm_vit_registers", "timm_dinov3", "timm_eva02", "timm_siglip_bare")


def maker(name: str, case: Tokens | Blocks | Refused) -> Callable[..., nn.Module]:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

    side = getattr(case, "side", 32)

    def make(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = TimmWrapperConfig(
                architecture=case.architecture,
                num_labels=3,
                model_args=arguments_of(case),
                pretrained_cfg={"input_size": (3, side, side)},
            )
            made = TimmWrapperModel if name.endswith("_bare") else TimmWrapperForImageClassification
            return made(config).eval()

    return make


def of_its_size(model: nn.Module, batch_size: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    shape = model.config.pretrained_cfg["input_size"]
    return {"pixel_values": torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(autouse=True)
def images(monkeypatch):
    monkeypatch.setattr(checks, "run_batch", of_its_size)


@pytest.fixture(params=SUPPORTED)
def family(request, monkeypatch):
    monkeypatch.setitem(checks.SUPPORTED, request.param, maker(request.param, SUPPORTED[request.param]))
    return request.param


@pytest.fixture(params=NO_REDUCTION)
def without_tokens(request, monkeypatch):
    monkeypatch.setitem(checks.NO_REDUCTION, request.param, maker(request.param, NO_REDUCTION[request.param]))
    return request.param


@pytest.mark.parametrize("check", [name for name in checks.CHECKS if name != "gradients"])
def test_contract(family, check):
    checks.CHECKS[check](family, None)
    if family in THOROUGH:
        checks.CHECKS[check](family, "compact" if family.endswith("_bare") else "full_view")


def test_what_the_probe_finds_and_what_runs_lean(family):
    case = SUPPORTED[family]
    spec = probe_model(checks.SUPPORTED[family]())
    assert (spec.num_prefix, spec.num_suffix, spec.uses_positions) == (case.prefix, 0, case.positions)
    assert spec.scores_from == "sdpa"
    assert checks.lean_levels(family) == case.lean


@pytest.mark.parametrize("check", checks.WITHOUT_TOKENS)
def test_contract_without_token_reduction(without_tokens, check):
    checks.CHECKS[check](without_tokens, None)


def test_blocks_alone_run_lean_and_the_default_is_refused_with_the_reason(without_tokens):
    case = NO_REDUCTION[without_tokens]
    with pytest.raises(UnsupportedModelError, match=rf"has no token reduction: {re.escape(case.reason)}"):
        get_peft_model(checks.NO_REDUCTION[without_tokens](), BSRConfig())
    assert checks.lean_levels(without_tokens) == case.lean


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_with_the_reason(name):
    with pytest.raises(UnsupportedModelError, match=rf"is not supported: {re.escape(REFUSED[name].reason)}"):
        get_peft_model(maker(name, REFUSED[name])(), BSRConfig(keep_rate=1.0))


def test_the_page_has_these_rows(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "compatibility.md").read_text()
    assert timm_families.section() in page, "run `make compatibility`"


@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov3"])
def test_its_checkpointing_works_without_reduction_and_is_refused_with_one(name, monkeypatch):
    """timm checkpoints around a block's call, so the recomputation has no route: it raises an error."""
    monkeypatch.setitem(checks.SUPPORTED, name, maker(name, SUPPORTED[name]))
    for keep_rate in (1.0, 0.7):
        model = checks.attach(name, None, keep_rate=keep_rate).train()
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
        for key, parameter in model.named_parameters():
            if key in expected:
                torch.testing.assert_close(parameter.grad, expected[key])
