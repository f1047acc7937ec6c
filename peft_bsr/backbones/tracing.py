"""One forward of a model with the probe's hooks: inputs and outputs of its blocks, and what comes after them."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from peft_bsr.backbones.block_spec import parameter_owners, takes_residual
from peft_bsr.backbones.inputs import RecordedCall, hidden_first, probe_inputs, run_probe, tensors_of
from peft_bsr.backbones.registry import Call
from peft_bsr.errors import UnsupportedModelError


class Blocks(NamedTuple):
    """Names of the blocks, names of their attentions relative to them (`""` = none), and the model."""

    names: tuple[str, ...]
    attentions: tuple[str, ...]
    model: nn.Module

    @property
    def modules(self) -> list[nn.Module]:
        """The blocks."""
        return [self.model.get_submodule(name) for name in self.names]


class Trace:
    """What the probe's hooks record in one forward."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self.has_begun = False
        self.start: Any = None  # hidden states at which the autograd graph starts
        self.attention_call: Call | None = None  # the first block's
        self.attention_shapes: list[tuple[int, ...]] = []
        self.order: dict[int, list[str]] = {}  # block index -> children in the order in which they ran
        self.residual_takers: set[str] = set()
        self.ran: set[nn.Module] = set()  # modules inside the blocks that were called
        self.grids: list[tuple[int, ...]] = []
        self.after_blocks: dict[str, list[Tensor]] = {}  # module that may belong to the head -> outputs of its calls
        self.before: dict[str, int] = {}  # other module with parameters -> number of blocks that ran before it

    @property
    def inputs(self) -> list[Tensor]:
        """Input hidden states of each block."""
        return [args[0] for args, _, _ in self.calls]

    @property
    def outputs(self) -> list[Any]:
        """Output hidden states of each block."""
        return [output[0] if isinstance(output, tuple) else output for _, _, output in self.calls]


def forward_watched(model: nn.Module, blocks: Blocks, image_shape: tuple[int, ...], start: int) -> tuple[object, Trace]:
    """One forward with hooks; the autograd graph starts at the output of block `start`."""
    trace = Trace()
    with ExitStack() as hooks:
        _watch(model, blocks, trace, hooks, start)
        with torch.no_grad():  # on exit it also undoes the `set_grad_enabled` in the hook of block `start`
            return run_probe(model, probe_inputs(model, 1, image_shape)), trace


def _watch(model: nn.Module, found: Blocks, trace: Trace, hooks: ExitStack, start: int) -> None:
    blocks = found.modules

    def keep(handle: RemovableHandle) -> None:
        hooks.callback(handle.remove)

    def enter_block(block: nn.Module, args: tuple[object, ...]) -> None:
        trace.has_begun = True

    def leave_block(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        trace.calls.append((*hidden_first(args, kwargs), output))
        hidden_states, *others = output if isinstance(output, tuple) else (output,)
        if block is blocks[start] and isinstance(hidden_states, Tensor):
            trace.start = hidden_states.detach().requires_grad_()
            torch.set_grad_enabled(True)
            return (trace.start, *others) if isinstance(output, tuple) else trace.start
        return None

    def enter_attention(attention: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        trace.attention_call = trace.attention_call or (args, dict(kwargs))
        tokens = args[0] if args else next(iter(kwargs.values()), None)
        trace.attention_shapes.append(tuple(getattr(tokens, "shape", ())))

    def enter_child(name: str, order: list[str], args: tuple[object, ...]) -> None:
        order.append(name)
        if takes_residual(args):
            trace.residual_takers.add(name)

    def leave_patches(conv: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        if not trace.has_begun:
            trace.grids.append(tuple(output.shape[2:]))

    def leave_other(name: str, output: object) -> None:
        if len(trace.calls) < len(blocks):
            trace.before.setdefault(name, len(trace.calls))
        tensors = tensors_of(output) if len(trace.calls) == len(blocks) else []
        if tensors:
            trace.after_blocks.setdefault(name, []).append(tensors[0])

    for module in {m for block in blocks for m in block.modules()}:
        keep(module.register_forward_pre_hook(lambda m, _: trace.ran.add(m)))
    for index, (block, attention_name) in enumerate(zip(blocks, found.attentions, strict=True)):
        keep(block.register_forward_pre_hook(enter_block))
        keep(block.register_forward_hook(leave_block, prepend=True, with_kwargs=True))
        if attention_name:
            keep(block.get_submodule(attention_name).register_forward_pre_hook(enter_attention, with_kwargs=True))
        for child_name, child in block.named_children():
            order = trace.order.setdefault(index, [])
            keep(child.register_forward_pre_hook(lambda _m, a, order=order, n=child_name: enter_child(n, order, a)))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            keep(module.register_forward_hook(leave_patches))
    for name in parameter_owners(model, avoid=found.names):
        hook = model.get_submodule(name).register_forward_hook
        keep(hook(lambda _m, _a, output, name=name: leave_other(name, output)))


def read_out(
    model: nn.Module, blocks: Blocks, image_shape: tuple[int, ...], output: object, trace: Trace
) -> tuple[int, Tensor, tuple[str, ...]]:
    """What changes the model's output: the last such block, its gradient, and the modules after the blocks."""
    last = len(blocks.names) - 1
    for index in range(last, -1, -1):
        if index < last:
            output, trace = forward_watched(model, blocks, image_shape, index)
        if found := _gradients(output, trace):
            return index, *found
    raise UnsupportedModelError("its output does not depend on any of its blocks")


def _gradients(output: object, trace: Trace) -> tuple[Tensor, tuple[str, ...]] | None:
    """Gradient at the start of the graph, and modules after the blocks that change the output; None if none do."""
    tensors = [t for t in tensors_of(output) if t.requires_grad]
    if not tensors:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():  # random weights, because the gradient of a LayerNorm's plain sum is 0
        weighted = [t.float() * torch.randn(t.shape, generator=generator).to(t.device) for t in tensors]
        probe = torch.stack([t.sum() for t in weighted]).sum()
    outputs = [(name, t) for name, calls in trace.after_blocks.items() for t in calls if t.requires_grad]
    start, *rest = torch.autograd.grad(probe, [trace.start, *(t for _, t in outputs)], allow_unused=True)
    if start is None:
        return None
    used = {name for (name, _), gradient in zip(outputs, rest, strict=True) if gradient is not None}
    return start, tuple(name for name in trace.after_blocks if name in used)


def text_decoder(model: PreTrainedModel) -> tuple[str, ...]:
    """Names, with a dot at the end, of a text decoder and of its output layer: a part of the model next to its head."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return ()
    decoder, output = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or "input_ids" not in inspect.signature(decoder.forward).parameters:
        return ()
    return tuple(f"{name}." for name, module in model.named_modules() if module is decoder or module is output)


__all__ = ["Blocks", "Trace", "forward_watched", "read_out", "text_decoder"]
