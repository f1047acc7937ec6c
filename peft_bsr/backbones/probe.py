"""Probe a model and describe it as a `ModelSpec`, or raise an error with the reason.

The probe embeds two random images and runs one forward, without gradients up to the last block, and changes nothing.
Blocks map [B, N, D] to [B, N, D]; special tokens are equal for two images; the head is what changes the final output.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from peft_bsr.backbones.block_spec import (
    attention_names,
    canonical_names_of,
    find_block_spec,
    parameter_owners,
)
from peft_bsr.backbones.inputs import (
    StockRun,
    check_takes_images,
    describe_failure,
    grid_of_config,
    input_shapes,
    probe_inputs,
    quiet,
    run_probe,
    tensors_of,
    vision_parts,
)
from peft_bsr.backbones.kinds import possible_kinds
from peft_bsr.backbones.model_spec import ModelSpec
from peft_bsr.backbones.part import find_part, view_of
from peft_bsr.backbones.permutation import check_permutation
from peft_bsr.backbones.probe_blocks import probe_blocks
from peft_bsr.backbones.registry import vision_config
from peft_bsr.backbones.scoring import find_score_source
from peft_bsr.backbones.stages import describe_stage_block
from peft_bsr.backbones.tracing import Blocks, Trace, forward_watched, read_out, text_decoder
from peft_bsr.core import Route
from peft_bsr.errors import UnsupportedModelError

_INSTEAD = "Use PEFT's LoRA for it; docs/compatibility.md lists the models that are supported."


def probe_model(model: nn.Module, needs_tokens: bool = True, part: str | None = None) -> ModelSpec:
    """Describe `model`, a vision transformer.

    Args:
        model: A transformers vision (or spectrogram) model, with or without a head, on any device but meta; or a larger
            model with one inside, such as a vision-language model.
        needs_tokens: Whether models in which no token can be dropped (Swin, Hiera, SAM, SegFormer, ...) are refused.
            False: their blocks are described, with the reason in `no_reduction`. Default True.
        part: Name of the vision model inside a larger model. Default None: found, where there is exactly one.

    Returns:
        Its `ModelSpec`. In a larger model all names in it are relative to its `part`.

    Raises:
        UnsupportedModelError: With the reason. The model is unchanged.
        ConfigError: If there is no such part, or if there are several vision models inside and none was named.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> probe_model(ViTForImageClassification(tiny)).num_tokens
        197
    """
    name = find_part(model, part)
    return replace(probe(view_of(model, name), needs_tokens)[0], part=name)


def probe(model: nn.Module, needs_tokens: bool = True) -> tuple[ModelSpec, StockRun]:
    """`probe_model`, and its forward pass for further checks."""
    try:
        return _probe(model)
    except UnsupportedModelError as error:
        reason = str(error)
        is_sentence = reason.endswith(".")  # it has its own advice
        found = None if needs_tokens or is_sentence else probe_blocks(model, reason)
        if found is not None:
            return found
        inside = [] if needs_tokens else vision_parts(model)
        is_other = bool(inside) and model.get_submodule(inside[0]) is not getattr(model, "base_model", None)
        instead = f"To adapt the vision model inside alone, name it: `part={inside[0]!r}`." if is_other else _INSTEAD
        advised = reason if is_sentence else f"{reason}. {instead}"
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {advised}") from None


class _EmbeddingsSeen(Exception):  # noqa: N818  (a way out of a forward, not an error)
    """Stops the forward at the first block."""


def _probe(model: nn.Module) -> tuple[ModelSpec, StockRun]:
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(
            "its weights are on the meta device. Load them first: the probe runs the model once."
        )
    check_takes_images(model)
    found = _find_blocks(model)
    names, attention_name, blocks = found.names, found.attentions[0], found.modules
    with quiet(model):
        image_shape, embeddings, output, trace = _run(model, found)
        if not all(bool(t.isfinite().all()) for t in tensors_of(output) if t.is_floating_point()):
            raise UnsupportedModelError("its output for a random image is NaN or infinite. Check its weights.")
        _check_blocks(trace, blocks)
        num_prefix, num_suffix = _count_special(embeddings)
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
        if scaling == 1:  # the attention function gets scaled queries (Whisper)
            scaling = getattr(attention, "scaling", scaling)
        last_read, start, read = read_out(model, found, image_shape, output, trace)
    apart = text_decoder(model)
    head = tuple(name for name in read if not f"{name}.".startswith(apart))
    reads = start.abs().sum(dim=(0, 2)).ne(0).cpu()
    param_modules = tuple(parameter_owners(blocks[0]))
    orders = [list(order) for order in trace.order.values()]
    is_same = all(order == orders[0] for order in orders)
    block_spec = find_block_spec(blocks[0], orders[0], trace.residual_takers, attention_name) if is_same else None
    whole_block = None
    if is_same and block_spec is None:
        whole_block = describe_stage_block(blocks[0], orders[0], attention_name, trace.ran, trace.calls[0][2], ())
    spec = ModelSpec(
        blocks=names,
        param_modules=param_modules,
        canonical_names=canonical_names_of(blocks[0], param_modules, block_spec, attention_name),
        attention=attention_name,
        block_spec=block_spec,
        head=head,
        unread=tuple(name for name in trace.after_blocks if name not in read),
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
        whole_block=whole_block,
    )
    return spec, StockRun(trace.calls, [tensor.detach() for tensor in tensors_of(output)])


def _find_blocks(model: nn.Module) -> Blocks:
    depth = getattr(vision_config(model), "num_hidden_layers", None)
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            attentions = [attention_names(block) for block in module]
            if len({type(block) for block in module}) == 1 and all(attentions):
                found[name] = max(attentions, key=len)
    holders = {name for name in found if any(other.startswith(f"{name}.") for other in found)}  # of stages
    decoders = {name for name, own in found.items() if len(own) > 1} - holders
    if len(decoders) < len(found):  # next to other blocks
        found = {name: own for name, own in found.items() if name not in decoders}
    lengths = {name: len(list(model.get_submodule(name).children())) for name in found}
    matching = [name for name in found if depth is None or lengths[name] == depth]
    lists = " and ".join(f"`{name}` ({lengths[name]} blocks)" for name in found)
    if not found:
        raise UnsupportedModelError("it has no list of equal blocks with query, key and value projections")
    if len(found) > 1 and (len(matching) != 1 or matching[0] in holders):
        raise UnsupportedModelError(f"it has stages: {len(found)} lists of blocks, the first is `{next(iter(found))}`")
    if len(matching) != 1:
        raise UnsupportedModelError(f"{lists} is not as long as its config's num_hidden_layers={depth}")
    if len(found[matching[0]]) > 1:
        raise UnsupportedModelError(f"its blocks have several attentions: {' and '.join(found[matching[0]])}")
    _check_layer_drop(model, matching[0])
    names = tuple(f"{matching[0]}.{i}" for i in range(lengths[matching[0]]))
    return Blocks(names, (found[matching[0]][0],) * len(names), model)


def _check_layer_drop(model: nn.Module, blocks: str) -> None:
    caller = model.get_submodule(blocks.rpartition(".")[0])
    rate = getattr(caller, "layerdrop", getattr(vision_config(model), "layerdrop", 0.0))
    if rate > 0:
        name = "encoder_layerdrop" if hasattr(model.config, "encoder_layerdrop") else "layerdrop"
        raise UnsupportedModelError(
            f"in training it skips whole blocks at random (LayerDrop, `{name}={rate}`), also those that train, reduce "
            f"tokens or are read. Load it with `from_pretrained(..., {name}=0.0)`."
        )


def _run(model: nn.Module, blocks: Blocks) -> tuple[tuple[int, ...], Tensor, object, Trace]:
    """Compute the embeddings of two images, then run one forward with the first."""
    failure: Exception | None = None
    for image_shape in input_shapes(model):
        try:
            embeddings = _embed(model, blocks.modules[0], probe_inputs(model, 2, image_shape))
            output, trace = forward_watched(model, blocks, image_shape, len(blocks.modules) - 1)
            return image_shape, embeddings, output, trace
        except UnsupportedModelError:
            raise
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            failure = error  # a fixed-size model rejects the small image; the last attempt is its native size
    raise UnsupportedModelError(describe_failure(model, failure))


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


def _check_blocks(trace: Trace, blocks: list[nn.Module]) -> None:
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


def _count_special(embeddings: Tensor) -> tuple[int, int]:
    """Numbers of tokens at the front and at the end that are equal for both images."""
    shared = (embeddings[0] == embeddings[1]).all(dim=-1).tolist()
    if all(shared):
        raise UnsupportedModelError("its first block gets the same tokens for two different images")
    num_prefix, num_suffix = shared.index(False), shared[::-1].index(False)
    if any(shared[num_prefix : len(shared) - num_suffix]):
        special = [i for i, is_special in enumerate(shared) if is_special]
        raise UnsupportedModelError(f"tokens that do not depend on the image are among the patches, at {special}")
    return num_prefix, num_suffix
