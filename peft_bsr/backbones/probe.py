"""Probe a model and describe it as a `ModelSpec`, or raise an error with the reason.

The probe embeds two random images and runs one forward, without gradients up to the last block, and changes nothing.
Blocks map [B, N, D] to [B, N, D]; special tokens are equal for two images; the head is what changes the final output.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_bsr.backbones.block_spec import (
    attention_names,
    canonical_names_of,
    find_block_spec,
    parameter_owners,
    takes_residual,
)
from peft_bsr.backbones.inputs import (
    RecordedCall,
    StockRun,
    check_takes_images,
    describe_failure,
    grid_of_config,
    hidden_first,
    input_shapes,
    probe_inputs,
    quiet,
    run_probe,
    tensors_of,
)
from peft_bsr.backbones.kinds import possible_kinds
from peft_bsr.backbones.model_spec import ModelSpec
from peft_bsr.backbones.permutation import check_permutation
from peft_bsr.backbones.registry import Call, vision_config
from peft_bsr.backbones.scoring import find_score_source
from peft_bsr.backbones.special_tokens import count_special
from peft_bsr.core import Route
from peft_bsr.errors import UnsupportedModelError

_INSTEAD = "Use PEFT's LoRA for it; docs/compatibility.md lists the models that are supported."


def probe_model(model: nn.Module) -> ModelSpec:
    """Describe `model`, a vision transformer.

    Args:
        model: A transformers vision (or spectrogram) model, with or without a head, on any device but meta.

    Returns:
        Its `ModelSpec`.

    Raises:
        UnsupportedModelError: With the reason. The model is unchanged.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> probe_model(ViTForImageClassification(tiny)).num_tokens
        197
    """
    return probe(model)[0]


def probe(model: nn.Module) -> tuple[ModelSpec, StockRun]:
    """`probe_model`, and its forward pass for further checks."""
    try:
        return _probe(model)
    except UnsupportedModelError as error:
        reason = str(error)
        advised = reason if reason.endswith(".") else f"{reason}. {_INSTEAD}"  # a full sentence has its own advice
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {advised}") from None


class _EmbeddingsSeen(Exception):  # noqa: N818  (a way out of a forward, not an error)
    """Stops the forward at the first block."""


class _Trace:
    """What the probe's hooks record in one forward."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self.has_begun = False
        self.start: Any = None  # hidden states at which the autograd graph starts
        self.attention_call: Call | None = None  # the first block's
        self.attention_shapes: list[tuple[int, ...]] = []
        self.order: dict[int, list[str]] = {}  # block index -> children in the order in which they ran
        self.residual_takers: set[str] = set()
        self.grids: list[tuple[int, ...]] = []
        self.after_blocks: dict[str, list[Tensor]] = {}  # module that may belong to the head -> outputs of its calls

    @property
    def inputs(self) -> list[Tensor]:
        """Input hidden states of each block."""
        return [args[0] for args, _, _ in self.calls]

    @property
    def outputs(self) -> list[Any]:
        """Output hidden states of each block."""
        return [output[0] if isinstance(output, tuple) else output for _, _, output in self.calls]


def _probe(model: nn.Module) -> tuple[ModelSpec, StockRun]:
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(
            "its weights are on the meta device. Load them first: the probe runs the model once."
        )
    check_takes_images(model)
    found = _find_blocks(model)
    list_name, attention_name, blocks = found
    with quiet(model):
        image_shape, embeddings, output, trace = _run(model, found)
        if not all(bool(t.isfinite().all()) for t in tensors_of(output) if t.is_floating_point()):
            raise UnsupportedModelError("its output for a random image is NaN or infinite. Check its weights.")
        _check_blocks(trace, blocks)
        num_prefix, num_suffix = count_special(embeddings)
        num_patches = embeddings.shape[1] - num_prefix - num_suffix
        route = Route(num_prefix, num_patches, num_suffix)
        (hidden, *args), kwargs, first_output = trace.calls[0]
        attention = blocks[0].get_submodule(attention_name)
        assert trace.attention_call is not None
        grids = [grid_of_config(model, image_shape), *trace.grids]
        grid = next((grid for grid in reversed(grids) if grid and torch.Size(grid).numel() == num_patches), None)
        kinds = possible_kinds(model, attention, trace.attention_call, route, image_shape, grid)
        uses_positions, side_inputs = check_permutation(
            model, blocks[0], attention_name, hidden, (tuple(args), kwargs), route, kinds
        )
        scores_from, num_heads, scaling = find_score_source(attention, *trace.attention_call)
        last_read, reads, head = _read_out(model, found, image_shape, output, trace)
    param_modules = tuple(parameter_owners(blocks[0]))
    orders = [list(order) for order in trace.order.values()]
    is_same = all(order == orders[0] for order in orders)
    block_spec = find_block_spec(blocks[0], orders[0], trace.residual_takers, attention_name) if is_same else None
    spec = ModelSpec(
        blocks=tuple(f"{list_name}.{i}" for i in range(len(blocks))),
        param_modules=param_modules,
        canonical_names=canonical_names_of(blocks[0], param_modules, block_spec, attention_name),
        attention=attention_name,
        block_spec=block_spec,
        head=head,
        unread=tuple(name for name in trace.after_blocks if name not in head),
        width=embeddings.shape[-1],
        num_prefix=num_prefix,
        num_patches=num_patches,
        num_suffix=num_suffix,
        image_shape=image_shape,
        grid=grid,
        last_read=last_read,
        reads_prefix=tuple(i for i in range(num_prefix) if reads[i]),
        reads_patches=bool(reads[num_prefix : num_prefix + num_patches].any()),
        reads_suffix=bool(reads[num_prefix + num_patches :].any()),
        is_chained=all(torch.equal(a, b) for a, b in zip(trace.inputs[1:], trace.outputs, strict=False)),
        returns_tuple=isinstance(first_output, tuple),
        uses_positions=uses_positions,
        side_inputs=tuple(side_inputs.items()),
        scores_from=scores_from,
        num_heads=num_heads,
        scaling=scaling,
    )
    return spec, StockRun(trace.calls, [tensor.detach() for tensor in tensors_of(output)])


class _Blocks(NamedTuple):
    """Name of the list of blocks, name of the attention relative to a block, and the blocks."""

    list_name: str
    attention_name: str
    modules: list[nn.Module]


def _find_blocks(model: nn.Module) -> _Blocks:
    depth = getattr(vision_config(model), "num_hidden_layers", None)
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            attentions = [attention_names(block) for block in module]
            if len({type(block) for block in module}) == 1 and all(attentions):
                found[name] = attentions[0]
    lengths = {name: len(list(model.get_submodule(name).children())) for name in found}
    matching = [name for name in found if depth is None or lengths[name] == depth]
    lists = " and ".join(f"`{name}` ({lengths[name]} blocks)" for name in found)
    if not found:
        raise UnsupportedModelError("it has no list of equal blocks with query, key and value projections")
    if len(found) > 1 and len(matching) != 1:
        raise UnsupportedModelError(f"it has stages: {len(found)} lists of blocks, the first is `{next(iter(found))}`")
    if len(matching) != 1:
        raise UnsupportedModelError(f"{lists} is not as long as its config's num_hidden_layers={depth}")
    if len(found[matching[0]]) > 1:
        raise UnsupportedModelError(f"its blocks have several attentions: {' and '.join(found[matching[0]])}")
    return _Blocks(matching[0], found[matching[0]][0], list(model.get_submodule(matching[0]).children()))


def _run(model: nn.Module, blocks: _Blocks) -> tuple[tuple[int, ...], Tensor, object, _Trace]:
    """Compute the embeddings of two images, then run one forward with the first."""
    failure: Exception | None = None
    for image_shape in input_shapes(model):
        try:
            embeddings = _embed(model, blocks.modules[0], probe_inputs(model, 2, image_shape))
            output, trace = _forward(model, blocks, image_shape, len(blocks.modules) - 1)
            return image_shape, embeddings, output, trace
        except UnsupportedModelError:
            raise
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            failure = error  # a fixed-size model rejects the small image; the last attempt is its native size
    raise UnsupportedModelError(describe_failure(model, failure))


def _forward(model: nn.Module, blocks: _Blocks, image_shape: tuple[int, ...], start: int) -> tuple[object, _Trace]:
    """One forward with hooks; the autograd graph starts at the output of block `start`."""
    trace = _Trace()
    with ExitStack() as hooks:
        _watch(model, blocks, trace, hooks, start)
        with torch.no_grad():  # on exit it also undoes the `set_grad_enabled` in the hook of block `start`
            return run_probe(model, probe_inputs(model, 1, image_shape)), trace


def _embed(model: nn.Module, first_block: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Input of the first block; the forward stops there."""
    seen: list[object] = []

    def stop(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.append(args[0] if args else kwargs.get("hidden_states"))
        raise _EmbeddingsSeen

    handle = first_block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run_probe(model, inputs)
    except _EmbeddingsSeen:
        pass
    finally:
        handle.remove()
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim != 3:
        shape = tuple(getattr(seen[0], "shape", ())) if seen else None
        raise UnsupportedModelError(f"its first block gets {shape} instead of tokens [B, N, D]")
    return seen[0]


def _watch(model: nn.Module, found: _Blocks, trace: _Trace, hooks: ExitStack, start: int) -> None:
    list_name, attention_name, blocks = found

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

    def leave_head(name: str, output: object) -> None:
        tensors = tensors_of(output) if len(trace.calls) == len(blocks) else []
        if tensors:
            trace.after_blocks.setdefault(name, []).append(tensors[0])

    for index, block in enumerate(blocks):
        keep(block.register_forward_pre_hook(enter_block))
        keep(block.register_forward_hook(leave_block, prepend=True, with_kwargs=True))
        keep(block.get_submodule(attention_name).register_forward_pre_hook(enter_attention, with_kwargs=True))
        for child_name, child in block.named_children():
            order = trace.order.setdefault(index, [])
            keep(child.register_forward_pre_hook(lambda _m, a, order=order, n=child_name: enter_child(n, order, a)))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            keep(module.register_forward_hook(leave_patches))
    for name in parameter_owners(model, avoid=list_name):
        hook = model.get_submodule(name).register_forward_hook
        keep(hook(lambda _m, _a, output, name=name: leave_head(name, output)))


def _check_blocks(trace: _Trace, blocks: list[nn.Module]) -> None:
    """Check that every block ran once, [B, N, D] -> [B, N, D], and that its attention saw all tokens."""
    if len(trace.calls) != len(blocks):
        raise UnsupportedModelError(f"its {len(blocks)} blocks ran {len(trace.calls)} times in one forward")
    shape = trace.inputs[0].shape
    for index, (hidden, output) in enumerate(zip(trace.inputs, trace.outputs, strict=True)):
        if not isinstance(output, Tensor) or hidden.shape != shape or output.shape != shape:
            found = tuple(getattr(output, "shape", ())) or type(output).__name__
            raise UnsupportedModelError(
                f"block {index} maps {tuple(hidden.shape)} to {found}, so not all blocks have the same tokens"
            )
    for index, attended in enumerate(trace.attention_shapes):
        if attended != shape:
            raise UnsupportedModelError(
                f"it has windows: attention {index} sees {attended}, not all tokens {tuple(shape)} at once"
            )
    if len(trace.attention_shapes) != len(blocks):
        raise UnsupportedModelError(
            f"its {len(blocks)} blocks called their attention {len(trace.attention_shapes)} times in one forward"
        )


def _read_out(
    model: nn.Module, blocks: _Blocks, image_shape: tuple[int, ...], output: object, trace: _Trace
) -> tuple[int, Tensor, tuple[str, ...]]:
    """What changes the model's output: the last such block, its tokens [N], and the modules after the blocks."""
    last = len(blocks.modules) - 1
    for index in range(last, -1, -1):
        if index < last:
            output, trace = _forward(model, blocks, image_shape, index)
        if found := _gradients(output, trace):
            return index, *found
    raise UnsupportedModelError("its output does not depend on any of its blocks")


def _gradients(output: object, trace: _Trace) -> tuple[Tensor, tuple[str, ...]] | None:
    """Tokens at the start of the graph [N], and modules after the blocks, that change the output; None if none do."""
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
    return start.abs().sum(dim=(0, 2)).ne(0).cpu(), tuple(name for name in trace.after_blocks if name in used)
