"""Finds a model's classifier and final norm, for methods that replace the classifier by heads of their own."""

from __future__ import annotations

from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec, VisionPart, probe_inputs, quiet, run_probe
from peft_bsr.errors import UnsupportedModelError


def find_classifier(model: nn.Module, spec: ModelSpec, subject: str) -> str:
    """Name of the Linear module whose output is the model's logits [B, classes].

    Args:
        model: The model.
        spec: Description of the model.
        subject: Subject and verb of the error, such as "the heads of `tasks` take".

    Raises:
        UnsupportedModelError: If no single Linear gives the logits, or if the model is a part of a larger one.
    """
    if isinstance(model, VisionPart):
        raise UnsupportedModelError(
            f"{type(model).__name__}: {subject} the place of the classifier, but a part of a larger model has no "
            "classifier. Use BSR, ALaST or LoSA, without `tasks`."
        )
    linears = [name for name in spec.head if isinstance(without_layer(model.get_submodule(name)), nn.Linear)]
    outputs: dict[str, list[Tensor]] = {name: [] for name in linears}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, output, name=name: outputs[name].append(output))
        for name in linears
    ]
    try:
        with quiet(model):
            logits = getattr(run_probe(model, probe_inputs(model, 1, spec.image_shape)), "logits", None)
    finally:
        for handle in handles:
            handle.remove()
    is_flat = isinstance(logits, Tensor) and logits.ndim == 2
    found = [name for name, seen in outputs.items() if is_flat and len(seen) == 1 and seen[0] is logits]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {subject} the place of the classifier, but none of {linears} gives "
            "the model's `logits` [images, classes] by itself. Load the model with one classifier, for example by "
            "`AutoModelForImageClassification.from_pretrained(..., num_labels=10)`, or add one with "
            "`peft_bsr.with_head(model, num_labels=10)`."
        )
    return found[0]


def find_final_norm(model: nn.Module, spec: ModelSpec) -> nn.LayerNorm | None:
    """The LayerNorm after the last block, or None."""
    norms = [without_layer(model.get_submodule(name)) for name in spec.head]
    return next((m for m in norms if isinstance(m, nn.LayerNorm) and m.normalized_shape == (spec.width,)), None)


def without_layer(module: nn.Module) -> nn.Module:
    """The base layer of a tuner layer; any other module is returned unchanged."""
    own: nn.Module = getattr(module, "base_layer", module)
    return own
