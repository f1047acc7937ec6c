"""The state of ALaST: budgets, importances, and the plan of the current step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet, finalize

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from peft_bsr.core import block_change, outliving, reduced_delta, select_blocks, update_budgets
from peft_bsr.engine import Plan
from peft_bsr.errors import ConfigError, TrainabilityError
from peft_bsr.tuners.alast.config import ALaSTConfig, budgeted

_NUMBERS: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # torch's defaults may differ


class ALaSTSchedule:
    """Selects the blocks that train, once per optimizer step, and updates the budgets by the blocks' importances.

    The first training forward after an optimizer step makes a new selection, so accumulated batches share one, and a
    step that a gradient scaler skips does not count. Steps are noticed through torch's optimizer hook. An optimizer
    that is not torch's, or holds other tensors than the model, needs `next_step()` in the loop (`ALaSTCallback` calls
    it).

    Args:
        config: Configuration of the adapter.
        template: The plan of a step in which every block trains.
        blocks: Modules with the trained weights, one list per block.
        others: Modules with trained weights before and after the blocks, which always train.

    Attributes:
        budgets: Current budget of each block.
        deltas: Importances of the last step, or None before the first step has ended.
        selected: Indices of the blocks that train in this step, ascending.
        step: Number of selections so far.
        learning_rate: Learning rate, for `alpha="lr"`.
    """

    def __init__(
        self, config: ALaSTConfig, template: Plan, blocks: Sequence[Sequence[nn.Module]], others: Sequence[nn.Module]
    ) -> None:
        depth = len(template.blocks)
        self.config = config
        self.budgets = [float(config.initial_budget)] * depth
        self.deltas: list[float] | None = None
        self.selected = list(range(depth))
        self.step = 0
        self.learning_rate: float | None = None
        self.plan: Plan | None = None
        self._template = template
        self._blocks, self._others = [list(modules) for modules in blocks], list(others)
        self._is_due = True
        self._is_restored = False
        self._stepped: set[int] | None = None  # ids of parameters that an optimizer has stepped since the selection
        self._total: Tensor | None = None  # [L + 1]: changes summed over this step's forwards, and their images
        self._changes: list[Tensor] = []  # of the current forward
        _watch_optimizers(self)

    def begin(self) -> None:
        """Start a training forward: select blocks if the optimizer has stepped since the last selection.

        Raises:
            TrainabilityError: If the optimizer that stepped does not hold the selected blocks.
            ConfigError: If `alpha="lr"` and no learning rate was set.
        """
        self._changes = []
        if not any(p.requires_grad for modules in self._all() for module in modules for p in module.parameters()):
            self.plan = None  # loaded for inference
            return
        if self._is_due:
            self._check_trained()
            self._advance()
        elif self._is_restored or self.plan is None or self._is_undone():  # in the middle of a step
            self._apply()
        self._is_restored = False

    def next_step(self) -> None:
        """Report an optimizer step; the next training forward selects blocks. Calling it twice has no effect.

        With `torch.distributed`, every process must call it: the totals are summed over all processes here, so that
        budgets and selections are the same. Forwards never communicate, so processes may run different numbers of them.
        """
        if not self._is_due:
            self._is_due = True
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                total = torch.zeros(len(self.budgets) + 1) if self._total is None else self._total
                device = next(p.device for modules in self._all() for module in modules for p in module.parameters())
                self._total = total.to(device, copy=True)
                dist.all_reduce(self._total)

    def observe(self, before: Tensor, after: Tensor, num_prefix: int) -> None:
        """Record a block's tokens before and after it, [B, N, D] and [B, N', D]; called block after block."""
        if self.plan is None:
            return
        entering, leaving = (t[:, 0] if num_prefix else t.detach().mean(dim=1) for t in (before, after))
        self._changes.append(block_change(entering, leaving, self._reduction))
        if len(self._changes) == len(self.budgets):
            images = self._changes[0].new_tensor(float(before.shape[0]))
            total = torch.stack([*self._changes, images])
            self._total = outliving(total if self._total is None else self._total.to(total.device) + total)
            self._changes = []

    def pack(self) -> Tensor:
        """The state as one tensor: int64 bit patterns of float64 numbers [5, max(L, 3)], safe from casts.

        After the optimizer's step it is the same in every process; before it, the totals belong to this process.
        """
        depth = len(self.budgets)
        rows = torch.zeros(5, max(depth, 3), **_NUMBERS)
        rows[0, :depth] = torch.tensor(self.budgets, **_NUMBERS)
        rows[1, :depth] = torch.tensor(self.deltas or [float("nan")] * depth, **_NUMBERS)
        images = 0.0
        if self._total is not None:
            *changes, images = self._total.tolist()
            rows[2, :depth] = torch.tensor(changes, **_NUMBERS)
        rows[3, self.selected] = 1
        rows[4, :3] = torch.tensor([self.step, images, self._is_due], **_NUMBERS)
        return rows.view(torch.int64)

    def unpack(self, packed: Tensor) -> None:
        """Restore a state of `pack`."""
        depth, rows = len(self.budgets), packed.cpu().view(torch.float64)
        self.budgets = rows[0, :depth].tolist()
        deltas = rows[1, :depth].tolist()
        self.deltas = None if deltas[0] != deltas[0] else deltas
        self.selected = rows[3, :depth].nonzero().flatten().tolist()
        step, images, is_due = rows[4, :3].tolist()
        self.step, self._is_due = int(step), bool(is_due)
        self._total = torch.tensor([*rows[2, :depth].tolist(), images], device="cpu") if images else None
        self._is_restored = True

    @contextmanager
    def side_effect_free(self) -> Iterator[None]:
        """Context manager: forwards select blocks as the next step will, and the state is restored afterwards."""
        before = dict(self.__dict__)  # every step replaces the lists, none changes them
        self._stepped = None
        self.learning_rate = self.learning_rate or 0.0  # a callback may set it later
        try:
            yield
        finally:
            self.__dict__ = before

    def see_step(self, parameters: set[int]) -> None:
        """Handle an optimizer step.

        Args:
            parameters: Ids of the optimizer's parameters.
        """
        if parameters & {id(p) for modules in self._all() for module in modules for p in module.parameters()}:
            self.next_step()
            self._stepped = (self._stepped or set()) | parameters

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _stepped=None)
        _watch_optimizers(self)

    @property
    def _reduction(self) -> str:
        return str(self.config.delta_reduction)

    def _advance(self) -> None:
        """Update the budgets from the last step's forwards, and select the blocks of the next step."""
        if self._total is not None:
            *changes, images = self._total.tolist()  # the only synchronization in a step
            deltas = [reduced_delta(change, images, self._reduction) for change in changes]
            if self.deltas is not None:
                low, high = self.config.budget_range
                self.budgets = update_budgets(self.budgets, deltas, self.deltas, self._alpha(), low, high)
            self.deltas, self._total = deltas, None
        self.step += 1
        self._is_due = False
        depth = len(self.budgets)
        count = self.config.trainable_blocks_per_step or max(1, round(0.75 * depth))
        generator = random.Random(f"{self.config.seed} {self.step}")
        self.selected = select_blocks(self.budgets, count, str(self.config.selection), generator)
        self._apply()

    def _apply(self) -> None:
        """Apply the selection to plan and weights. Frozen blocks lose their gradients, so no optimizer changes them."""
        first, share = self.selected[0], 1.0
        blocks = []
        for index, (block, budget) in enumerate(zip(self._template.blocks, self.budgets, strict=True)):
            assert block.reduction is not None, "every block of the template reduces"
            cut = not self.config.train_embeddings and index <= first
            share *= budget
            block = replace(
                block,
                trained=index in self.selected,
                cut_gradient=cut,
                reduction=budgeted(block.reduction, budget, share),
            )
            blocks.append(block if block.in_graph else replace(block, lean=None, int8=False))
        plan = replace(self._template, blocks=tuple(blocks))
        self.plan = plan.with_gradient_tokens(self._template.blocks[-1].gradient_tokens)
        for index, modules in enumerate(self._blocks):
            for parameter in (p for module in modules for p in module.parameters()):
                parameter.requires_grad_(index in self.selected)
                if index not in self.selected:
                    parameter.grad = None

    def _is_undone(self) -> bool:
        """Whether a block that is not selected would train: PEFT unfreezes all of an adapter that it makes active."""
        others = [modules for index, modules in enumerate(self._blocks) if index not in self.selected]
        return any(p.requires_grad for modules in others for module in modules for p in module.parameters())

    def _alpha(self) -> float:
        alpha = self.config.alpha
        if alpha is not None and alpha != "lr":
            return float(alpha)
        if self.learning_rate is None:
            raise ConfigError(
                "`alpha='lr'` updates budgets by the learning rate, which is not set. Give Trainer "
                "`callbacks=[ALaSTCallback()]`, or set `model.base_model.schedule().learning_rate` before each step, "
                "or use a number."
            )
        return self.learning_rate

    def _all(self) -> list[list[nn.Module]]:
        return [*self._blocks, self._others]

    def _check_trained(self) -> None:
        """Check that every selected block was in an optimizer that stepped."""
        stepped, self._stepped = self._stepped, None
        if stepped is None:
            return
        held = [any(id(p) in stepped for module in modules for p in module.parameters()) for modules in self._blocks]
        if missed := [index for index in self.selected if not held[index]]:
            raise TrainabilityError(
                f"blocks {missed} were to train in step {self.step}, but the optimizer that stepped does not hold "
                "their weights. It was probably created in the middle of training, from the parameters with "
                "`requires_grad=True`; create it before the first training forward, from all parameters of the adapter."
            )


def check_state(packed: Tensor, depth: int, config: ALaSTConfig) -> list[str]:
    """Problems of a state from a file.

    Args:
        packed: The state, see `ALaSTSchedule.pack`.
        depth: Number of the model's blocks.
        config: Configuration of the adapter.
    """
    if packed.dtype != torch.int64 or tuple(packed.shape) != (5, max(depth, 3)):
        return []  # reported with the shapes of all tensors
    rows = packed.cpu().contiguous().view(torch.float64)
    budgets, deltas, totals, selected = rows[:4, :depth]
    step, images, is_due = rows[4, :3].tolist()
    low, high = config.budget_range
    is_right = (
        bool(((low <= budgets) & (budgets <= high)).all())
        and bool(deltas.isnan().all() | deltas.isfinite().all())
        and bool(totals.isfinite().all())
        and bool(((selected == 0) | (selected == 1)).all() & selected.any())
        and is_due in (0.0, 1.0)
        and all(0 <= value < 2**53 and value == int(value) for value in (step, images))
    )
    return [] if is_right else ["the state of the budgets is out of its range"]


_SCHEDULES: WeakSet[ALaSTSchedule] = WeakSet()
_HOOKS: list[RemovableHandle] = []  # torch's handle of `_see_step`, while there are schedules


def _watch_optimizers(schedule: ALaSTSchedule) -> None:
    """Notify `schedule` of optimizer steps. torch's hook is global; it is removed with the last schedule."""
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_see_step))
    _SCHEDULES.add(schedule)
    finalize(schedule, _unwatch_optimizers).atexit = False


def _unwatch_optimizers() -> None:
    while _HOOKS and not list(_SCHEDULES):
        _HOOKS.pop().remove()


def _see_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    schedules = list(_SCHEDULES)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for schedule in schedules:
        schedule.see_step(held)


__all__ = ["ALaSTSchedule", "check_state"]
