"""Weights that are to be loaded into an attached adapter: exactly its own, and numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_bsr.errors import AdapterFileError

_NAMED = 3  # of the tensors that share a problem


def check_loaded(
    adapter_name: str, own: dict[str, nn.Parameter], known: set[str], state_dict: dict[str, Tensor]
) -> None:
    """Compare what a file holds with what the adapter has, before anything is copied.

    Args:
        adapter_name: Name of the adapter.
        own: Its parameters, all of which the file must have.
        known: Every key of the model's state dict: the file must not have others.
        state_dict: What the file holds, under the model's names.

    Raises:
        AdapterFileError: Naming tensors that are missing, unknown, of another shape, or not finite.
    """
    shapes = {name: (tuple(state_dict[name].shape), tuple(p.shape)) for name, p in own.items() if name in state_dict}
    broken = {n for n, t in state_dict.items() if t.is_floating_point() and not bool(t.isfinite().all())}
    problems = [
        *_problem(own.keys() - state_dict.keys(), "are missing in the file"),
        *_problem(state_dict.keys() - known, "are in the file, but not in this adapter"),
        *_problem({f"{n} {a} instead of {b}" for n, (a, b) in shapes.items() if a != b}, "have another shape"),
        *_problem(broken, "are NaN or infinite"),
    ]
    if problems:
        problems[-1] += (
            " The file is damaged, or of another model or configuration; nothing of it was loaded. Load it on the "
            "model that it was trained on, or take another checkpoint."
        )
        raise AdapterFileError.from_problems(f"Adapter {adapter_name!r}", problems)


def take_back(model: Any, adapter_name: str, asked: dict[str, bool]) -> None:
    """Take off an adapter whose weights could not be loaded.

    Args:
        model: The PeftModel that carries it.
        adapter_name: Its name.
        asked: Parameter of the base model -> whether it asked for gradients before the first adapter came.
    """
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    base = model.base_model.unload()
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(asked.get(name, parameter.requires_grad))


def _problem(names: Any, what: str) -> list[str]:
    found = sorted(names)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return [f"{', '.join(found[:_NAMED])}{more} {what}."] if found else []


__all__ = ["check_loaded", "take_back"]
