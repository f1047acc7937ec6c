"""Checks that an adapter trains, completely and without side effects on the base model, with one trial step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import takewhile

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_bsr.backbones import probe_inputs
from peft_bsr.compat.torch_api import tree_leaves, tree_map_only
from peft_bsr.engine import saved_by_module
from peft_bsr.errors import RoundedUpdatesWarning, TrainabilityError
from peft_bsr.training.side_effect_free import Owners, owners_of, rounded_away, side_effect_free, stepped
from peft_bsr.training.trainable_groups import TrainableGroup, find_trainable_groups, of_adapters
from peft_bsr.training.types import Batch
from peft_bsr.tuners.base.layer import find_controllers

_NAMED = 4  # maximum number of names in a message
_LOW = (torch.bfloat16, torch.float16)
_MOST_ROUNDED = 0.5  # share of a module's changes


def verify_trainability(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, batch: Mapping[str, object] | None = None
) -> dict[str, float]:
    """Check with one trial step that the adapter trains, all of it and nothing else.

    Runs one forward and backward in training mode; then, tensor by tensor, the optimizer's step on a copy. Weights,
    gradients, buffers, the random state and the optimizer's state are not changed, and only one tensor at a time is
    copied. Costs about one step on the batch.

    The parameters that should train are read from the adapter's layers, not from `requires_grad`. Blocks that the ALaST
    schedule did not select in this step are expected to have no gradient. A gradient of zeros, and a step that changes
    nothing, are reported for whole modules (a LoRA pair, a Linear with its bias): single tensors may start like that.

    Args:
        model: A model with an active adapter of peft_bsr; it may be prepared by accelerate (DistributedDataParallel,
            autocast).
        optimizer: A torch optimizer whose step needs no closure; it may be prepared by accelerate. Default None: only
            the gradients are checked.
        batch: Keyword arguments of the model. Without labels, the loss is a random weighting of the model's outputs.
            Default None: two random images, or one for each task.

    Returns:
        Trained module in bfloat16 or float16 -> share of the optimizer's changes that its dtype rounds away, from 0 to
        1. Empty without an optimizer, and for an optimizer with stochastic rounding.

    Raises:
        TrainabilityError: If a parameter that should train does not require gradients, is not in the optimizer, gets no
            gradient or is not changed by the step; if a frozen parameter requires gradients or would be changed or
            decayed; if a frozen block before the first trained one keeps activations for backward. It names all of
            them.
        AdapterError: If there is no adapter of peft_bsr, or it is disabled.

    Warns:
        RoundedUpdatesWarning: If more than half of the changes of a module are rounded away.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from peft_bsr import BSRConfig
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), BSRConfig())
        >>> verify_trainability(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
        {}
    """
    model = extract_model_from_parallel(model)
    groups, owners = find_trainable_groups(model), {} if optimizer is None else owners_of(optimizer)
    # eager: another batch size would compile again
    with side_effect_free(model), torch.compiler.set_stance("force_eager"):
        batch = _own_batch(model) if batch is None else _moved(model, batch)
        problems, saved, rounded = [], {}, {}
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
            rounded = _rounded(trained, owners)
        problems += _check_frozen(model, owners)
        if plan is not None:
            problems += _check_leading(model, saved)
    if problems:
        raise TrainabilityError.from_problems(type(model).__name__, problems)
    _warn_of_rounding(rounded)
    return rounded


class TrainabilityCallback(TrainerCallback):
    """Runs `verify_trainability` on random images before the first step of each `Trainer.train()`, also a resumed one.

    Examples:
        >>> callback = TrainabilityCallback()  # Trainer(..., callbacks=[callback]).train() stops if something is wrong
    """

    def __init__(self) -> None:
        self._is_due = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Run the check again in a new run."""
        self._is_due = True

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: object,
    ) -> None:
        """Run the check, once per run.

        Raises:
            TrainabilityError: See `verify_trainability`.
        """
        if self._is_due:
            verify_trainability(model, optimizer)
            self._is_due = False


class _NoGraphError(Exception):
    """The loss has no graph; caught in `verify_trainability`."""


_REMAKE = "Create the optimizer after `get_peft_model`, from `[p for p in model.parameters() if p.requires_grad]`"
_UNFREEZE = "They were frozen by other code, or loaded for inference: use `is_trainable=True`, or `set_adapter` again"


def _own_batch(model: nn.Module) -> Batch:
    controller = find_controllers(model)[0]
    if controller.spec.part is not None:
        raise TrainabilityError(
            f"the adapter is on `{controller.spec.part}`, and the model around it does not run on images alone. Give a "
            "batch: `verify_trainability(model, optimizer, next(iter(loader)))`."
        )
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    settings = getattr(controller, "task_settings", None)
    num_tasks = 1 if settings is None else len(settings.tasks)
    size = max(2, num_tasks)
    batch: Batch = dict(probe_inputs(base, size, controller.spec.image_shape))
    return batch if settings is None else {**batch, "task_ids": [i % num_tasks for i in range(size)]}


def _moved(model: nn.Module, batch: Mapping[str, object]) -> Batch:
    tensors = [leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]
    if not tensors or any(len(t) == 0 for t in tensors if t.ndim):
        raise TrainabilityError(
            f"`batch` holds no images: {sorted(batch)} with {[tuple(t.shape) for t in tensors]}. Give a mapping of the "
            "model's keywords, such as `next(iter(loader))`, or leave it None."
        )
    device = next(p.device for group in find_trainable_groups(model) for p in group.parameters.values())
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(batch))


def _step(model: nn.Module, batch: Mapping[str, object]) -> Tensor:
    """Forward and backward."""
    with torch.enable_grad():
        output: object = model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            generator = torch.Generator().manual_seed(0)
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
            weighted = [(t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in tensors]
            loss = torch.stack(weighted).sum()
    if not loss.requires_grad:
        raise _NoGraphError("the loss does not depend on a parameter that requires gradients.")
    if not bool(loss.isfinite()):
        raise TrainabilityError(
            f"{type(model).__name__}: the loss is {float(loss.detach())}. Check the batch and the weights."
        )
    loss.backward()
    return loss


def _rests(model: nn.Module, block: int) -> bool:
    """Whether the block is not selected in this step."""
    controller = find_controllers(model)[0]
    return controller.is_dynamic and controller.plan is not None and block not in controller.plan.trained_blocks


def _check_trained(groups: list[TrainableGroup], owners: Owners | None, has_stepped: bool) -> list[str]:
    """Problems of parameters that require no gradient, get none, or would not change."""
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
    problems += _problem(broken, "get a gradient that is NaN or infinite", "Check the batch and the weights")
    usable = asking.keys() - left_out - broken
    given = [{n: p for n, p in u.parameters.items() if n in usable} for u in groups if usable & u.parameters.keys()]
    zero = [group for group in given if not any(bool(_gradient(p).any()) for p in group.values())]
    if not _hides_gradients(groups):
        names = {name for group in zero for name in group}
        problems += _problem(names, "get a gradient of zeros only", "The loss does not depend on them")
    still: set[str] = set()
    for group in given:
        held = {name: p for name, p in group.items() if id(p) in (owners or ())}
        if held and group not in zero and not any(_would_change(p, owners or {}) for p in held.values()):
            still |= held.keys()
    return problems + _problem(still, "are not changed by the optimizer's step", "Its learning rate is 0 or too small")


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "checked before"
    return parameter.grad


def _would_change(parameter: nn.Parameter, owners: Owners) -> bool:
    """Whether the optimizer's step changes the parameter."""
    return not torch.equal(stepped(parameter, _gradient(parameter), owners), parameter)


def _rounded(groups: list[TrainableGroup], owners: Owners) -> dict[str, float]:
    """Module -> share of the changes of its low-precision parameters that are rounded away."""
    found = {}
    for group in groups:
        counts = [
            rounded_away(p, p.grad, owners)
            for p in group.parameters.values()
            if p.dtype in _LOW and p.grad is not None and id(p) in owners and not _rounds_at_random(owners[id(p)][0])
        ]
        if changed := sum(count for _, count in counts):
            found[_module_of(list(group.parameters))] = sum(lost for lost, _ in counts) / changed
    return found


def _module_of(names: list[str]) -> str:
    """The innermost module that holds all of these parameters."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts))


def _rounds_at_random(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has torchao's stochastic rounding, which loses no update on average."""
    return bool(getattr(optimizer, "bf16_stochastic_round", False))


def _warn_of_rounding(shares: Mapping[str, float]) -> None:
    """Warn of modules that mostly stand still."""
    found = sorted((-share, name) for name, share in shares.items() if share > _MOST_ROUNDED)
    if found:
        named = ", ".join(f"{name!r} ({-share:.0%})" for share, name in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        warnings.warn(
            f"more than half of the optimizer's changes are rounded away in {named}{more}, because their weights are "
            "in bfloat16 or float16. Keep trained weights in float32 (PEFT's default) with autocast, "
            "raise the learning rate, or use an optimizer with stochastic rounding.",
            RoundedUpdatesWarning,
            stacklevel=3,
        )


def _hides_gradients(groups: list[TrainableGroup]) -> bool:
    """Whether a classifier that starts at zero (as in timm) blocks all gradients before it in the first step."""
    behind = [p for group in groups if group.block is None for p in group.parameters.values()]
    return any(p.ndim == 2 and not bool(p.any()) for p in behind)


def _check_frozen(model: nn.Module, owners: Owners) -> list[str]:
    """Problems of parameters that do not belong to an adapter and must not change."""
    adapters = of_adapters(model)
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in adapters}
    asking = [name for name, p in frozen.items() if p.requires_grad]
    problems = _problem(asking, "are frozen in the plan, but require gradients", "Freeze them: `requires_grad_(False)`")
    held = {name: p for name, p in frozen.items() if id(p) in owners}
    changing = {n for n, p in held.items() if p.grad is not None and _would_change(p, owners)}
    problems += _problem(changing, "are frozen in the plan, but the optimizer's step would change them", _REMAKE)
    decaying = [n for n, p in held.items() if n not in changing and owners[id(p)][1].get("weight_decay")]
    return problems + _problem(decaying, "are frozen, but the optimizer holds them with weight decay", _REMAKE)


def _check_leading(model: nn.Module, saved: Mapping[str, int]) -> list[str]:
    """Problems of blocks that are outside of the graph in the plan, but keep activations."""
    controller = find_controllers(model)[0]
    if not controller.builds_graph:  # blocks run under no_grad, and what queries read of them is saved on their modules
        return []
    blocks = map(controller.spec.full_name, controller.spec.blocks)
    sizes = {b: sum(size for n, size in saved.items() if f".{b}." in f".{n}.") for b in blocks}
    return _problem(
        [
            f"{b} ({sizes[b]} bytes)"
            for b, p in zip(sizes, controller.plan.blocks, strict=True)
            if sizes[b] and not p.in_graph
        ],
        "are outside of the graph in the plan, but keep activations for backward",
        "A hook or a wrapper put them into the graph; remove it",
    )


def _problem(names: Iterable[str], what: str, instead: str) -> list[str]:
    """One sentence on the tensors that share a problem; none if there are none."""
    found = sorted(names)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return [f"{', '.join(map(repr, found[:_NAMED]))}{more} {what}. {instead}."] if found else []


__all__ = ["TrainabilityCallback", "verify_trainability"]
