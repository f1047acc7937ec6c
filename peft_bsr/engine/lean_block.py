"""Which parts of a block can run lean, and how they run: the lean functions on a block's own modules."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from peft_bsr.backbones import Anatomy, Column, attend
from peft_bsr.core import BlockRun, token_scores
from peft_bsr.engine.affine import Affine, affines_of
from peft_bsr.engine.frozen import FrozenLinear
from peft_bsr.engine.lean import Activation, lean_mlp, lean_projections, recomputed
from peft_bsr.engine.plan import Lean

_FOREIGN = ("attention_mask", "position_embeddings")  # what a lean attention knows to do with


def run_lean_mlp(block: nn.Module, anatomy: Anatomy, lean: Lean, tokens: Tensor) -> Tensor | None:
    """norm2 and the MLP of [B, N, D], or None where they must run as they are."""
    norm = _norm_in_force(getattr(block, anatomy.norm2))
    parts = _mlp_parts(block, anatomy)
    if norm is None or parts is None or not _same_dtype(tokens, Affine.of(norm), parts[0], parts[2]):
        return None
    save_products = lean.save_products and lean.num_queries is None
    return lean_mlp(tokens, Affine.of(norm), norm.eps, *parts, save_products)


def run_lean_attention(
    block: nn.Module, column: Column, lean: Lean, run: BlockRun, tokens: Tensor, arguments: dict[str, Any]
) -> Tensor | None:
    """norm1 and the attention of [B, N, D], or None where they must run as they are.

    Args:
        block: The block.
        column: Knows its parts.
        lean: How.
        run: Where the scores go.
        tokens: [B, N, D].
        arguments: What the attention is called with beside the hidden states, for the alive tokens.

    Returns:
        [B, N, D], or [B, Q, D] if only the first Q tokens are wanted.
    """
    anatomy = column.anatomy
    assert anatomy is not None, "only a block whose parts are known runs lean"
    attention: Any = block.get_submodule(column.attention)
    leaves = {role: block.get_submodule(leaf) for role, leaf in zip(column.roles, column.leaves, strict=True)}
    norm = _norm_in_force(getattr(block, anatomy.norm1))
    found = [_affine_in_force(leaves.get(f"attention.{name}")) for name in ("query", "key", "value")]
    projections = [affine for affine in found if affine is not None]
    output: Any = leaves.get("attention.output")
    known = {name: value for name, value in arguments.items() if name in _FOREIGN and value is not None}
    foreign = [name for name, v in arguments.items() if name not in known and (isinstance(v, (Tensor, tuple)))]
    if norm is None or len(projections) < 3 or output is None or foreign:
        return None
    if _has_dropout(getattr(block, anatomy.attention)) or attention._forward_hooks:  # somebody captures its weights
        return None
    if column.scores_from not in ("interface", "sdpa") or not _same_dtype(tokens, Affine.of(norm), *projections):
        return None
    mask, tables = known.get("attention_mask"), known.get("position_embeddings")
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if (tables is not None and (rotate is None or lean.num_queries)) or (mask is not None and lean.num_queries):
        return None

    score = run.score  # not `run`: the graph that its scores hold would hold it by this function, for ever

    def mix(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        heads = [t.unflatten(2, (column.num_heads, -1)).transpose(1, 2) for t in (query, key, value)]
        if tables is not None and rotate is not None:
            heads[:2] = rotate(*heads[:2], *tables)
        q, k, v = heads
        mixed = attend(attention, column.scores_from, q, k, v, mask, column.scaling)
        return (mixed,) if score is None else (mixed, token_scores(score, q, k, column.scaling, mask))

    if lean.save_products:
        query, key, value = projections
        results = mix(*lean_projections(tokens, Affine.of(norm), norm.eps, query, key, value, lean.num_queries))
    else:
        scalings = [projection.scaling for projection in projections]

        def project_and_mix(tokens: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, ...]:
            normalized = layer_norm(tokens, tokens.shape[-1:], weight, bias, norm.eps)
            inputs = (normalized[:, : lean.num_queries], normalized, normalized)
            products = zip(affines_of(others, scalings), inputs, strict=True)
            return mix(*(affine.product(part) for affine, part in products))

        parameters = [tensor for projection in projections for tensor in projection.tensors]
        results = recomputed(project_and_mix, tokens, norm.weight, norm.bias, *parameters)
    if score is not None:
        run.token_scores = results[1]
    projected: Tensor = output(results[0])
    return projected


def plain_mlp(block: nn.Module, anatomy: Anatomy) -> tuple[Any, Any, Any] | None:
    """First Linear, activation and second Linear of a plain MLP in one or two modules, or None if it is another."""
    modules = [m for name in anatomy.mlp for m in _leaves(getattr(block, name))]
    modules = [m for m in modules if not (isinstance(m, nn.Identity) or (isinstance(m, nn.Dropout) and m.p == 0))]
    linears = [m for m in modules if hasattr(m, "in_features")]
    others = [m for m in modules if not hasattr(m, "in_features")]
    if len(linears) != 2 or len(others) != 1:
        return None
    first, second = linears
    if first.out_features != second.in_features:
        first, second = second, first
    return first, others[0], second


def _mlp_parts(block: nn.Module, anatomy: Anatomy) -> tuple[Affine, Activation, Affine] | None:
    """A plain MLP's parts as they are in force, the activation with its derivative."""
    parts = plain_mlp(block, anatomy)
    if parts is None:
        return None
    first, activation, second = _affine_in_force(parts[0]), Activation.of(parts[1]), _affine_in_force(parts[2])
    return None if first is None or second is None or activation is None else (first, activation, second)


def _leaves(module: nn.Module) -> list[nn.Module]:
    """Modules without modules inside, a wrapped leaf counting as one."""
    children = list(module.children())
    if not children or hasattr(module, "leaf_in_force"):
        return [module]
    return [leaf for child in children for leaf in _leaves(child)]


def _norm_in_force(module: Any) -> Any:
    """The very LayerNorm that runs, or None if there is something around or in the place of it."""
    leaf, update = _leaf_and_update(module)
    return leaf if type(leaf) is nn.LayerNorm and update is None else None


def _affine_in_force(module: Any) -> Affine | None:
    """The very Linear that runs, and the low-rank update beside it, or None if there is something else."""
    leaf, update = _leaf_and_update(module)
    return Affine.of(leaf, update) if type(leaf) in (nn.Linear, FrozenLinear) else None


def _leaf_and_update(module: Any) -> tuple[Any, Any]:
    if module is None:
        return None, None
    leaf, update = module.leaf_in_force() if hasattr(module, "leaf_in_force") else (module, None)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (module, leaf, update) if m is not None)
    return (None, None) if hooked else (leaf, update)


def _has_dropout(attention: nn.Module) -> bool:
    """Whether anything in the attention drops numbers in training; nobody can know where it would be."""
    for module in attention.modules():
        rates = [v for name, v in vars(module).items() if "drop" in name and isinstance(v, (int, float))]
        if any(rates) or (isinstance(module, nn.Dropout) and module.p > 0):
            return True
    return False


def _same_dtype(tokens: Tensor, *affines: Affine) -> bool:
    """Whether nothing would be cast; autocast casts by itself."""
    if torch.is_autocast_enabled(tokens.device.type):
        return True
    return all(t.dtype == tokens.dtype for affine in affines for t in affine.tensors if t is not None)
