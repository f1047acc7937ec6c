"""Proof at attach that lean halves of a block give what the stock block gives: outputs and gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import Column, StockRun, no_zero_tables, probe_inputs, quiet, run_stock, tensors_of, tolerance
from peft_bsr.core import is_quantized
from peft_bsr.engine.int8 import watch_kept
from peft_bsr.engine.plan import BlockPlan, Plan
from peft_bsr.engine.verify import routed

logger = logging.getLogger(__name__)

_INT8_ERROR = 5e-2  # of a block's gradients, by their norm; 1e-2 is usual


def verify_lean(
    model: nn.Module, column: Column, plan: Plan, stock: StockRun | None = None, index: int | None = None
) -> Plan:
    """Try every part of `plan`'s lean blocks on one of them, and leave out what is not equal; nothing is changed.

    Args:
        model: The model.
        column: Its column.
        plan: A plan; the queries of its last block are restricted here, if the head reads special tokens alone.
        stock: The probe's forward, if there is one; default: one more is run.
        index: The block to try; default the first that saves less.

    Returns:
        The plan with the parts that passed. What did not is logged with the reason.
    """
    if index is None:
        index = next((i for i, block in enumerate(plan.blocks) if block.saves_less), None)
    if index is None:
        return plan
    wanted = plan.blocks[index]
    name = type(model).__name__
    with quiet(model):
        stock = stock or run_stock(model, column.blocks, probe_inputs(model, 1, column.image_shape))
        is_equal = partial(_is_equal, model, column, stock=stock)
        if column.anatomy is None:
            if wanted.lean is not None:
                logger.info("%s: blocks run as they are, their parts are not those of a pre-norm block", name)
            plan = plan.with_lean(None)
        elif wanted.lean is not None:
            parts = {}
            for part in ("attention", "mlp"):
                alone = replace(wanted.lean, attention=part == "attention", mlp=part == "mlp")
                parts[part] = is_equal(index, BlockPlan(True, lean=alone), what=f"{name}: lean {part}")
            lean = replace(wanted.lean, **parts)
            plan = plan.with_lean(lean if any(parts.values()) else None)
            if parts["attention"] and _reads_prefix_alone(column, plan):
                short = replace(lean, num_queries=column.num_prefix)
                what = f"{name}: special tokens alone in the last block"
                if is_equal(len(plan.blocks) - 1, BlockPlan(True, lean=short), what=what):
                    plan = replace(plan, blocks=(*plan.blocks[:-1], replace(plan.blocks[-1], lean=short)))
        if wanted.int8:
            candidate = BlockPlan(True, lean=plan.blocks[index].lean, int8=True)
            plan = plan.with_int8(is_equal(index, candidate, what=f"{name}: activations in 8 bits"))
    return plan


def _reads_prefix_alone(column: Column, plan: Plan) -> bool:
    """Whether nobody looks at the patches that the last block gives."""
    reads_others = column.reads_patches or column.reads_suffix or not column.reads_prefix
    last = plan.blocks[-1]
    return not reads_others and plan.mode == "compact" and last.reduction is None and last.lean is not None


def _is_equal(model: nn.Module, column: Column, index: int, candidate: BlockPlan, stock: StockRun, what: str) -> bool:
    """Whether block `index` gives the same output and gradients by the candidate as stock, and keeps less."""
    (hidden, *others), kwargs, _ = stock.calls[index]
    block = model.get_submodule(column.blocks[index])
    num_queries = None if candidate.lean is None else candidate.lean.num_queries
    found, saved = [], []
    for block_plan in (BlockPlan(True), candidate):
        blocks = [BlockPlan(cut_gradient=i < index) for i in range(column.depth)]
        blocks[index] = block_plan
        with routed(model, column, Plan(tuple(blocks)), start_at=index, like=hidden), _in_training(block) as parameters:
            tokens = hidden.detach().clone().requires_grad_()
            kept: dict[int, int] = {}
            count = partial(_count, kept)
            counting = torch.autograd.graph.saved_tensors_hooks(count, lambda t: t)
            with no_zero_tables(block), counting, watch_kept(count):
                output = tensors_of(block(tokens, *others, **kwargs))[0][:, :num_queries]
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
    if candidate.int8:
        error = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs[1:]))
        error /= math.sqrt(sum(float(a.square().sum()) for a, _ in pairs[1:]))
        allowed = _INT8_ERROR
    else:
        # what is zero but for rounding (a key's bias: softmax does not see it) is measured by the others' size
        floor = 1e-2 * max(float(a.abs().max()) for a, _ in pairs[1:])
        error = max(float((a - b).abs().max() / a.abs().max().clamp_min(floor)) for a, b in pairs)
        allowed = tolerance(hidden.dtype)
    if not error <= allowed:
        logger.info("%s: left out, it differs from the stock block by %.1e", what, error)
        return False
    return True


def _count(kept: dict[int, int], tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    if not is_quantized(tensor):  # a frozen weight, which the stock block does not show
        kept[storage._cdata] = storage.nbytes()
    return tensor.detach()


@contextmanager
def _in_training(block: nn.Module) -> Iterator[list[Tensor]]:
    """`block` itself is in training mode, its parts are not (no dropout), and all its parameters ask for gradients."""
    parameters: list[Any] = list(block.parameters())
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point() and not is_quantized(p)]
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
