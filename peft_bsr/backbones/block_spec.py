"""The parts of a block: modules that own parameters, their canonical names, and the order in which they run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from peft_bsr.backbones.model_spec import BlockSpec
from peft_bsr.backbones.side_inputs import input_names, takes_any_keyword

_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("qkv",))
_PROJECTION_ROLES = {
    name: role for names in _PROJECTIONS for name, role in zip(names, ("query", "key", "value"), strict=False)
} | {"qkv": "qkv"}


def attention_names(block: nn.Module) -> list[str]:
    """Names of the modules in a block that own query, key and value projections (or a fused one)."""
    found = (name for name, module in block.named_modules() if any(_has_all(module, names) for names in _PROJECTIONS))
    return [name for name in found if name]


def parameter_owners(module: nn.Module, prefix: str = "", avoid: Collection[str] = ()) -> Iterator[str]:
    """Names of the outermost modules inside `module` that hold parameters of their own, or their modules in a list.

    Args:
        module: The module to search. Its own parameters do not count.
        prefix: Prefix for the names.
        avoid: Names of modules to leave out. A module that contains one is searched, not named.
    """
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if name in avoid:
            continue
        contains_avoided = any(other.startswith(f"{name}.") for other in avoid)
        holds_own = next(child.parameters(recurse=False), None) is not None or calls_a_list(child)
        if holds_own and not contains_avoided:
            yield name
        else:
            yield from parameter_owners(child, f"{name}.", avoid)


def calls_a_list(module: nn.Module) -> bool:
    """Whether the module keeps modules in a plain list, and calls those: one put in their place would not run."""
    lists = [value for value in vars(module).values() if isinstance(value, (list, tuple))]
    return any(
        isinstance(item, nn.Module) and next(item.parameters(), None) is not None for own in lists for item in own
    )


def find_block_spec(
    block: nn.Module, order: list[str], residual_takers: set[str], attention_name: str
) -> BlockSpec | None:
    """The parts of a pre-norm block, or None for any other block.

    Args:
        block: The block.
        order: Its direct children in the order in which they ran.
        residual_takers: Children that were called with two tensors.
        attention_name: Name of the module with the projections, relative to the block.
    """
    attention = attention_name.split(".")[0]
    order = order[order.index(attention) - 1 :] if attention in order[1:] else []
    linears = [name for name in order if name != attention and _has_linear(getattr(block, name))]
    if not linears or order.count(attention) != 1:
        return None
    first, last = order.index(linears[0]), order.index(linears[-1])
    mlp = order[first : last + 1]
    if first < 3 or len(set(mlp)) < len(mlp) or attention in mlp or _has_linear(getattr(block, order[0])):
        return None
    if any(next(getattr(block, name).parameters(), None) is not None for name in set(mlp) - set(linears)):
        return None
    if any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(block).items()):
        return None  # dropout by a function (Whisper), which its modules do not show
    scales = [name for name, p in block.named_parameters(recurse=False) if p.ndim == 1]
    if len(scales) not in (0, 2):
        return None
    return BlockSpec(
        norm1=order[0],
        attention=attention,
        after_attention=(*scales[:1], *order[2 : first - 1]),
        norm2=order[first - 1],
        mlp=tuple(mlp),
        after_mlp=(*scales[1:], *order[last + 1 :]),
        mlp_adds_residual=mlp[-1] in residual_takers,
        block_inputs=input_names(block),
        attention_inputs=_keyword_names(getattr(block, attention)),
    )


def canonical_names_of(
    block: nn.Module, param_modules: tuple[str, ...], block_spec: BlockSpec | None, attention_name: str
) -> tuple[str, ...]:
    """The name of each of `param_modules` that does not depend on the model, such as `"attention.query"`."""
    return tuple(_canonical_name(block, name, param_modules, block_spec, attention_name) for name in param_modules)


def _canonical_name(
    block: nn.Module, name: str, param_modules: tuple[str, ...], block_spec: BlockSpec | None, attention_name: str
) -> str:
    if name.startswith(f"{attention_name}.") and name.split(".")[-1] in _PROJECTION_ROLES:
        return f"attention.{_PROJECTION_ROLES[name.split('.')[-1]]}"
    if block_spec is None:
        return name
    part, _, inner = name.partition(".")
    if part == block_spec.attention:
        others = [
            other
            for other in param_modules
            if other.startswith(f"{part}.")
            and other.split(".")[-1] not in _PROJECTION_ROLES
            and isinstance(block.get_submodule(other), nn.Linear)
        ]
        return "attention.output" if others == [name] else ".".join(filter(None, ("attention", inner)))
    names = {block_spec.norm1: "norm1", block_spec.norm2: "norm2"}
    names |= {scale: f"scale1.{i}" for i, scale in enumerate(block_spec.after_attention)}
    names |= {scale: f"scale2.{i}" for i, scale in enumerate(block_spec.after_mlp)}
    if part in block_spec.mlp:
        inside = [other for other in param_modules if other.split(".")[0] in block_spec.mlp]
        inside.sort(key=lambda other: block_spec.mlp.index(other.split(".")[0]))
        return f"mlp.{inside.index(name)}"
    return ".".join(filter(None, (names.get(part, part), inner)))


def takes_residual(args: tuple[object, ...]) -> bool:
    """Whether a module is called with two tensors of hidden states."""
    tensors = [value for value in args if isinstance(value, Tensor) and value.ndim == 3]
    return len(tensors) == 2


def apply_part(block: nn.Module, name: str, tokens: Tensor, *others: Tensor) -> Tensor:
    """Apply a part of the block: a module is called, a vector or number is a factor, None does nothing."""
    part: nn.Module | Tensor | float | None = getattr(block, name)
    if part is None:
        return tokens
    return part(tokens, *others) if isinstance(part, nn.Module) else part * tokens


def _keyword_names(module: nn.Module) -> tuple[str, ...] | None:
    return None if takes_any_keyword(module) else input_names(module)


def _has_all(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(hasattr(getattr(module, name, None), "in_features") for name in names)


def _has_linear(module: nn.Module) -> bool:
    return any(hasattr(m, "in_features") for m in module.modules())
