"""The vision model inside a larger one: found by name or by itself, and probed as the larger model reads it.

What the larger model reads is the image features that it computes from the part: LLaVA the patches after the last block
but one, PaliGemma the patches after the final norm, CLIP the class token. Settings of the larger model are never read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_bsr.backbones.inputs import in_mode, main_input, needs_part, tensors_of, vision_parts
from peft_bsr.backbones.registry import vision_config
from peft_bsr.compat.torch_api import share_contents
from peft_bsr.errors import ConfigError

_FEATURES = "get_image_features"  # the method of transformers' models that take images and text
_LISTS = ("idefics2_vision", "idefics3_vision", "smolvlm_vision")  # these models take several images per text
_INPUTS = ("pixel_values", "input_values", "input_features")


class VisionPart(nn.Module):
    """A part of a larger model under the part's own names; its forward gives what the larger model reads of it.

    Modules, parameters and buffers are those of the part. Outputs are the larger model's `get_image_features`; without
    this method, all tensors that the part returns. Each is flattened to [tokens or images, channels], so that losing a
    token changes its shape.

    Args:
        model: The larger model.
        name: Name of the part.
    """

    def __new__(cls, model: nn.Module, name: str) -> VisionPart:
        """Messages name the class of the part."""
        return super().__new__(type(type(model.get_submodule(name)).__name__, (cls,), {}))

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        part: PreTrainedModel = model.get_submodule(name)
        share_contents(self, part)
        self.training = part.training
        self.config = getattr(part, "config", None)
        taken = inspect.signature(part.forward).parameters
        own = [main_input(part), *_INPUTS]
        self.main_input_name = next((name for name in own if name in taken), "pixel_values")
        # in tuples, so that they are not registered as children
        self.around, self.part = (model,), (part,)
        self.reader = getattr(model, _FEATURES, None)

    def forward(self, **inputs: Any) -> tuple[Tensor, ...]:
        """What the larger model reads of the part, in evaluation mode."""
        with in_mode(False, *self.around):
            read = self.reader
            if read is None or not _takes(read, inputs):
                outputs = self._own_outputs(inputs)
            else:
                if getattr(vision_config(self), "model_type", None) in _LISTS:
                    inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}
                outputs = read(**inputs)
                features = getattr(outputs, "pooler_output", None)
                outputs = outputs if features is None else features
        return tuple(tensor.flatten(0, -2) for tensor in tensors_of(outputs))

    def _own_outputs(self, inputs: dict[str, Any]) -> object:
        """Outputs of the part by itself: the hidden states that the larger model selects, or all."""
        (part,), (model,) = self.part, self.around
        layer = getattr(getattr(model, "config", None), "vision_feature_layer", None)
        if not isinstance(layer, int):
            return part(**inputs)
        return part(**inputs, output_hidden_states=True).hidden_states[layer]


def find_part(model: nn.Module, part: str | None) -> str | None:
    """Name of the part in which an adapter looks for its blocks; None = the model itself.

    Args:
        model: The model.
        part: The name that was asked for. None = the vision model inside a model of transformers, if an image alone
            does not run it and there is exactly one.

    Raises:
        ConfigError: If there is no module of that name, or if there are several vision models and none was named.
    """
    found = vision_parts(model) if part is not None or needs_part(model) else []
    kind = type(model).__name__
    if part is None:
        if len(found) > 1:
            raise ConfigError(
                f"{kind} has {len(found)} vision models: {_listed(found)}. Name the one to adapt, for example "
                f"`part={found[0]!r}`."
            )
        return found[0] if found and isinstance(model, PreTrainedModel) else None  # others may have heads that are new
    names = [name for name, _ in model.named_modules()]
    if part not in names:
        near = get_close_matches(part, names, n=3, cutoff=0.6)
        near += [name for name in names if name and name.rpartition(".")[2] == part.rpartition(".")[2]][:3]
        hint = f"Near names: {_listed(dict.fromkeys(near))}. " if near else ""
        is_one = f"Its vision models: {_listed(found)}." if found else "It has no vision model inside."
        raise ConfigError(f"`part={part!r}`: {kind} has no module of that name. {hint}{is_one}")
    return part or None


def view_of(model: nn.Module, part: str | None) -> nn.Module:
    """The part as the larger model reads it, or the model itself for None."""
    return model if part is None else VisionPart(model, part)


def _takes(read: Callable[..., object], inputs: dict[str, Any]) -> bool:
    """Whether the method runs on these inputs alone."""
    taken = inspect.signature(read).parameters.values()
    named = {p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    needed = {p.name for p in taken if p.name in named and p.default is p.empty}
    return needed <= inputs.keys() <= named


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


__all__ = ["VisionPart", "find_part", "view_of"]
