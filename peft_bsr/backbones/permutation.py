"""The permutation test: dropping tokens is exact only if a block does not use the positions of its patches.

Or if it gets them from side inputs (position tables, biases, masks), which can be gathered for the kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn

from peft_bsr.backbones.inputs import tensors_of, tolerance
from peft_bsr.backbones.registry import Call, find_rule
from peft_bsr.backbones.side_inputs import SideInputHooks
from peft_bsr.core import BlockCall, ForwardContext, Route, SideInput, is_quantized
from peft_bsr.errors import UnsupportedModelError


def check_permutation(
    model: nn.Module,
    block: nn.Module,
    attention_name: str,
    hidden: Tensor,
    call: Call,
    route: Route,
    kinds: Mapping[str, tuple[SideInput, ...]],
) -> tuple[bool, dict[str, SideInput]]:
    """Permute the patches and check that the block's output is permuted in the same way.

    Args:
        model: The model, to look up its family.
        block: The block to run.
        attention_name: Name of its attention, relative to the block.
        hidden: Its hidden states [1, N, D].
        call: Its other arguments.
        route: Tells which tokens are patches.
        kinds: Kinds that each argument of its attention can have, most likely first.

    Returns:
        Whether this holds only if side inputs are permuted too, and the kind of each side input: the first with which
        it holds.

    Raises:
        UnsupportedModelError: If the block uses positions that it does not get from a side input.
    """
    with no_zero_tables(block):
        return _find_kinds(model, block, attention_name, hidden, call, route, kinds)


def _find_kinds(
    model: nn.Module,
    block: nn.Module,
    attention_name: str,
    hidden: Tensor,
    call: Call,
    route: Route,
    possible: Mapping[str, tuple[SideInput, ...]],
) -> tuple[bool, dict[str, SideInput]]:
    args, kwargs = call
    order = torch.randperm(route.num_patches, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    shuffled = Route(route.num_prefix, route.num_patches, route.num_suffix, origins=order[None])
    places = shuffled.places()[0]
    attention = block.get_submodule(attention_name)

    def changes(tokens: Tensor) -> list[Tensor]:
        """[output of the attention, change of the tokens by the block]."""
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
        """Largest difference as a multiple of the tolerance."""
        found = changes(hidden[:, places])
        return max(excess(*pair) for pair in zip(found, expected, scales, strict=True))

    raw = error()
    choices = [dict(zip(possible, kinds, strict=True)) for kinds in product(*possible.values())]
    if raw <= 1:
        return False, choices[0]
    rule, context = find_rule(model), ForwardContext()
    context.now.running = BlockCall(shuffled)

    def failure(kinds: Mapping[str, SideInput]) -> str | None:
        """The failure with arguments of these kinds, or None."""
        side_input_hooks = SideInputHooks(context, rule, kinds)
        side_input_hooks.attach(block, attention_name)
        try:
            gathered = error()
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as raised:
            return f"), and if position tables, biases and masks are swapped too, they fail with {raised!r}"
        finally:
            side_input_hooks.detach(block, attention_name)
        if gathered <= 1:
            return None
        return (
            f" by {raw:.0f} times the tolerance, {gathered:.0f} times if position tables, biases and masks are swapped "
            "too), so they cannot run on fewer tokens"
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
    """Context manager: matrices of zeros hold random numbers. A new bias table of zeros would hide its effect."""
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
    """The largest difference as a multiple of the tolerance: a small fraction of the spread, or rounding at `scale`.

    The spread is that over tokens. If weights are small (a new model, a LayerScale of 1e-5), tokens hardly change each
    other, and a comparison with the values themselves would pass for any block.
    """
    spread = (expected - expected.mean(dim=1, keepdim=True)).abs().max()
    allowed = torch.maximum(tolerance(found.dtype) * spread, 16 * torch.finfo(found.dtype).eps * scale)
    return float((found - expected).abs().max() / allowed.clamp_min(torch.finfo(found.dtype).tiny))
