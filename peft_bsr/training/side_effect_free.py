"""Steps without side effects: one forward and backward, and the optimizer's step on a single tensor."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from peft_bsr.backbones import in_mode
from peft_bsr.compat.torch_api import gradient_hooks, step_hook_names, tree_map_only
from peft_bsr.core import ForwardContext
from peft_bsr.training.groups import ParamGroup
from peft_bsr.tuners.base.layer import find_controllers

Owners = dict[int, tuple[torch.optim.Optimizer, ParamGroup]]  # id of a parameter -> optimizer, group


@contextmanager
def side_effect_free(model: nn.Module) -> Iterator[None]:
    """Context manager: forwards and backwards leave the model and the random state unchanged, bit for bit.

    Inside, the model is in training mode and no tensor has a gradient. It works with any model.
    """
    parameters = [(p, p.requires_grad, p.grad, dict(gradient_hooks(p))) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    controllers = find_controllers(model)
    now = (controllers[0].context if controllers else ForwardContext()).now
    recorders, usage = now.recorders, now.usage
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(in_mode(True, model))
        for controller in controllers:
            stack.enter_context(controller.side_effect_free())
        try:
            now.recorders, now.usage = [], None
            for parameter, *_, hooks in parameters:
                parameter.grad = None
                if hooks:  # optimizers that step within the backward
                    gradient_hooks(parameter).clear()
            yield
        finally:
            now.recorders, now.usage = recorders, usage
            for parameter, requires_grad, gradient, hooks in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
                if hooks:
                    gradient_hooks(parameter).update(hooks)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def owners_of(optimizer: torch.optim.Optimizer) -> Owners:
    """Optimizer and parameter group of each parameter; accelerate's wrapper is removed."""
    own: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return {id(p): (own, group) for group in own.param_groups for p in group["params"]}


def stepped(parameter: nn.Parameter, gradient: Tensor, owners: Owners, dtype: torch.dtype | None = None) -> Tensor:
    """The parameter after the optimizer's step with this gradient, computed on a copy without side effects.

    If a warm-up schedule has set the learning rate to 0, its peak is used.

    Args:
        parameter: A parameter of some optimizer.
        gradient: Its gradient.
        owners: See `owners_of`.
        dtype: Dtype of the copy, its gradient and its state. Default None: those that they have.
    """
    optimizer, group = owners[id(parameter)]
    stand_in = nn.Parameter(parameter.detach().to(dtype or parameter.dtype, copy=True))
    stand_in.grad = gradient.detach().to(dtype or gradient.dtype, copy=True)
    group = {**group, "params": [stand_in]}
    if not group["lr"]:
        group["lr"] = group.get("initial_lr", group["lr"])
    before = dict(optimizer.__dict__)
    state: defaultdict[Tensor, dict[str, object]] = defaultdict(dict)
    if parameter in optimizer.state:
        kept = copy.deepcopy(optimizer.state[parameter])
        state[stand_in] = kept if dtype is None else tree_map_only(Tensor, partial(_cast, dtype=dtype), kept)
    hooks: dict[str, object] = {name: OrderedDict() for name in step_hook_names(optimizer)}
    try:
        optimizer.__dict__.update(param_groups=[group], state=state, **hooks)
        type(optimizer).step(optimizer)  # without the wrapper of a schedule on the instance
    finally:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(before)
    return stand_in.detach()


def rounded_away(parameter: nn.Parameter, gradient: Tensor, owners: Owners) -> tuple[int, int]:
    """Numbers of a low-precision parameter that the optimizer's step should change but does not, because of rounding.

    The step is computed in the parameter's dtype and in float32. Numbers whose gradient is 0 are not counted.

    Args:
        parameter: A parameter of some optimizer, in bfloat16 or float16.
        gradient: Its gradient.
        owners: See `owners_of`.

    Returns:
        The number of changes that are rounded away, and the number of changes in float32.
    """
    changed = (stepped(parameter, gradient, owners, torch.float32) != parameter) & (gradient != 0)
    lost = changed & (stepped(parameter, gradient, owners) == parameter)
    return int(lost.sum()), int(changed.sum())


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; integers and tensor subclasses (8-bit states) are returned as they are."""
    return tensor.to(dtype) if type(tensor) is Tensor and tensor.is_floating_point() else tensor


__all__ = ["Owners", "owners_of", "rounded_away", "side_effect_free", "stepped"]
