"""Proof that what is meant to train does, and nothing else: one step that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_bsr.backbones import probe_inputs
from peft_bsr.compat.torch_api import tree_leaves, tree_map_only
from peft_bsr.engine import saved_by_module
from peft_bsr.errors import TrainabilityError
from peft_bsr.training.side_effect_free import Owners, owners_of, side_effect_free, would_change
from peft_bsr.training.trainable_groups import TrainableGroup, find_trainable_groups, of_adapters
from peft_bsr.tuners.base.layer import find_controllers

_NAMED = 4  # of the tensors that share a problem


def verify_trainability(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, batch: Mapping[str, Any] | None = None
) -> None:
    """Run one step and take it back: does the adapter train, all of it, and nothing else?

    One forward and backward in training mode; then, tensor by tensor, the optimizer's own step on a stand-in. Weights,
    gradients, buffers, the random state and the optimizer's state are bit for bit the same afterwards, and nothing is
    copied but one tensor at a time. Costs about one step on the batch.

    What is meant to train is read from the adapter's layers, not from `requires_grad`. Blocks that an ALaST schedule
    does not draw rest with right. A gradient of zeros, and a step that changes nothing, count for a whole module (a
    LoRA pair, a Linear with its bias): single tensors may begin so.

    Args:
        model: With an active adapter of peft_bsr; also as accelerate prepared it (DistributedDataParallel, autocast).
        optimizer: A torch optimizer whose step needs no closure, also as accelerate prepared it. Default None: only
            the gradients are looked at.
        batch: Keywords of the model. Without labels, the loss is a random weighting of all that the model returns.
            Default None: two random images, or one for each task.

    Raises:
        TrainabilityError: Naming every tensor that is meant to train but asks for no gradient, is not in the
            optimizer, gets no gradient or is not changed by the step; every frozen one that asks for gradients, would
            be changed, or would decay; every frozen leading block that keeps activations for backward.
        AdapterError: If there is no adapter of peft_bsr, or it is disabled.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from peft_bsr import BSRConfig
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), BSRConfig())
        >>> verify_trainability(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    """
    model = extract_model_from_parallel(model)
    groups, owners = find_trainable_groups(model), {} if optimizer is None else owners_of(optimizer)
    # eager: another batch size would compile anew
    with side_effect_free(model), torch.compiler.set_stance("force_eager"):
        batch = _own_batch(model) if batch is None else _moved(model, batch)
        problems, saved = [], {}
        try:
            saved = saved_by_module(model, lambda: _step(model, batch))
        except _NoGraphError as error:
            problems.append(str(error))
        plan = find_controllers(model)[0].plan
        trained = [u for u in groups if u.block is None or not _rests(model, u.block)]
        problems += _check_trained(trained, owners if optimizer is not None else None, not problems)
        if optimizer is not None:
            names = {n: p for group in groups for n, p in group.parameters.items() if id(p) not in owners}
            problems += _problem(names, "are meant to train, but the optimizer does not hold them", _REMAKE)
        problems += _check_frozen(model, owners)
        if plan is not None:
            problems += _check_leading(model, saved)
    if problems:
        raise TrainabilityError.from_problems(type(model).__name__, problems)


class TrainabilityCallback(TrainerCallback):
    """Runs `verify_trainability` before the first step of each `Trainer.train()`, resumed ones too, on random images.

    Examples:
        >>> callback = TrainabilityCallback()  # Trainer(..., callbacks=[callback]).train() stops if something is wrong
    """

    def __init__(self) -> None:
        self._is_due = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run begins."""
        self._is_due = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify, once in a run.

        Raises:
            TrainabilityError: See `verify_trainability`.
        """
        if self._is_due:
            verify_trainability(kwargs["model"], kwargs["optimizer"])
            self._is_due = False


class _NoGraphError(Exception):
    """The loss cannot be propagated back; never leaves `verify_trainability`."""


_REMAKE = "Make the optimizer behind `get_peft_model`, from `[p for p in model.parameters() if p.requires_grad]`"
_UNFREEZE = "They were frozen behind our back, or loaded for use: load with `is_trainable=True`, or `set_adapter` again"


def _own_batch(model: nn.Module) -> dict[str, Any]:
    controller = find_controllers(model)[0]
    base: Any = getattr(model, "get_base_model", lambda: model)()
    settings = getattr(controller, "task_settings", None)
    num_tasks = 1 if settings is None else len(settings.tasks)
    size = max(2, num_tasks)
    batch: dict[str, Any] = dict(probe_inputs(base, size, controller.spec.image_shape))
    return batch if settings is None else {**batch, "task_ids": [i % num_tasks for i in range(size)]}


def _moved(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]
    if not tensors or any(len(t) == 0 for t in tensors if t.ndim):
        raise TrainabilityError(
            f"`batch` holds no images: {sorted(batch)} with {[tuple(t.shape) for t in tensors]}. Give a mapping of the "
            "model's keywords, such as `next(iter(loader))`, or leave it None."
        )
    device = next(p.device for group in find_trainable_groups(model) for p in group.parameters.values())
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(batch))


def _step(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Forward and backward."""
    with torch.enable_grad():
        output: Any = model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            generator = torch.Generator().manual_seed(0)
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
            weighted = [(t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in tensors]
            loss = torch.stack(weighted).sum()
    if not loss.requires_grad:
        raise _NoGraphError("the loss hangs on nothing that asks for a gradient.")
    if not bool(loss.isfinite()):
        raise TrainabilityError(
            f"{type(model).__name__}: the loss is {float(loss.detach())}. Look at the batch and the weights."
        )
    loss.backward()
    return loss


def _rests(model: nn.Module, block: int) -> bool:
    """Whether the running step's draw leaves the block out."""
    controller = find_controllers(model)[0]
    return controller.is_dynamic and controller.plan is not None and block not in controller.plan.trained_blocks


def _check_trained(groups: list[TrainableGroup], owners: Owners | None, has_stepped: bool) -> list[str]:
    """What asks for no gradient, gets none, or would not change."""
    tensors = {name: p for group in groups for name, p in group.parameters.items()}
    asking = {name: p for name, p in tensors.items() if p.requires_grad}
    problems = _problem(tensors.keys() - asking.keys(), "are meant to train, but have `requires_grad=False`", _UNFREEZE)
    if not has_stepped:
        return problems
    read = {
        n for u in groups if u.is_named and any(p.grad is not None for p in u.parameters.values()) for n in u.parameters
    }
    left_out = {name for name, p in asking.items() if p.grad is None}
    problems += _problem(
        left_out - read, "are meant to train, but get no gradient", "The loss does not read them, or the graph is cut"
    )
    broken = {n for n, p in asking.items() if p.grad is not None and not bool(p.grad.isfinite().all())}
    problems += _problem(broken, "get a gradient that is NaN or infinite", "Look at the batch and the weights")
    usable = asking.keys() - left_out - broken
    given = [{n: p for n, p in u.parameters.items() if n in usable} for u in groups if usable & u.parameters.keys()]
    zero = [group for group in given if not any(bool(_gradient(p).any()) for p in group.values())]
    if not _hides_gradients(groups):
        names = {name for group in zero for name in group}
        problems += _problem(names, "get a gradient of zeros alone", "The loss does not depend on them")
    still: set[str] = set()
    for group in given:
        held = {name: p for name, p in group.items() if id(p) in (owners or ())}
        if held and group not in zero and not any(would_change(p, _gradient(p), owners or {}) for p in held.values()):
            still |= held.keys()
    return problems + _problem(still, "are not changed by the optimizer's step", "Its learning rate is 0 or too small")


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "asked for before"
    return parameter.grad


def _hides_gradients(groups: list[TrainableGroup]) -> bool:
    """Whether a classifier that begins at zero (timm's do) hides everything before it in the first step."""
    behind = [p for group in groups if group.block is None for p in group.parameters.values()]
    return any(p.ndim == 2 and not bool(p.any()) for p in behind)


def _check_frozen(model: nn.Module, owners: Owners) -> list[str]:
    """What is not of an adapter must stay as it is."""
    adapters = of_adapters(model)
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in adapters}
    asking = [name for name, p in frozen.items() if p.requires_grad]
    problems = _problem(asking, "are frozen in the plan, but ask for gradients", "Freeze them: `requires_grad_(False)`")
    held = {name: p for name, p in frozen.items() if id(p) in owners}
    changing = {n for n, p in held.items() if p.grad is not None and would_change(p, p.grad, owners)}
    problems += _problem(changing, "are frozen in the plan, but the optimizer's step would change them", _REMAKE)
    decaying = [n for n, p in held.items() if n not in changing and owners[id(p)][1].get("weight_decay")]
    return problems + _problem(decaying, "are frozen, but the optimizer holds them with weight decay", _REMAKE)


def _check_leading(model: nn.Module, saved: Mapping[str, int]) -> list[str]:
    """Blocks that lie outside of the graph in the plan keep nothing for backward."""
    controller = find_controllers(model)[0]
    if not controller.builds_graph:  # blocks run under no_grad, and what queries read of them is saved on their modules
        return []
    sizes = {b: sum(size for n, size in saved.items() if f".{b}." in f".{n}.") for b in controller.spec.blocks}
    return _problem(
        [
            f"{b} ({sizes[b]} bytes)"
            for b, p in zip(sizes, controller.plan.blocks, strict=True)
            if sizes[b] and not p.in_graph
        ],
        "lie outside of the graph in the plan, but keep activations for backward",
        "A hook or a wrapper put them into the graph; take it off",
    )


def _problem(names: Iterable[str], what: str, instead: str) -> list[str]:
    """One sentence on the tensors that share a problem; none if there are none."""
    found = sorted(names)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return [f"{', '.join(map(repr, found[:_NAMED]))}{more} {what}. {instead}."] if found else []


__all__ = ["TrainabilityCallback", "verify_trainability"]
