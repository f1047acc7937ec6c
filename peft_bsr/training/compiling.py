"""torch.compile for models with our adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_bsr.backbones import tensors_of
from peft_bsr.engine import warn_of_budget
from peft_bsr.errors import AdapterError
from peft_bsr.training.rehearsal import rehearsal
from peft_bsr.tuners.base.layer import find_routers


def compile(
    model: nn.Module,
    mode: str | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    backend: Any = "inductor",
) -> nn.Module:
    """Compile a model with one of our adapters, in place, and check that it is one graph.

    `torch.compile(model)` gives the same code; this refuses what would not get faster, and can compile at once.
    BSR, low-rank or not, and SynQT are one graph, without compilations in later steps. Whole or not, what lean blocks
    keep for backward is kept, see docs/memory.md.

    Args:
        model: From `get_peft_model`; Trainer and Accelerate take it as it is, without `torch_compile=True`.
        mode: See `torch.compile`; `"reduce-overhead"` records CUDA graphs. Default None.
        inputs: A batch as the model is called with. With it, a training step (if the model is in training mode; else a
            forward) runs now and leaves no trace: weights, gradients, buffers and random state stay. Call `compile`
            inside of the autocast that training uses. Default None: the first batch compiles.
        backend: See `torch.compile`. Default inductor.

    Returns:
        The model.

    Raises:
        AdapterError: If the model has no adapter of ours, or the active one is ALaST's, whose plan is another one in
            each step: a compiler would start again and again.

    Warns:
        MemoryBudgetWarning: If torch's memory budget is below 1 and dropout or drop path is on.

    Examples:
        >>> model = get_peft_model(vit, BSRConfig())  # doctest: +SKIP
        >>> peft_bsr.compile(model, inputs={"pixel_values": images, "labels": labels})  # doctest: +SKIP
    """
    routers = find_routers(model)
    if not routers:
        raise AdapterError(
            f"{type(model).__name__} has no adapter of peft_bsr. Call get_peft_model(model, BSRConfig()), or compile "
            "it with torch.compile."
        )
    if any(router.is_dynamic for router in routers):
        raise AdapterError(
            "ALaST trains with another plan in each step, for which a compiler would start again each time. Train "
            "without compiling; torch.compile(model) pays for evaluation alone."
        )
    warn_of_budget(model)
    if inputs is not None:
        _run(
            model, inputs
        )  # what only a first forward does (transformers' loss sets `problem_type`) would compile twice
    model.compile(mode=mode, backend=backend, fullgraph=True)
    if inputs is not None:
        _run(model, inputs)
    return model


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """A training step that leaves no trace, or a forward if the model is in evaluation mode."""
    if not model.training:
        with torch.no_grad():
            model(**inputs)
        return
    with rehearsal(model):
        outputs = model(**inputs)
        loss = getattr(outputs, "loss", None)
        (tensors_of(outputs)[0].float().mean() if loss is None else loss).backward()


__all__ = ["compile"]
