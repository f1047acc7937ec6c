"""Probe a model once and describe it as a `Column`, or refuse with the reason that was found.

One forward pass on two random images, without gradients up to the last block: blocks are what maps [B, N, D] to
[B, N, D] in a chain, special tokens are those that two different images share, the head is what changes the output
behind the last block. No table of class names. The model's weights, buffers, mode and the random state are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones.column import Anatomy, Column
from peft_bsr.errors import UnsupportedModelError

SUPPORTED = (
    "Supported are plain vision transformers: ViT, DeiT (with and without teacher), ViT-MSN, DINOv2 (with and "
    "without registers) and the CLIP vision tower, bare or with an image classification head"
)
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_PREFERRED_PATCHES = 256  # a probe at DINOv2's native 518 px (1369 patches) takes seconds, at 256 patches a fraction


def probe_column(model: nn.Module) -> Column:
    """Describe `model`, a vision transformer that takes `pixel_values`.

    Args:
        model: A transformers vision model, with or without a head, on any device but meta.

    Returns:
        Its `Column`.

    Raises:
        UnsupportedModelError: Naming what was found and what is supported. The model is unchanged.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> probe_column(ViTForImageClassification(tiny)).num_tokens
        197
    """
    try:
        return _probe(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {error}. {SUPPORTED}.") from None


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run `model` without a trace: evaluation mode, no gradients, the random state and every module's mode restored."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def probe_images(column_or_shape: Column | tuple[int, int, int], batch_size: int, like: Tensor) -> Tensor:
    """Random images [batch_size, C, H, W], always the same, in the dtype and on the device of `like`."""
    shape = column_or_shape.image_shape if isinstance(column_or_shape, Column) else column_or_shape
    images = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(device=like.device, dtype=like.dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)


def tolerance(dtype: torch.dtype) -> float:
    """How far two orders of the same sums may lie apart: 1e-4 in fp32, 5e-2 in half precision."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2


class _Trace:
    """What the probe's hooks saw."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Any] = []
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # the first block's, less the hidden states
        self.order: dict[int, list[str]] = {}  # block index -> children as they ran
        self.attention_calls: list[tuple[Any, ...]] = []
        self.grid: tuple[int, int] | None = None
        self.behind: dict[str, Tensor] = {}  # head candidates -> their output


def _probe(model: nn.Module) -> Column:
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError("its weights are on the meta device and the probe runs it once; load them first")
    list_name, attention_name = _find_blocks(model)
    blocks = list(model.get_submodule(list_name).children())
    with quiet(model):
        image_shape, output, trace = _run(model, list_name, blocks, attention_name)
        _check_chain(trace, blocks)
        hidden = trace.inputs[0]
        num_prefix = _count_prefix(hidden)
        if trace.grid is None or num_prefix + trace.grid[0] * trace.grid[1] != hidden.shape[1]:
            raise UnsupportedModelError(
                f"its first block sees {hidden.shape[1]} tokens, which are not {num_prefix} special ones and one for "
                f"each of the patches {trace.grid}"
            )
        _check_permutation(blocks[0], trace, num_prefix)
        reads, head = _read_out(output, trace)
    return Column(
        blocks=tuple(f"{list_name}.{i}" for i in range(len(blocks))),
        anatomy=_anatomy(blocks, trace, attention_name),
        head=head,
        width=hidden.shape[-1],
        num_prefix=num_prefix,
        image_shape=image_shape,
        grid=trace.grid,
        reads_prefix=tuple(i for i in range(num_prefix) if reads[i]),
        reads_patches=bool(reads[num_prefix:].any()),
    )


def _find_blocks(model: nn.Module) -> tuple[str, str]:
    """Name of the list of blocks, and of the attention relative to a block."""
    depth = getattr(_vision_config(model), "num_hidden_layers", None)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        attentions = [_attention_names(block) for block in module]
        if len({type(block) for block in module}) == 1 and all(len(names) == 1 for names in attentions):
            found[name] = attentions[0][0]
    lengths = {name: len(list(model.get_submodule(name).children())) for name in found}
    matching = {name: attention for name, attention in found.items() if lengths[name] == depth}
    if len(matching) != 1:
        lists = ", ".join(f"{name} ({length} blocks)" for name, length in lengths.items()) or "none"
        raise UnsupportedModelError(
            f"it must have one list of equal blocks, each with one attention (query, key and value projections), as "
            f"long as its config's num_hidden_layers={depth}; found: {lists}"
        )
    return next(iter(matching.items()))


def _attention_names(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if any(_has_all(module, names) for names in _PROJECTIONS)]


def _has_all(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(hasattr(getattr(module, name, None), "in_features") for name in names)


def _run(
    model: nn.Module, list_name: str, blocks: list[nn.Module], attention_name: str
) -> tuple[tuple[int, int, int], Any, _Trace]:
    """Forward two images; the graph starts at the last block's output."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    failure: Exception | None = None
    for image_shape in _image_shapes(model):
        trace = _Trace()
        with ExitStack() as hooks:
            _watch(model, list_name, blocks, attention_name, trace, hooks)
            try:
                with torch.no_grad():  # leaving it also undoes what the last block's hook switches on
                    output = model(pixel_values=probe_images(image_shape, 2, like))
                return image_shape, output, trace
            except (ValueError, TypeError, RuntimeError, AttributeError) as error:
                failure = error  # a fixed-size model refuses the small image; the last try is its native size
    raise UnsupportedModelError(f"a forward pass on random `pixel_values` failed with {failure!r}")


def _vision_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "vision_config", config)


def _image_shapes(model: nn.Module) -> list[tuple[int, int, int]]:
    config = _vision_config(model)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    patch = getattr(config, "patch_size", None)
    if size is None or channels is None or not isinstance(patch, int):
        raise UnsupportedModelError("its config names no image_size, num_channels and patch_size of a 2-D image")
    height, width = (size, size) if isinstance(size, int) else size
    shapes = [(channels, height, width)]
    side = int(_PREFERRED_PATCHES**0.5) * patch
    if height * width > side * side:
        shapes.insert(0, (channels, side, side))
    return shapes


def _watch(
    model: nn.Module, list_name: str, blocks: list[nn.Module], attention_name: str, trace: _Trace, hooks: ExitStack
) -> None:
    def on(handle: Any) -> None:
        hooks.callback(handle.remove)

    def enter_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        if not trace.inputs:
            trace.call = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
        trace.inputs.append(hidden)

    def leave_block(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        trace.outputs.append(output)
        if block is blocks[-1] and isinstance(output, Tensor):
            trace.outputs[-1] = output.detach().requires_grad_()
            torch.set_grad_enabled(True)
            return trace.outputs[-1]
        return None

    def enter_attention(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.attention_calls.append((*args, *kwargs.values()))

    def leave_patches(conv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        trace.grid = trace.grid or (output.shape[2], output.shape[3])

    def leave_behind(name: str, output: Any) -> None:
        if len(trace.outputs) == len(blocks) and isinstance(output, Tensor):
            trace.behind[name] = output

    for index, block in enumerate(blocks):
        on(block.register_forward_pre_hook(enter_block, with_kwargs=True))
        on(block.register_forward_hook(leave_block, prepend=True))
        on(block.get_submodule(attention_name).register_forward_pre_hook(enter_attention, with_kwargs=True))
        for child_name, child in block.named_children():
            order = trace.order.setdefault(index, [])
            on(child.register_forward_pre_hook(lambda _m, _a, order=order, name=child_name: order.append(name)))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size:
            on(module.register_forward_hook(leave_patches))
        if _owns_parameters(module) and not name.startswith(f"{list_name}."):
            on(module.register_forward_hook(lambda _m, _a, output, name=name: leave_behind(name, output)))


def _check_chain(trace: _Trace, blocks: list[nn.Module]) -> None:
    """Every block ran once, [B, N, D] -> [B, N, D], and nothing happens between two blocks."""
    if len(trace.inputs) != len(blocks):
        raise UnsupportedModelError(f"its {len(blocks)} blocks ran {len(trace.inputs)} times in one forward")
    shape = getattr(trace.inputs[0], "shape", ())
    for index, (hidden, output) in enumerate(zip(trace.inputs, trace.outputs, strict=True)):
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(f"block {index} returns a {type(output).__name__}, not a tensor [B, N, D]")
        if len(shape) != 3 or hidden.shape != shape or output.shape != shape:
            raise UnsupportedModelError(
                f"block {index} maps {tuple(hidden.shape)} to {tuple(output.shape)}, not [B, N, D] to the same shape"
            )
        if index and not torch.equal(hidden, trace.outputs[index - 1]):
            raise UnsupportedModelError(f"something changes the tokens between blocks {index - 1} and {index}")
    for index, (hidden, *side_inputs) in enumerate(trace.attention_calls):
        if hidden.shape != shape:
            raise UnsupportedModelError(f"attention {index} sees {tuple(hidden.shape)}, not all tokens {tuple(shape)}")
        if any(isinstance(t, Tensor) for t in _flatten(side_inputs)):
            raise UnsupportedModelError(
                "its attention takes position tables, biases or masks as inputs, which would have to follow the "
                "kept tokens"
            )


def _flatten(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flatten(value)
        else:
            yield value


def _count_prefix(hidden: Tensor) -> int:
    shared = (hidden[0] == hidden[1]).all(dim=-1).tolist()
    num_prefix = shared.index(False) if False in shared else len(shared)
    if any(shared[num_prefix:]):
        special = [i for i, is_special in enumerate(shared) if is_special]
        raise UnsupportedModelError(f"tokens that do not depend on the image sit behind the patches, at {special}")
    return num_prefix


def _check_permutation(block: nn.Module, trace: _Trace, num_prefix: int) -> None:
    """Dropping tokens is exact only if a block treats patches alike wherever they stand."""
    hidden, (args, kwargs) = trace.inputs[0], trace.call
    num_tokens = hidden.shape[1]
    shuffled = num_prefix + torch.randperm(num_tokens - num_prefix, generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.arange(num_prefix), shuffled]).to(hidden.device)
    error = relative_error(block(hidden[:, order], *args, **kwargs), block(hidden, *args, **kwargs)[:, order])
    if error > tolerance(hidden.dtype):
        raise UnsupportedModelError(
            f"its blocks use the position of a token inside (swapping patches changes a block's output by "
            f"{error:.1e} relative), which would have to follow the kept tokens"
        )


def _read_out(output: Any, trace: _Trace) -> tuple[Tensor, tuple[str, ...]]:
    """Tokens of the last block that change the output [N], and the modules behind it that do."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    tensors = [t for t in _flatten(values if isinstance(values, (tuple, list)) else (values,)) if isinstance(t, Tensor)]
    tensors = [t for t in tensors if t.requires_grad]
    if not tensors:
        raise UnsupportedModelError("its output does not depend on its last block")
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():  # random weights: a plain sum of a LayerNorm's output has no gradient
        weighted = [t.float() * torch.randn(t.shape, generator=generator).to(t.device) for t in tensors]
        probe = torch.stack([t.sum() for t in weighted]).sum()
    outputs = [t if t.requires_grad else None for t in trace.behind.values()]
    sources = [trace.outputs[-1], *(t for t in outputs if t is not None)]
    last, *rest = torch.autograd.grad(probe, sources, allow_unused=True)
    gradients = iter(rest)
    used = [t is not None and next(gradients) is not None for t in outputs]
    reads = last.abs().sum(dim=(0, 2)).ne(0).cpu()
    return reads, tuple(name for name, is_used in zip(trace.behind, used, strict=True) if is_used)


def _anatomy(blocks: list[nn.Module], trace: _Trace, attention_name: str) -> Anatomy:
    orders = {tuple(order) for order in trace.order.values()}
    order = list(orders.pop())
    attention = attention_name.split(".")[0]
    with_linears = [n for n in order if n != attention and _has_linear(getattr(blocks[0], n))]
    if orders or attention not in order or len(with_linears) != 1 or len(order) < 4:
        raise UnsupportedModelError(f"its blocks are not norm, attention, norm, MLP with one of each; they run {order}")
    a, m = order.index(attention), order.index(with_linears[0])
    if a != 1 or m < a + 2:
        raise UnsupportedModelError(f"its blocks are not pre-norm; their parts run in the order {order}")
    leaves = tuple(name for name, module in blocks[0].named_modules() if _owns_parameters(module))
    owned = {f"{leaf}.{name}" for leaf in leaves for name, _ in blocks[0].get_submodule(leaf).named_parameters()}
    orphans = sorted({name for name, _ in blocks[0].named_parameters()} - owned)
    if orphans:
        raise UnsupportedModelError(f"its blocks hold parameters outside of a leaf module: {orphans}")
    return Anatomy(
        order[0], order[a], tuple(order[a + 1 : m - 1]), order[m - 1], order[m], tuple(order[m + 1 :]), leaves
    )


def _has_linear(module: nn.Module) -> bool:
    return any(hasattr(m, "in_features") for m in module.modules())


def _owns_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None and not any(True for _ in module.children())
