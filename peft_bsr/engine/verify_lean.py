"""Proof at attach that lean halves of a block give what the stock block gives: outputs and gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import Column, StockRun, no_zero_tables, probe_inputs, quiet, run_stock, tensors_of, tolerance
from peft_bsr.engine.plan import Lean, Plan
from peft_bsr.engine.verify import routed

logger = logging.getLogger(__name__)


def verify_lean(model: nn.Module, column: Column, plan: Plan, stock: StockRun | None = None) -> Plan:
    """Try every part of `plan`'s lean blocks on one of them, and leave out what is not equal; nothing is changed.

    Args:
        model: The model.
        column: Its column.
        plan: A plan; the queries of its last block are restricted here, if the head reads special tokens alone.
        stock: The probe's forward, if there is one; default: one more is run.

    Returns:
        The plan with the parts that passed. What did not is logged with the reason.
    """
    index = next((i for i, block in enumerate(plan.blocks) if block.lean is not None), None)
    if index is None:
        return plan
    name = type(model).__name__
    if column.anatomy is None:
        logger.info("%s: blocks run as they are, their parts are not those of a pre-norm block", name)
        return plan.with_lean(None)
    wanted = plan.blocks[index].lean
    assert wanted is not None
    with quiet(model):
        stock = stock or run_stock(model, column.blocks, probe_inputs(model, 1, column.image_shape))
        parts = {}
        for part in ("attention", "mlp"):
            alone = replace(wanted, attention=part == "attention", mlp=part == "mlp")
            parts[part] = _is_equal(model, column, index, alone, stock, f"{name}: lean {part}")
        lean = replace(wanted, **parts)
        plan = plan.with_lean(lean if any(parts.values()) else None)
        last = len(plan.blocks) - 1
        if not parts["attention"] or not _reads_prefix_alone(column, plan):
            return plan
        short = replace(lean, num_queries=column.num_prefix)
        if not _is_equal(model, column, last, short, stock, f"{name}: special tokens alone in the last block"):
            return plan
    return Plan((*plan.blocks[:-1], replace(plan.blocks[-1], lean=short)), plan.mode)


def _reads_prefix_alone(column: Column, plan: Plan) -> bool:
    """Whether nobody looks at the patches that the last block gives."""
    reads_others = column.reads_patches or column.reads_suffix or not column.reads_prefix
    last = plan.blocks[-1]
    return not reads_others and plan.mode == "compact" and last.reduction is None and last.lean is not None


def _is_equal(model: nn.Module, column: Column, index: int, lean: Lean, stock: StockRun, what: str) -> bool:
    """Whether block `index` gives the same output and gradients with `lean` as without."""
    (hidden, *others), kwargs, _ = stock.calls[index]
    block = model.get_submodule(column.blocks[index])
    keep_all = Plan.static(column.depth, [index], {}).with_lean(None)
    found, saved = [], []
    for candidate in (None, lean):
        blocks = (*keep_all.blocks[:index], replace(keep_all.blocks[index], lean=candidate))
        plan = Plan((*blocks, *keep_all.blocks[index + 1 :]))
        with routed(model, column, plan, start_at=index, like=hidden), _in_training(block) as parameters:
            tokens = hidden.detach().clone().requires_grad_()
            kept: dict[int, int] = {}
            with no_zero_tables(block), torch.autograd.graph.saved_tensors_hooks(partial(_count, kept), lambda t: t):
                output = tensors_of(block(tokens, *others, **kwargs))[0][:, : lean.num_queries]
            saved.append(sum(kept.values()))
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            gradients = torch.autograd.grad((output * weights).sum(), [tokens, *parameters], allow_unused=True)
        found.append([output.detach(), *gradients])
    if saved[1] >= saved[0]:
        logger.info("%s: left out, it keeps no less for backward than the stock block", what)
        return False
    expected, candidates = found
    if [t is None for t in expected] != [t is None for t in candidates]:
        logger.info("%s: left out, a gradient is missing", what)
        return False
    pairs = [(a, b) for a, b in zip(expected, candidates, strict=True) if a is not None]
    # what is zero but for rounding (a key's bias: softmax does not see it) is measured by the others' size
    floor = 1e-3 * max(float(a.abs().max()) for a, _ in pairs[1:])
    error = max(float((a - b).abs().max() / a.abs().max().clamp_min(floor)) for a, b in pairs)
    if not error <= tolerance(hidden.dtype):
        logger.info("%s: left out, it differs from the stock block by %.1e", what, error)
        return False
    return True


def _count(kept: dict[int, int], tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    kept[storage.data_ptr()] = storage.nbytes()
    return tensor


@contextmanager
def _in_training(block: nn.Module) -> Iterator[list[Tensor]]:
    """`block` itself is in training mode, its parts are not (no dropout), and all its parameters ask for gradients."""
    parameters: list[Any] = list(block.parameters())
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    block.training = True
    checkpointing = block.__dict__.pop("gradient_checkpointing", None)  # its class says False then
    try:
        with torch.enable_grad():
            yield [p for p in parameters if p.requires_grad]
    finally:
        block.training = False
        if checkpointing is not None:
            block.__dict__["gradient_checkpointing"] = checkpointing
        for parameter in frozen:
            parameter.requires_grad_(False)
