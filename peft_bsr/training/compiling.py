"""torch.compile for models with our adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_bsr.backbones import tensors_of
from peft_bsr.engine import Compiler, warn_of_budget
from peft_bsr.errors import AdapterError
from peft_bsr.training.side_effect_free import side_effect_free
from peft_bsr.tuners.base.layer import find_controllers

_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def compile(
    model: nn.Module,
    mode: str | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    backend: Any = "inductor",
) -> nn.Module:
    """Compile a model with one of our adapters, in place, and check that nothing is left out.

    BSR, low-rank or not, and SynQT become one graph, the same as by `torch.compile(model)`, without compilations in
    later steps. ALaST's plan is another one in each step: the two halves of a block are compiled in its place, as
    functions that all blocks and lengths share, about five graphs; what lies around them and evaluation run as before.
    Either way, what lean blocks keep for backward is kept, see docs/memory.md.

    Args:
        model: From `get_peft_model`; Trainer and Accelerate take it as it is, without `torch_compile=True`.
        mode: See `torch.compile`; `"reduce-overhead"` records CUDA graphs, which are for one length each: not for
            ALaST. Default None.
        inputs: A batch as the model is called with. With it, a training step (if the model is in training mode; else a
            forward) runs now and leaves no trace: weights, gradients, buffers and random state stay. Call `compile`
            inside of the autocast that training uses. Default None: the first batch compiles.
        backend: See `torch.compile`. Default inductor.

    Returns:
        The model.

    Raises:
        AdapterError: If the model has no adapter of ours; or if it is ALaST's, and CUDA graphs are asked for, or the
            halves of a block cannot be compiled, with the reason.

    Warns:
        MemoryBudgetWarning: If torch's memory budget is below 1 and dropout or drop path is on.

    Examples:
        >>> model = get_peft_model(vit, BSRConfig())  # doctest: +SKIP
        >>> peft_bsr.compile(model, inputs={"pixel_values": images, "labels": labels})  # doctest: +SKIP
    """
    controllers = find_controllers(model)
    if not controllers:
        raise AdapterError(
            f"{type(model).__name__} has no adapter of peft_bsr. Call get_peft_model(model, BSRConfig()), or compile "
            "it with torch.compile."
        )
    is_dynamic = any(controller.is_dynamic for controller in controllers)
    if is_dynamic:
        _check_halves(controllers, mode)
    warn_of_budget(model)
    if inputs is not None:
        _run(model, inputs)  # what only a first forward does (transformers: `problem_type`) would compile twice
    if is_dynamic:
        for controller in controllers:
            controller.compile_halves(Compiler(mode, backend))
    else:
        model.compile(mode=mode, backend=backend, fullgraph=True)
    if inputs is not None:
        _run(model, inputs)
    return model


def _check_halves(controllers: list[Any], mode: str | None) -> None:
    """Refuse what cannot be compiled half by half."""
    if mode in _WITH_CUDA_GRAPHS:
        raise AdapterError(
            f"`mode={mode!r}` records CUDA graphs, each for one sequence length, but ALaST's lengths change from step "
            'to step. Use `mode=None` or "max-autotune-no-cudagraphs".'
        )
    for controller in controllers:
        if (reason := controller.halves_obstacle()) is not None:
            raise AdapterError(
                f"block {controller.index} cannot be compiled half by half, as ALaST needs it: {reason}. Train without "
                "compiling; torch.compile(model) pays for evaluation alone."
            )


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """A training step that leaves no trace, or a forward if the model is in evaluation mode."""
    if not model.training:
        with torch.no_grad():
            model(**inputs)
        return
    with side_effect_free(model):
        outputs = model(**inputs)
        loss = getattr(outputs, "loss", None)
        (tensors_of(outputs)[0].float().mean() if loss is None else loss).backward()


__all__ = ["compile"]
