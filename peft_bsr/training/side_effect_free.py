"""Steps that leave no trace: one forward and backward, and what the optimizer would make of one tensor."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import in_mode
from peft_bsr.compat.torch_api import gradient_hooks, step_hook_names
from peft_bsr.core import ForwardContext
from peft_bsr.tuners.base.layer import find_controllers

Owners = dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]]  # id of a parameter -> who steps it, in which group


@contextmanager
def side_effect_free(model: nn.Module) -> Iterator[None]:
    """Forwards and backwards inside leave the model and the random state bit for bit as they were.

    Inside, the model is in training mode and no tensor has a gradient. Without an adapter of ours any model will do.
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
    """Which group of `optimizer` holds a parameter; what accelerate wraps is unwrapped."""
    own: Any = getattr(optimizer, "optimizer", optimizer)
    return {id(p): (own, group) for group in own.param_groups for p in group["params"]}


def would_change(parameter: nn.Parameter, gradient: Tensor, owners: Owners) -> bool:
    """Whether the optimizer's step with this gradient changes the parameter: tried on a stand-in, and taken back.

    A learning rate of zero that a schedule warms up from counts as the one that it warms up to.

    Args:
        parameter: That some optimizer holds.
        gradient: Its gradient.
        owners: See `owners_of`.
    """
    optimizer, group = owners[id(parameter)]
    stand_in = nn.Parameter(parameter.detach().clone())
    stand_in.grad = gradient.detach().clone()
    group = {**group, "params": [stand_in]}
    if not group["lr"]:
        group["lr"] = group.get("initial_lr", group["lr"])
    before = dict(optimizer.__dict__)
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    if parameter in optimizer.state:
        state[stand_in] = copy.deepcopy(optimizer.state[parameter])
    hooks: dict[str, Any] = {name: OrderedDict() for name in step_hook_names(optimizer)}
    try:
        optimizer.__dict__.update(param_groups=[group], state=state, **hooks)
        type(optimizer).step(optimizer)  # not what a schedule put around it on the object
    finally:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(before)
    return not torch.equal(stand_in, parameter)


__all__ = ["Owners", "owners_of", "side_effect_free", "would_change"]
