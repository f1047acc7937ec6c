"""Check at attach that a block's MLP equals its two Linear modules and activation, from which experts are copied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_bsr.backbones import (
    ModelSpec,
    StockRun,
    probe_inputs,
    quiet,
    relative_error,
    run_stock,
    tensors_of,
    tolerance,
)
from peft_bsr.core import TaskCall
from peft_bsr.engine.controller import BlockController
from peft_bsr.engine.parts import plain_mlp
from peft_bsr.engine.plan import Plan
from peft_bsr.errors import UnsupportedModelError
from peft_bsr.selftest.reduction import controlled


class _OneExpertController(BlockController):
    """Runs the parts of the MLP instead of the MLP."""

    mixes = True

    def mix(self, block: nn.Module, call: TaskCall | None, tokens: Tensor) -> Tensor:
        parts = None if self.spec.block_spec is None else plain_mlp(block, self.spec.block_spec)
        assert parts is not None, "checked before"
        first, activation, second = parts
        output: Tensor = second(activation(first(tokens)))
        return output


def verify_mixture(model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None = None) -> None:
    """Check the first block with a mixture of experts: it runs with the parts of its MLP. The model is not changed.

    Args:
        model: The model.
        spec: Description of the model.
        plan: A plan with or without mixtures.
        stock: The probe's forward. Default None: a new one is run.

    Raises:
        UnsupportedModelError: If experts cannot be copied from the block, with the reason.
    """
    index = next((i for i, block in enumerate(plan.blocks) if block.mixture), None)
    if index is None:
        return
    name, block = type(model).__name__, model.get_submodule(spec.blocks[index])
    if spec.block_spec is None or plain_mlp(block, spec.block_spec) is None:
        raise UnsupportedModelError(
            f"{name}: experts are copies of an MLP of two Linear modules with an activation between and no dropout, "
            "which this model's blocks do not have. Use `moe=None` for several tasks on dense blocks."
        )
    with quiet(model):
        stock = stock or run_stock(model, spec.blocks, probe_inputs(model, 1, spec.image_shape))
        args, kwargs, expected = stock.calls[index]
        plan = plan.with_reductions(keep_rate=1.0)
        with controlled(model, spec, plan, index, args[0], _OneExpertController), torch.no_grad():
            found = tensors_of(block(*args, **kwargs))[0]
        error = relative_error(found, tensors_of(expected)[0])
    if not error <= tolerance(found.dtype):
        raise UnsupportedModelError(
            f"{name}: its blocks compute something other than norm, attention, norm and a plain MLP with two "
            f"residuals (they differ by {error:.1e}), so experts cannot replace the MLP. Use `moe=None`."
        )
