"""Check at attach that the lean halves of blocks that differ have the stock blocks' outputs and gradients."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import replace
from functools import cache

from torch import nn

from peft_bsr.backbones import ModelSpec, StageBlock, StockRun, frozen_parameters, probe_inputs, quiet, run_stock
from peft_bsr.engine import BlockPlan, Lean, Plan
from peft_bsr.selftest.lean import Tried, find_problem, try_block

logger = logging.getLogger(__name__)
_HALVES = ("attention", "mlp")


def verify_stages(model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None = None) -> Plan:
    """Check each half of the plan's lean blocks on one block of each kind. The model is not changed.

    Args:
        model: The model.
        spec: Description of a model without token reduction.
        plan: A plan.
        stock: The probe's forward. Default None: a new one is run.

    Returns:
        The plan with the halves that passed. Those that failed are logged and added to `Plan.notes`, with the reason
        and the blocks, and so are parameters of trained blocks that stay frozen.
    """
    blocks, problems = list(plan.blocks), dict[str, list[int]]()
    notes = _frozen(model, spec, plan)
    lean = next((block.lean for block in plan.blocks if block.lean is not None), None)
    if lean is None:
        return replace(plan, notes=(*plan.notes, *notes))

    @cache
    def expected(index: int) -> Tried:
        return try_block(model, spec, index, BlockPlan(True), run, None)

    def problem_of(index: int, half: str) -> str | None:
        alone = replace(lean, attention=half == "attention", mlp=half == "mlp")
        return find_problem(
            expected(index), try_block(model, spec, index, BlockPlan(True, lean=alone), run, None), False
        )

    with quiet(model):
        run = stock or run_stock(model, spec.blocks, probe_inputs(model, 1, spec.image_shape))
        found: dict[Hashable, str | None] = {}
        for index in [i for i, block in enumerate(plan.blocks) if block.lean is not None]:
            passed = {}
            for half in _HALVES:
                kind = (half, lean.save_products, _kind(model, spec, index, half, lean))
                if kind not in found:
                    found[kind] = problem_of(index, half)
                problem = found[kind]
                passed[half] = problem is None
                if problem is not None:
                    problems.setdefault(f"lean {half}: {problem}", []).append(index)
            own = replace(lean, **passed)
            blocks[index] = replace(blocks[index], lean=own if any(passed.values()) else None)
    for problem, where in problems.items():
        notes.append(f"{problem} (blocks {', '.join(map(str, where))})")
        logger.info("%s: left out, %s", type(model).__name__, notes[-1])
    return replace(plan, blocks=tuple(blocks), notes=(*plan.notes, *notes))


def _kind(model: nn.Module, spec: ModelSpec, index: int, half: str, lean: Lean) -> Hashable:
    """Key of a half: names, types, shapes and numbers, such as a window. Halves with one key pass or fail alike."""
    parts: StageBlock = spec.stage_blocks[index]
    block = model.get_submodule(spec.blocks[index])
    names = (parts.block_spec.attention,) if half == "attention" else (parts.norm, *parts.mlp)
    children = [block.get_submodule(name) for name in names if name]
    shapes = tuple((n, tuple(p.shape)) for child in children for n, p in child.named_parameters())
    numbers = tuple((name, value) for name, value in vars(block).items() if isinstance(value, int))
    return names, tuple(map(type, children)), shapes, numbers


def _frozen(model: nn.Module, spec: ModelSpec, plan: Plan) -> list[str]:
    """A note on parameters of trained blocks that are in no module that trains, if there are any."""
    names: dict[str, None] = {}
    for index in plan.trained_blocks:
        block = model.get_submodule(spec.blocks[index])
        names |= dict.fromkeys(frozen_parameters(block, spec.stage_blocks[index].param_modules))
    return [f"trained blocks: {', '.join(names)} stay frozen, they are not in a module of their own"] if names else []


__all__ = ["verify_stages"]
