"""Possible kinds of an attention's side inputs, from its calls with images of two sizes."""

from __future__ import annotations

from torch import nn

from peft_bsr.backbones.inputs import probe_inputs, run_probe, tensors_of
from peft_bsr.backbones.registry import Arguments, Call, find_rule
from peft_bsr.backbones.side_inputs import input_names, named_inputs
from peft_bsr.core import Route, SideInput


class _AttentionSeen(Exception):  # noqa: N818  (a way out of a forward, not an error)
    """Stops the forward at the first attention."""


def possible_kinds(
    model: nn.Module,
    attention: nn.Module,
    call: Call,
    route: Route,
    image_shape: tuple[int, ...],
    grid: tuple[int, ...] | None,
) -> dict[str, tuple[SideInput, ...]]:
    """Kinds that each argument of the attention can have, most likely first; see `Route.gather`.

    A second image size shows which axes of length N are token axes: those that grow with the image. For models that
    take one size only, `check_permutation` tries the kinds that the shapes allow.

    Args:
        model: The model, inside `quiet`.
        attention: Its first attention.
        call: Arguments of this attention for an image of `image_shape`.
        route: Route of that forward.
        image_shape: Shape of the image without the batch.
        grid: Its patch grid (.., rows, columns), or None.

    Returns:
        Kinds by name of the argument, without arguments that have no tensors. Empty for families that gather side
        inputs by a rule of their own.
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


def _tensors(names: tuple[str, ...], call: Call) -> Arguments:
    """The arguments that contain tensors, by name, without the hidden states."""
    named = named_inputs(names, *call)
    return {name: value for name, value in named.items() if name != "hidden_states" and tensors_of(value)}


def _first_call(model: nn.Module, attention: nn.Module, image_shape: tuple[int, ...]) -> Call | None:
    """Arguments of the attention for an image of that shape; None if the model does not take it."""
    seen: list[Call] = []

    def stop(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.append((args, dict(kwargs)))
        raise _AttentionSeen

    handle = attention.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run_probe(model, probe_inputs(model, 1, image_shape))
    except _AttentionSeen:
        return seen[0]
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError):
        pass  # the model takes images of one size only
    finally:
        handle.remove()
    return None


__all__ = ["possible_kinds"]
