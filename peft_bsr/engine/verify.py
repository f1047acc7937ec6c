"""Proof, before anything is attached for good, that a plan runs exactly on this model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import Column, unscored
from peft_bsr.backbones.probe import probe_images, quiet, relative_error, tolerance
from peft_bsr.engine.plan import Plan
from peft_bsr.engine.route import RouteCarrier, record_routes
from peft_bsr.engine.runner import BlockRouter, attach_router, detach_router
from peft_bsr.errors import UnsupportedModelError


def verify_plan(model: nn.Module, column: Column, plan: Plan) -> None:
    """Check on one random image that `plan` does on `model` what it says; the model is left as it was.

    1. With every token kept, the blocks that reduce tokens equal the stock ones bit for bit.
    2. The class-token scores equal the rows of an explicit softmax.
    3. The reduced forward runs through the head, keeps the planned number of tokens and returns the same shapes.

    Raises:
        UnsupportedModelError: Naming the check that failed.
    """
    if not plan.reduces:
        return
    attention = getattr(model.get_submodule(column.blocks[0]), column.anatomy.attention)
    if not hasattr(getattr(attention, "config", None), "_attn_implementation"):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its attention is not looked up in transformers' AttentionInterface, so the "
            "class token's scores cannot be had. Use `keep_rate=1.0`, or a newer transformers."
        )
    for name in column.blocks:
        if "forward" in vars(model.get_submodule(name)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: another library replaced the `forward` of {name!r} (accelerate does, for a "
                "device map over several devices), so tokens cannot be reduced inside it. Attach the adapter first, or "
                "use `keep_rate=1.0`."
            )
    images = probe_images(column, 1, next(p for p in model.parameters() if p.is_floating_point()))
    with quiet(model):
        stock = _tensors(model(pixel_values=images))
        keep_all = Plan(
            tuple(replace(b, reduction=b.reduction and replace(b.reduction, keep_rate=1.0)) for b in plan.blocks)
        )
        with _routed(model, column, keep_all), _score_errors(model, column, plan) as errors:
            identical = _tensors(model(pixel_values=images))
        if not all(torch.equal(a, b) for a, b in zip(stock, identical, strict=True)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its blocks compute something else than norm, attention, norm and MLP with "
                "two residuals, so tokens cannot be reduced inside them. Use `keep_rate=1.0`."
            )
        for index, error in errors.items():
            if error > tolerance(images.dtype):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: the class-token scores of block {index} differ by {error:.1e} from an "
                    "explicit softmax. Use `keep_rate=1.0`, or another attention implementation."
                )
        _check_reduced(model, column, plan, images, stock)


def _check_reduced(model: nn.Module, column: Column, plan: Plan, images: Tensor, stock: list[Tensor]) -> None:
    with _routed(model, column, plan), record_routes(model) as routes:
        try:
            reduced = _tensors(model(pixel_values=images))
        except (RuntimeError, ValueError, IndexError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__}: what follows the blocks does not run on fewer tokens ({error}). It probably "
                "needs the whole patch grid; use `keep_rate=1.0`."
            ) from error
    counts = plan.token_counts(column.num_tokens, column.num_prefix)
    after = [*(attention for attention, _ in counts[1:]), None]
    found = {index: route.num_tokens for index, route in routes}
    wrong = {i: n for i, n in found.items() if after[i] is not None and n != after[i]}
    if wrong or len(found) != sum(b.reduction is not None for b in plan.blocks):
        raise UnsupportedModelError(f"{type(model).__name__}: planned token counts {counts}, found {found}")
    if [t.shape for t in reduced if t.ndim < 3] != [t.shape for t in stock if t.ndim < 3]:
        raise UnsupportedModelError(f"{type(model).__name__}: reducing tokens changes the shape of the output")


@contextmanager
def _routed(model: nn.Module, column: Column, plan: Plan) -> Iterator[None]:
    carrier = RouteCarrier()
    routers = [BlockRouter(i, column, carrier, block) for i, block in enumerate(plan.blocks)]
    for router in routers:
        attach_router(model, router)
    try:
        yield
    finally:
        for router in routers:
            detach_router(model, router)


@contextmanager
def _score_errors(model: nn.Module, column: Column, plan: Plan) -> Iterator[dict[int, float]]:
    """Block index -> largest error of its class row against eager attention, relative to the row's maximum."""
    errors: dict[int, float] = {}
    handles = []

    def compare(index: int, attention: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if index in errors:  # the reference run below passes here as well
            return
        errors[index] = 0.0
        with unscored(attention):
            expected = attention(*args, **kwargs)[1]
        errors[index] = relative_error(output[1][:, :, 0], expected[:, :, 0])

    for index, block in enumerate(plan.blocks):
        if block.reduction is not None:
            attention = getattr(model.get_submodule(column.blocks[index]), column.anatomy.attention)
            handles.append(
                attention.register_forward_hook(
                    lambda m, args, kwargs, output, index=index: compare(index, m, args, kwargs, output),
                    with_kwargs=True,
                )
            )
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [value for value in values if isinstance(value, Tensor)]
