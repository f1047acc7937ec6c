"""Helpers that compare a model with `lean="off"` to the same model with lean blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_bsr import BSRConfig
from peft_bsr.backbones import tensors_of

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from families import SUPPORTED, run_batch

CONFIG = {"trainable_blocks": [1, 3], "reduction_blocks": [1], "keep_rate": 0.7, "init_weights": False}


def make(family: str, lean: str, extra: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A model in double precision with an adapter, in training; two that differ in `lean` have the same weights."""
    torch.manual_seed(3)
    base = SUPPORTED[family](**(extra or {})).double()
    return get_peft_model(base, BSRConfig(lean=lean, **{**CONFIG, **settings})).train()


def base_of(model: Any) -> Any:
    """The model with the adapter inside, under its own names."""
    return model.base_model.model


def batch_of(model: Any) -> dict[str, Any]:
    """Inputs, in the dtype of the model."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = run_batch(base_of(model))
    return {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in batch.items()}


def step(model: Any) -> dict[str, Tensor]:
    """Outputs and gradients of a training step that always draws the same random numbers."""
    model.zero_grad()
    torch.manual_seed(5)
    outputs = tensors_of(model(**batch_of(model)))
    sum((t.double() ** 2).mean() for t in outputs if t.requires_grad).backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9, about: str = ""
) -> None:
    """Same names and shapes, and values that differ by no more than `tolerance` of the largest of their kind."""
    assert found.keys() == expected.keys(), about
    sizes = {True: 0.0, False: 0.0}  # the gradient of a key's bias is only rounding errors
    for name, value in expected.items():
        is_output = name.startswith("output")
        sizes[is_output] = max(sizes[is_output], float(value.abs().max()))
    for name, value in expected.items():
        assert found[name].shape == value.shape, f"{about} {name}"
        assert found[name].dtype == value.dtype, f"{about} {name}"
        difference = float((found[name] - value).abs().max())
        assert difference <= tolerance * sizes[name.startswith("output")], f"{about} {name}: {difference}"


def stock_halves(model: Any) -> dict[str, str]:
    """Halves that were planned lean and ran stock in the latest training forward: block and half -> reason."""
    controllers = model.base_model.controllers
    return {f"{r.index} {half}": reason for r in controllers for half, reason in r.aside.items()}


def modules_of(model: Any, index: int) -> dict[str, nn.Module]:
    """Name -> module of block `index` and its submodules, except those that the adapter added."""
    name = model.base_model.spec.blocks[index]
    found = {n: m for n, m in base_of(model).named_modules() if f"{n}.".startswith(f"{name}.")}
    return {n: m for n, m in found.items() if "token_router" not in n}
