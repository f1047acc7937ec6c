"""Check at attach that a query path equals its block: the block's own tokens as queries give the block's output."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from peft_bsr.backbones import (
    ModelSpec,
    StockRun,
    excess,
    find_rule,
    input_names,
    no_zero_tables,
    probe_inputs,
    quiet,
    run_stock,
    tensors_of,
)
from peft_bsr.backbones.registry import Arguments
from peft_bsr.compat.torch_api import has_forward_hooks
from peft_bsr.core import hidden_tokens
from peft_bsr.engine import ROLES, QueryPath, attention_mask, projections
from peft_bsr.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


def verify_queries(model: nn.Module, spec: ModelSpec, index: int, path: QueryPath, stock: StockRun | None) -> QueryPath:
    """Run the tokens of one block through the query path and compare with the block. The model is not changed.

    Positions (rotary tables, relative biases) are disabled in the block, because queries have none.

    Args:
        model: The model, without adapters.
        spec: Description of the model.
        index: The block to check. All blocks have the same parts.
        path: The query path.
        stock: The probe's forward. None: a new one is run.

    Returns:
        The path. Without absorbed projections, which is logged, if these are not plain Linear modules or differ.

    Raises:
        UnsupportedModelError: If blocks cannot be read by queries, with the reason.
    """
    name = type(model).__name__
    block = model.get_submodule(spec.blocks[index])
    _check_parts(name, block, spec)
    with quiet(model):
        stock = stock or run_stock(model, spec.blocks, probe_inputs(model, 1, spec.image_shape))
        (hidden_states, *others), kwargs, _ = stock.calls[index]
        hidden = hidden_tokens(attention_mask(spec, others, kwargs))
        with no_zero_tables(block):
            expected = _run_block(model, block, spec, hidden_states, others, kwargs)
            plain = _excess(QueryPath(spec, absorbs=False), block, hidden_states, hidden, expected)
            if not plain <= 1:
                raise UnsupportedModelError(
                    f"{name}: its blocks cannot be read by queries: with a block's own tokens as queries, the result "
                    f"differs from the block's output by {plain:.0f} times the tolerance. Something happens between "
                    "its projections and its softmax (norms of queries and keys, its own positions). Use BSR, which "
                    "runs blocks as they are."
                )
            if not path.absorbs:
                return path
            if not all(_is_plain(module) for module in projections(block, spec)[1:3]):
                reason = "the projections are not plain Linear modules"
            else:
                absorbed = _excess(QueryPath(spec), block, hidden_states, hidden, expected)
                if absorbed <= 1:
                    return path
                reason = f"absorbed projections differ by {absorbed:.0f} times the tolerance"
    logger.info("%s: keys and values are computed and saved for backward, %s", name, reason)
    return replace(path, absorbs=False)


def _check_parts(name: str, block: nn.Module, spec: ModelSpec) -> None:
    if spec.block_spec is None:
        raise UnsupportedModelError(
            f"{name}: its blocks are not norm, attention, norm and MLP with two residuals, so queries cannot be run "
            "through their parts. Use BSR, which runs blocks as they are."
        )
    missing = [role for role, module in zip(ROLES, projections(block, spec), strict=True) if module is None]
    if missing:
        attention = [leaf for role, leaf in spec.paths.items() if "attention" in role]
        raise UnsupportedModelError(
            f"{name}: queries need an attention with separate query, key, value and output projections; no module for "
            f"{missing} was found among {attention} (a fused qkv Linear?). Use BSR instead."
        )
    ask, key, value, _ = projections(block, spec)
    if not spec.num_heads or not spec.scaling or not (ask.out_features == key.out_features == value.out_features):
        raise UnsupportedModelError(
            f"{name}: the number of heads or the scaling of its attention is unknown, or its queries, keys and values "
            "have different widths. Use `attn_implementation='sdpa'`, or BSR."
        )


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is exactly a Linear, without hooks."""
    return type(module) is nn.Linear and module.weight.is_floating_point() and not has_forward_hooks(module)


def _run_block(
    model: nn.Module, block: nn.Module, spec: ModelSpec, hidden_states: Tensor, args: list[object], kwargs: Arguments
) -> tuple[Tensor, Tensor]:
    """Outputs of the stock attention and of the stock block, both [B, N, D], without positions."""
    assert spec.block_spec is not None, "checked before"
    seen: list[Tensor] = []
    attention = block.get_submodule(spec.block_spec.attention)
    handle = attention.register_forward_hook(lambda _m, _a, output: seen.append(tensors_of(output)[0]))
    try:
        with _without_positions(model, block, spec):
            output = tensors_of(block(hidden_states, *args, **kwargs))[0]
    finally:
        handle.remove()
    return seen[0], output


def _excess(
    path: QueryPath, block: nn.Module, tokens: Tensor, hidden: Tensor | None, expected: tuple[Tensor, Tensor]
) -> float:
    """Largest difference from the stock attention and block as a multiple of the tolerance."""
    normalized = path.tokens_of(block, tokens)
    attended = path.attend(block, normalized, normalized, hidden)
    change = torch.stack(path.read(block, tokens, normalized, hidden)).sum(dim=0)
    attention, output = expected
    return max(excess(attended, attention, attention.abs().max()), excess(change, output - tokens, tokens.abs().max()))


@contextmanager
def _without_positions(model: nn.Module, block: nn.Module, spec: ModelSpec) -> Iterator[None]:
    """Context manager: the block's attention gets rotary tables that do not rotate, no biases, only padding masks."""
    attention = block.get_submodule(spec.attention)
    names = input_names(attention)

    def strip(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        named = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        tokens = {} if args else {"hidden_states": named.pop("hidden_states")}
        return args[:1], {**tokens, **{key: _content_only(value) for key, value in named.items()}}

    bias = find_rule(model).position_bias
    biases = [m for key, m in block.named_modules() if bias is not None and key.split(".")[-1] == bias]
    handles = [attention.register_forward_pre_hook(strip, with_kwargs=True)]
    handles += [m.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output)) for m in biases]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _content_only(value: object) -> object:
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(t, Tensor) for t in value):
        return torch.ones_like(value[0]), torch.zeros_like(value[1])
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
        hidden = hidden_tokens(value)
        return value if hidden is not None and bool(hidden.any()) else None
    return value
