"""Check at attach that the lean halves of a block have the stock block's outputs and gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from peft_bsr.backbones import (
    ModelSpec,
    StockRun,
    no_zero_tables,
    probe_inputs,
    quiet,
    run_stock,
    seed,
    tensors_of,
    tolerance,
)
from peft_bsr.core import is_quantized
from peft_bsr.engine import BlockPlan, LivingBytes, Plan
from peft_bsr.engine.parts import attention_dropouts
from peft_bsr.selftest.reduction import single_block, training_mode

logger = logging.getLogger(__name__)

_INT8_ERROR = 5e-2  # relative error of a block's gradients by their norm; 1e-2 is typical


def verify_lean(
    model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None = None, index: int | None = None
) -> Plan:
    """Check each half of the plan's lean blocks on one block, and remove from the plan those that are not equal.

    A block with dropout is checked with dropout: from the same random state, stock and lean blocks drop the same
    values. The model is not changed.

    Args:
        model: The model.
        spec: Description of the model.
        plan: A plan. If the head reads prefix tokens only, the queries of its last block are restricted here.
        stock: The probe's forward. Default None: a new one is run.
        index: The block to check. Default None: the first one that saves less for backward.

    Returns:
        The plan with the parts that passed. Those that failed are logged and added to `Plan.notes`, with the reason.
    """
    if index is None:
        index = next((i for i, block in enumerate(plan.blocks) if block.saves_less), None)
    if index is None:
        return plan
    wanted, notes = plan.blocks[index], list(plan.notes)

    def passes(block: int, candidate: BlockPlan, what: str) -> bool:
        num_queries = None if candidate.lean is None else candidate.lean.num_queries
        expected = stock_block(block, num_queries)
        problem = find_problem(expected, try_block(model, spec, block, candidate, run, num_queries), candidate.int8)
        if problem is not None:
            notes.append(f"{what}: {problem}")
            logger.info("%s: %s: left out, %s", type(model).__name__, what, problem)
        return problem is None

    @cache
    def stock_block(block: int, num_queries: int | None) -> Tried:
        return try_block(model, spec, block, BlockPlan(True), run, num_queries)

    with quiet(model):
        run = stock or run_stock(model, spec.blocks, probe_inputs(model, 1, spec.image_shape))
        if wanted.lean is not None and spec.block_spec is None and spec.whole_block is None:
            notes.append("lean blocks: their parts are not those of a pre-norm block")
            logger.info("%s: blocks run stock, %s", type(model).__name__, notes[-1].partition(": ")[2])
            plan = plan.with_lean(None)
        elif wanted.lean is not None:
            parts = {}
            for part in ("attention", "mlp"):
                half = replace(wanted.lean, attention=part == "attention", mlp=part == "mlp")
                parts[part] = passes(index, BlockPlan(True, lean=half), f"lean {part}")
                if part == "attention" and not parts[part] and spec.whole_block is None:
                    half, reason = replace(half, as_modules=True), notes.pop()
                    parts[part] = parts["as_modules"] = passes(
                        index, BlockPlan(True, lean=half), "attention as modules"
                    )
                    notes += [] if parts[part] else [reason]
            lean = replace(wanted.lean, **parts)
            plan = plan.with_lean(lean if any(parts.values()) else None)
            if parts["attention"] and not lean.as_modules and _reads_prefix_only(spec, plan):
                last = replace(lean, num_queries=spec.num_prefix)
                if passes(spec.depth - 1, BlockPlan(True, lean=last), "special tokens only in the last block"):
                    plan = replace(plan, blocks=(*plan.blocks[:-1], replace(plan.blocks[-1], lean=last)))
        if wanted.int8:
            candidate = BlockPlan(True, lean=plan.blocks[index].lean, int8=True)
            plan = plan.with_int8(passes(index, candidate, "activations in 8 bits"))
    return replace(plan, notes=tuple(notes))


def _reads_prefix_only(spec: ModelSpec, plan: Plan) -> bool:
    """Whether the last block's output is read at prefix tokens only."""
    reads_others = spec.reads_patches or spec.reads_suffix or not spec.reads_prefix
    last = plan.blocks[-1]
    return not reads_others and plan.mode == "compact" and last.reduction is None and last.lean is not None


@dataclass
class Tried:
    """Results of one forward and backward of a block.

    Attributes:
        values: The output, then the gradients of its input and of its parameters.
        living_bytes: Bytes of tensors alive between forward and backward.
        aside: Why a half ran stock, or None.
    """

    values: list[Tensor | None]
    living_bytes: int
    aside: str | None


def find_problem(expected: Tried, found: Tried, int8: bool) -> str | None:
    """How a block's outputs or gradients differ from stock, or that it saves no memory. None if it passes."""
    if found.aside is not None:
        return found.aside
    if found.living_bytes >= expected.living_bytes:
        return "it does not save less for backward than the stock block"
    if [t is None for t in expected.values] != [t is None for t in found.values]:
        return "a gradient is missing"
    pairs = [(a, b) for a, b in zip(expected.values, found.values, strict=True) if a is not None and b is not None]
    if int8:
        error = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs[1:]))
        error /= math.sqrt(sum(float(a.square().sum()) for a, _ in pairs[1:]))
        allowed = _INT8_ERROR
    else:
        # gradients that are zero except for rounding (a key's bias: softmax cancels it) are compared at others' scale
        floor = 1e-2 * max(float(a.abs().max()) for a, _ in pairs[1:])
        error = max(float((a - b).abs().max() / a.abs().max().clamp_min(floor)) for a, b in pairs)
        allowed = tolerance(pairs[0][0].dtype)
    return None if error <= allowed else f"it differs from the stock block by {error:.1e}"


def try_block(
    model: nn.Module, spec: ModelSpec, index: int, plan: BlockPlan, stock: StockRun, num_queries: int | None
) -> Tried:
    """Run block `index` by `plan`, forward and backward, with the stock forward's arguments."""
    (hidden, *others), kwargs, _ = stock.calls[index]
    block = model.get_submodule(spec.blocks[index])
    attention = spec.stage_blocks[index].attention if spec.stage_blocks else spec.attention
    with single_block(model, spec, index, plan, hidden) as controller, _in_training(block, attention) as parameters:
        tokens = hidden.detach().clone().requires_grad_()
        seed(model)
        with no_zero_tables(block):  # also in backward, which may run the attention again
            with LivingBytes() as living:
                output = tensors_of(block(tokens, *others, **kwargs))[0]
            living_bytes = living.bytes(exclude=[tokens, output], collects=False)
            output = output[:, :num_queries]
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            gradients = torch.autograd.grad((output * weights).sum(), [tokens, *parameters], allow_unused=True)
    return Tried([output.detach(), *gradients], living_bytes, next(iter(controller.aside.values()), None))


@contextmanager
def _in_training(block: nn.Module, attention_name: str) -> Iterator[list[Tensor]]:
    """Context manager: `block` trains (with its parts if there is dropout) and all its parameters require gradients."""
    parameters = list(block.parameters())
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point() and not is_quantized(p)]
    for parameter in frozen:
        parameter.requires_grad_(True)
    modules = list(block.modules()) if _has_dropout(block, attention_name) else [block]
    try:
        with training_mode(block, modules):
            yield [p for p in parameters if p.requires_grad]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _has_dropout(block: nn.Module, attention_name: str) -> bool:
    """Whether the block has dropout."""
    if any(isinstance(module, nn.Dropout) and module.p for module in block.modules()):
        return True
    attention = block.get_submodule(attention_name)
    return any(read() > 0 for read in attention_dropouts(attention, attention)[0])
