"""Describe the blocks of a model in which no token can be dropped."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from peft_bsr.backbones.inputs import (
    StockRun,
    hidden_first,
    input_shapes,
    probe_inputs,
    quiet,
    run_probe,
    tensors_of,
)
from peft_bsr.backbones.model_spec import ModelSpec, StageBlock
from peft_bsr.backbones.stages import describe_stage_block, find_stage_blocks, find_stages
from peft_bsr.backbones.tracing import Blocks, forward_watched, read_out
from peft_bsr.errors import UnsupportedModelError


def probe_blocks(model: nn.Module, reason: str) -> tuple[ModelSpec, StockRun] | None:
    """Describe the blocks of a model in which, for `reason`, no token can be dropped; None if there are none."""
    found = find_stage_blocks(model)
    if not found or any(p.is_meta for p in model.parameters()):
        return None
    try:
        with quiet(model):
            image_shape = input_shapes(model)[-1]  # the model's own: windows are made for it
            run_order = _run_order(model, list(found), image_shape)
            blocks = Blocks(tuple(run_order), tuple(map(found.__getitem__, run_order)), model)
            output, trace = forward_watched(model, blocks, image_shape, len(run_order) - 1)
            last_read, _, head = read_out(model, blocks, image_shape, output, trace)
    except (UnsupportedModelError, ValueError, TypeError, RuntimeError, AttributeError, IndexError):
        return None
    modules = blocks.modules
    described: list[StageBlock] = []
    for index, (block, attention) in enumerate(zip(modules, blocks.attentions, strict=True)):
        before = tuple(name for name, count in trace.before.items() if count == index)
        order = trace.order.get(index, [])
        described.append(describe_stage_block(block, order, attention, trace.ran, trace.calls[index][2], before))
    stages = find_stages(run_order, [block.width for block in described])
    described = [replace(block, stage=stage) for block, stage in zip(described, stages, strict=True)]
    first, hidden = described[0], trace.inputs[0]
    spec = ModelSpec(
        blocks=blocks.names,
        param_modules=first.param_modules,
        canonical_names=first.canonical_names,
        attention=first.attention,
        block_spec=None,
        head=head,
        unread=tuple(name for name in trace.after_blocks if name not in head),
        width=described[-1].width,
        num_prefix=0,
        num_patches=hidden[0].numel() // max(1, _channels(hidden, first)),
        num_suffix=0,
        image_shape=image_shape,
        grid=None,
        last_read=last_read,
        reads_prefix=(),
        reads_patches=True,
        reads_suffix=False,
        is_chained=False,
        returns_tuple=first.num_outputs > 0,
        uses_positions=True,
        side_inputs=(),
        scores_from=None,
        num_heads=0,
        scaling=0.0,
        no_reduction=reason,
        stage_blocks=tuple(described),
    )
    return spec, StockRun(trace.calls, [tensor.detach() for tensor in tensors_of(output)])


def _channels(hidden: Tensor, block: StageBlock) -> int:
    return block.width if block.width in hidden.shape[1:] else hidden.shape[-1]


def _run_order(model: nn.Module, names: list[str], image_shape: tuple[int, ...]) -> list[str]:
    """Blocks in the order in which they run.

    Raises:
        UnsupportedModelError: If one did not run once on a tensor, or the output is not finite.
    """
    ran: list[str] = []

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        hidden = hidden_first(args, kwargs)[0][0]
        first = output[0] if isinstance(output, tuple) else output
        ran.append(name if isinstance(hidden, Tensor) and isinstance(first, Tensor) else "")

    with ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook
            handle = hook(lambda _m, a, k, o, name=name: note(name, a, k, o), with_kwargs=True)
            hooks.callback(handle.remove)
        output = run_probe(model, probe_inputs(model, 1, image_shape))
    if sorted(ran) != sorted(names) or not all(bool(t.isfinite().all()) for t in tensors_of(output)):
        raise UnsupportedModelError("its blocks do not run once each, from tensors to tensors")
    return ran


__all__ = ["probe_blocks"]
