"""The permutation test: dropping tokens is exact only if a block treats patches alike wherever they stand.

Or where side inputs (position tables, biases, masks) tell it where they stand, which then follow the kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones.inputs import tensors_of, tolerance
from peft_bsr.backbones.registry import find_rule
from peft_bsr.backbones.side_inputs import SideInputHooks
from peft_bsr.core import BlockCall, ForwardContext, Route, SideInput, is_quantized
from peft_bsr.errors import UnsupportedModelError


def check_permutation(
    model: nn.Module,
    block: nn.Module,
    attention_name: str,
    hidden: Tensor,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    route: Route,
    kinds: Mapping[str, tuple[SideInput, ...]],
) -> tuple[bool, dict[str, SideInput]]:
    """Swap patches and see whether the block's output is swapped alike.

    Args:
        model: For its family's exceptions.
        block: The block to run.
        attention_name: Its attention.
        hidden: Tokens [1, N, D] that it was called with.
        call: The other arguments it was called with.
        route: Which of them are patches.
        kinds: What each argument of its attention can be, the likeliest first.

    Returns:
        Whether it takes side inputs (swapped as well) for it to be so, and what each of them is: where several kinds
        are possible, the first with which it is so.

    Raises:
        UnsupportedModelError: If the block uses positions that no side input tells it.
    """
    with no_zero_tables(block):
        return _find_kinds(model, block, attention_name, hidden, call, route, kinds)


def _find_kinds(
    model: nn.Module,
    block: nn.Module,
    attention_name: str,
    hidden: Tensor,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    route: Route,
    possible: Mapping[str, tuple[SideInput, ...]],
) -> tuple[bool, dict[str, SideInput]]:
    args, kwargs = call
    order = torch.randperm(route.num_patches, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    shuffled = Route(route.num_prefix, route.num_patches, route.num_suffix, origins=order[None])
    places = shuffled.places()[0]
    attention = block.get_submodule(attention_name)

    def changes(tokens: Tensor) -> list[Tensor]:
        """What the attention and the whole block make of the tokens: [attention's output, block's change]."""
        seen: list[Tensor] = []
        handle = attention.register_forward_hook(lambda _m, _a, output: seen.append(tensors_of(output)[0]))
        try:
            output = tensors_of(block(tokens, *args, **kwargs))[0]
        finally:
            handle.remove()
        return [seen[0], output - tokens]

    expected = [change[:, places] for change in changes(hidden)]
    scales = [expected[0].abs().max(), hidden.abs().max()]

    def error() -> float:
        """Largest difference, in units of what is beyond tolerance: over 1 is too much."""
        found = changes(hidden[:, places])
        return max(excess(*pair) for pair in zip(found, expected, scales, strict=True))

    raw = error()
    choices = [dict(zip(possible, kinds, strict=True)) for kinds in product(*possible.values())]
    if raw <= 1:
        return False, choices[0]
    rule, context = find_rule(model), ForwardContext()
    context.now.running = BlockCall(shuffled)

    def failure(kinds: Mapping[str, SideInput]) -> str | None:
        """What goes wrong if the arguments are of these kinds, or None."""
        side_input_hooks = SideInputHooks(context, rule, kinds)
        side_input_hooks.attach(block, attention_name)
        try:
            followed = error()
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as raised:
            return f"), and with position tables, biases and masks swapped alike they fail with {raised!r}"
        finally:
            side_input_hooks.detach(block, attention_name)
        if followed <= 1:
            return None
        return (
            f" by {raw:.0f} times the tolerance, {followed:.0f} times with position tables, biases and masks swapped "
            "alike), so what they compute on fewer tokens is not known"
        )

    likeliest = failure(choices[0])
    if likeliest is None:
        return True, choices[0]
    for kinds in choices[1:]:
        if failure(kinds) is None:
            return True, kinds
    raise UnsupportedModelError(
        f"its blocks use the position of a token inside (swapping patches changes what they compute{likeliest}"
    )


@contextmanager
def no_zero_tables(block: nn.Module) -> Iterator[None]:
    """Fill matrices of zeros with random numbers for a while: a fresh table of biases would hide what it does."""
    zeros = [p for p in block.parameters() if p.ndim >= 2 and not is_quantized(p) and not p.any()]
    originals = [p.data for p in zeros]
    for parameter in zeros:
        parameter.data = torch.randn_like(parameter)
    try:
        yield
    finally:
        for parameter, original in zip(zeros, originals, strict=True):
            parameter.data = original


def excess(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest difference over what may be: a small part of how much tokens differ, or rounding at `scale`.

    Measured against the spread over tokens, because where weights are small (a fresh model, a LayerScale of 1e-5)
    tokens hardly change each other, and a comparison with the values themselves would pass whatever blocks do.
    """
    spread = (expected - expected.mean(dim=1, keepdim=True)).abs().max()
    allowed = torch.maximum(tolerance(found.dtype) * spread, 16 * torch.finfo(found.dtype).eps * scale)
    return float((found - expected).abs().max() / allowed.clamp_min(torch.finfo(found.dtype).tiny))
