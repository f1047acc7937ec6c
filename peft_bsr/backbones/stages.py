"""The blocks of a model in which no token can be dropped: stages, windows, grids, convolutions between the blocks.

Cutting the gradient, training blocks and lean MLPs need none of that. Blocks are the children of innermost lists of one
class, each with one attention, in the order in which they run. If there are none such, each has several attentions, or
a norm and two Linears.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from peft_bsr.backbones.block_spec import attention_names, canonical_names_of
from peft_bsr.backbones.model_spec import StageBlock


def find_stage_blocks(model: nn.Module) -> dict[str, str]:
    """Name of each block -> name of its attention relative to it, or `""`; empty if there are no blocks.

    Where lists are of several classes (a decoder next to an encoder), those of the class with the most blocks count.
    """
    for find in (_one_attention, _several_attentions, _mlp_alone):
        found: dict[type, dict[str, str]] = {}
        for name, blocks in _innermost_lists(model):
            attentions = [find(block) for block in blocks]
            if len({type(block) for block in blocks}) == 1 and None not in attentions:
                own = {f"{name}.{i}": str(attention) for i, attention in enumerate(attentions)}
                found.setdefault(type(blocks[0]), {}).update(own)
        if found:
            return max(found.values(), key=len)
    return {}


def find_stages(blocks: list[str], widths: list[int]) -> list[int]:
    """Number of each block's stage, from 1: a new list of blocks, or other channels of their outputs."""
    stages: list[int] = []
    for index, (name, width) in enumerate(zip(blocks, widths, strict=True)):
        own = name.rpartition(".")[0], width
        is_new = index > 0 and own != (blocks[index - 1].rpartition(".")[0], widths[index - 1])
        stages.append(stages[-1] + is_new if stages else 1)
    return stages


def describe_stage_block(
    block: nn.Module, order: list[str], attention: str, ran: set[nn.Module], output: object, before: tuple[str, ...]
) -> StageBlock:
    """A block's parts, as one of the first stage.

    Args:
        block: The block.
        order: Its direct children in the order in which they ran.
        attention: Name of an attention relative to it, or `""`.
        ran: The modules that were called.
        output: What it gave.
        before: Modules with parameters that ran between the block before and this one.
    """
    tokens = output[0] if isinstance(output, tuple) else output
    assert isinstance(tokens, Tensor), "looked at before"
    if attention:
        *others, attention = sorted(attention_names(block), key=lambda name: order.index(name.split(".")[0]))
    norm, mlp = _find_mlp_half(block, order, attention.split(".")[0])
    leaves = tuple(_leaves(block, ran))
    found = StageBlock(
        stage=1,
        width=channels_of(block, norm, mlp, tokens),
        attention=attention,
        norm=norm,
        mlp=mlp,
        param_modules=leaves,
        canonical_names=leaves,
        shapes=tuple(tuple(p.shape) for p in block.parameters()),
        num_outputs=len(output) if isinstance(output, tuple) else 0,
        before=before,
        other_attentions=tuple(others) if attention else (),
    )
    names = canonical_names_of(block, leaves, found.block_spec, attention) if attention else leaves
    return replace(found, canonical_names=names if len(set(names)) == len(names) else leaves)


def channels_of(block: nn.Module, norm: str, mlp: tuple[str, ...], tokens: Tensor) -> int:
    """Channels of a block's output: its MLP's, or those of its last axis."""
    linears = [m for name in mlp for m in getattr(block, name).modules() if hasattr(m, "out_features")]
    widths = [int(m.out_features) for m in linears if m.out_features in tokens.shape[1:]]
    return widths[-1] if widths else tokens.shape[-1]


def frozen_parameters(block: nn.Module, param_modules: tuple[str, ...]) -> list[str]:
    """Names of the block's parameters that no module of its own with nothing but parameters holds."""
    inside = tuple(f"{name}." for name in param_modules)
    return [name for name, _ in block.named_parameters() if not name.startswith(inside)]


def _innermost_lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Lists of modules that hold no list of blocks themselves."""
    for name, module in model.named_modules():
        children = list(module.children())
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 0
        if is_list and not any(_holds_blocks(child) for child in children):
            yield name, children


def _holds_blocks(module: nn.Module) -> bool:
    lists = [m for m in module.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    return any(_one_attention(child) is not None or _mlp_alone(child) is not None for m in lists for child in m)


def _one_attention(block: nn.Module) -> str | None:
    found = attention_names(block)
    return found[0] if len(found) == 1 and "." not in found[0].partition(".")[2] else None


def _several_attentions(block: nn.Module) -> str | None:
    """One of the attentions of a block that has several, such as over time and over space."""
    found = [name for name in attention_names(block) if "." not in name.partition(".")[2]]
    return found[-1] if len(found) > 1 else None


def _mlp_alone(block: nn.Module) -> str | None:
    """`""` for a block without attention, of a norm and at least two Linears among other children."""
    children = list(block.children())
    linears = [m for m in block.modules() if hasattr(m, "in_features")]
    norms = [m for m in children if type(m).__name__.endswith("Norm")]
    return "" if norms and len(linears) >= 2 and len(children) > 3 and not attention_names(block) else None


def _find_mlp_half(block: nn.Module, order: list[str], attention: str) -> tuple[str, tuple[str, ...]]:
    """Names of the norm before the MLP, or `""`, and of the children from the MLP's first Linear to its last."""
    start = order.index(attention) + 1 if attention in order else 0
    after, before = order[start:], order[: max(0, start - 1)]
    linears = [i for i, name in enumerate(after) if any(hasattr(m, "in_features") for m in _modules(block, name))]
    if not linears or len(set(after[linears[0] : linears[-1] + 1])) != linears[-1] + 1 - linears[0]:
        return "", ()
    mlp = tuple(after[linears[0] : linears[-1] + 1])
    norm = after[linears[0] - 1] if linears[0] else ""
    is_post_norm = start > 0 and not any(_is_norm(block, name) for name in before)  # the residual has the norm's output
    is_own = bool(norm) and order.count(norm) == 1 and _is_norm(block, norm) and not is_post_norm
    return norm if is_own else "", mlp


def _is_norm(block: nn.Module, name: str) -> bool:
    return type(getattr(block, name)).__name__.endswith("Norm")


def _modules(block: nn.Module, name: str) -> Iterator[nn.Module]:
    child: nn.Module = getattr(block, name)
    return child.modules()


def _leaves(block: nn.Module, ran: set[nn.Module]) -> list[str]:
    """Modules with parameters and no module with parameters inside.

    A module that is not called, because the one around it reads its weights (WavLM), would train without effect: it is
    part of the next one around it that is called.
    """
    found: dict[str, None] = {}
    for name, module in block.named_modules():
        has_own = next(module.parameters(recurse=False), None) is not None
        if name and has_own and not any(next(child.parameters(), None) is not None for child in module.children()):
            while name and block.get_submodule(name) not in ran:
                name = name.rpartition(".")[0]
            found |= dict.fromkeys(filter(None, [name]))
    return [name for name in found if not found.keys() & _around(name)]


def _around(name: str) -> set[str]:
    """Names of the modules around one."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


__all__ = ["describe_stage_block", "find_stage_blocks", "find_stages", "frozen_parameters"]
