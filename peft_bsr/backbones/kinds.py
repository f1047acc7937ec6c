"""What an attention gets next to the hidden states, told apart by two images of different size."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_bsr.backbones.inputs import probe_inputs, run_probe, tensors_of
from peft_bsr.backbones.registry import find_rule
from peft_bsr.backbones.side_inputs import input_names, named_inputs
from peft_bsr.core import Route, SideInput

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _AttentionSeen(Exception):  # noqa: N818  (a way out of a forward, not an error)
    """Leaves the forward at the first attention."""


def possible_kinds(
    model: nn.Module,
    attention: nn.Module,
    call: Call,
    route: Route,
    image_shape: tuple[int, ...],
    grid: tuple[int, ...] | None,
) -> dict[str, tuple[SideInput, ...]]:
    """What each argument of the attention can be, the likeliest first; see `Route.gather`.

    What an axis of N at one size means, a second size tells, if the model takes one: an axis that grows with the image
    has a place for each token. Of models of one size, what a shape leaves open is tried, see `check_permutation`.

    Args:
        model: The model, inside `quiet`.
        attention: Its first.
        call: What this was called with for an image of `image_shape`.
        route: Of that forward.
        image_shape: Without the batch.
        grid: Its patches: (.., rows, columns), or None.

    Returns:
        Nothing for arguments without tensors, and for families that say by themselves what follows.
    """
    if find_rule(model).gather_side_inputs is not None:
        return {}
    names = input_names(attention)
    found = {name: route.readings(value) for name, value in _tensors(names, call).items()}
    if all(kinds == ("other",) for kinds in found.values()) or grid is None or find_rule(model).probe_inputs:
        return found
    larger = Route(route.num_prefix, route.num_patches // grid[-2] * (grid[-2] + 1), route.num_suffix)
    step = image_shape[-2] // grid[-2]
    again = _first_call(model, attention, (*image_shape[:-2], image_shape[-2] + step, image_shape[-1]))
    others = {} if again is None else _tensors(names, again)
    for name in found.keys() & others.keys():
        same = larger.readings(others[name])
        found[name] = tuple(kind for kind in found[name] if kind in same) or ("other",)
    return found


def _tensors(names: tuple[str, ...], call: Call) -> dict[str, Any]:
    """The arguments that hold tensors, by name, without the hidden states."""
    named = named_inputs(names, *call)
    return {name: value for name, value in named.items() if name != "hidden_states" and tensors_of(value)}


def _first_call(model: nn.Module, attention: nn.Module, image_shape: tuple[int, ...]) -> Call | None:
    """What the attention is called with for an image of that shape; None where the model takes none."""
    seen: list[Call] = []

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, dict(kwargs)))
        raise _AttentionSeen

    handle = attention.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        run_probe(model, probe_inputs(model, 1, image_shape))
    except _AttentionSeen:
        return seen[0]
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError):
        pass  # it takes images of one size only
    finally:
        handle.remove()
    return None


__all__ = ["possible_kinds"]
