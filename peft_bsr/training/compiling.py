"""torch.compile for models with our adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from peft_bsr.backbones import tensors_of
from peft_bsr.engine import Compiler, warn_of_budget
from peft_bsr.errors import AdapterError
from peft_bsr.training.side_effect_free import side_effect_free
from peft_bsr.tuners.base.layer import AdapterController, find_controllers

_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def compile(
    model: nn.Module,
    mode: str | None = None,
    *,
    inputs: Mapping[str, object] | None = None,
    backend: str | Callable[..., object] = "inductor",
) -> nn.Module:
    """Compile a model with one of our adapters in place, without graph breaks.

    BSR, low-rank or not, and SynQT become one graph, as with `torch.compile(model)`, and later steps compile nothing.
    ALaST has a new plan in each step: instead of the model, the two halves of a block are compiled, as functions that
    all blocks and lengths share, about five graphs; everything around them and evaluation run as before. In both cases
    blocks keep the same for backward as lean blocks, see docs/memory.md.

    Args:
        model: From `get_peft_model`; pass it to Trainer and Accelerate without `torch_compile=True`.
        mode: See `torch.compile`; `"reduce-overhead"` records CUDA graphs for one length each and does not work with
            ALaST. Default None.
        inputs: A batch, as keyword arguments of the model. With it, a training step (a forward, if the model is in
            evaluation mode) runs now, without changing weights, gradients, buffers and random state. Call `compile`
            inside the autocast context of training. Default None: the first batch compiles.
        backend: See `torch.compile`. Default inductor.

    Returns:
        The model.

    Raises:
        AdapterError: If the model has no adapter of ours; or, with ALaST, if `mode` uses CUDA graphs or the halves of a
            block cannot be compiled, with the reason.

    Warns:
        MemoryBudgetWarning: If torch's memory budget is below 1 and dropout or drop path is active.

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
        _run(model, inputs)  # a first forward sets `problem_type` in transformers, which would compile twice
    if is_dynamic:
        for controller in controllers:
            controller.compile_halves(Compiler(mode, backend))
    else:
        model.compile(mode=mode, backend=backend, fullgraph=True)
    if inputs is not None:
        _run(model, inputs)
    return model


def _check_halves(controllers: list[AdapterController], mode: str | None) -> None:
    """Raise an error if blocks cannot be compiled half by half."""
    if mode in _WITH_CUDA_GRAPHS:
        raise AdapterError(
            f"`mode={mode!r}` records CUDA graphs, each for one sequence length, but ALaST's lengths change from step "
            'to step. Use `mode=None` or "max-autotune-no-cudagraphs".'
        )
    for controller in controllers:
        if (reason := controller.halves_obstacle()) is not None:
            raise AdapterError(
                f"block {controller.index} cannot be compiled half by half, as ALaST needs it: {reason}. Train without "
                "compiling; torch.compile(model) helps in evaluation only."
            )


def _run(model: nn.Module, inputs: Mapping[str, object]) -> None:
    """A training step without side effects, or a forward if the model is in evaluation mode."""
    if not model.training:
        with torch.no_grad():
            model(**inputs)
        return
    with side_effect_free(model):
        outputs = model(**inputs)
        loss = getattr(outputs, "loss", None)
        (tensors_of(outputs)[0].float().mean() if loss is None else loss).backward()


__all__ = ["compile"]
