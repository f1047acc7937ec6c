"""What must agree between two models before one can use adapters or cached features of the other."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_bsr.backbones.model_spec import ModelSpec
from peft_bsr.backbones.probe import probe_model
from peft_bsr.backbones.registry import vision_config

Plain = str | int | float | list[int] | None
_SAMPLED = 16  # values per parameter
_DIGESTED = (torch.float32, torch.bfloat16, torch.float64)
_EPS = ("eps", "variance_epsilon")
_POSITIONS = re.compile(r"position|pos_embed")  # tables that depend on the image size
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


@dataclass(frozen=True)
class Fingerprint:
    """Architecture of a model's blocks, as plain values. Weights, head, dtype and image size are not part of it.

    A value that is not known for a model is None and agrees with every value.

    Attributes:
        family: `model_type` of the configuration from which the blocks are built; without one, a block's class name.
        depth: Number of blocks.
        width: Embedding dimension.
        heads: Number of attention heads.
        mlp: Largest number of output features of a block's Linear modules outside its attention.
        patch: (height, width) of a patch in pixels.
        prefix: Number of special tokens before the patches.
        suffix: Number of special tokens after the patches.
        activation: Activation function of the MLP.
        eps: Epsilon of the blocks' norms.
        rope: Base (theta) of the rotary position embeddings.

    Examples:
        >>> a = Fingerprint("vit", 12, 768, 12, 3072, (16, 16), 1, 0, "gelu", 1e-12, None)
        >>> b = Fingerprint("vit", 6, 768, 12, 3072, (16, 16), 1, 0, "gelu", 1e-12, None)
        >>> a.differences(b)
        ['depth 12 instead of 6']
        >>> Fingerprint.from_dict(a.to_dict()) == a
        True
    """

    family: str | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp: int | None = None
    patch: tuple[int, ...] | None = None
    prefix: int | None = None
    suffix: int | None = None
    activation: str | None = None
    eps: float | None = None
    rope: float | None = None

    @classmethod
    def of(cls, model: nn.Module, spec: ModelSpec | None = None) -> Fingerprint:
        """The fingerprint of `model`.

        Args:
            model: A vision transformer, with or without adapters.
            spec: Description of the model. Default None: the model is probed.

        Raises:
            UnsupportedModelError: If the model is probed and not supported.
        """
        model = _base_of(model)
        spec = probe_model(model) if spec is None else spec
        config = vision_config(model)
        block = model.get_submodule(spec.blocks[0])
        param_modules = {name: _own(block.get_submodule(name)) for name in spec.param_modules}
        outside = [m for name, m in param_modules.items() if not f"{name}.".startswith(f"{spec.attention}.")]
        widths = [width for m in outside if isinstance(width := getattr(m, "out_features", None), int)]
        eps = [
            value for m in param_modules.values() for name in _EPS if isinstance(value := getattr(m, name, None), float)
        ]
        is_image = spec.grid is not None and len(spec.grid) == 2 and len(spec.image_shape) == 3
        return cls(
            family=getattr(config, "model_type", None) or type(block).__name__,
            depth=spec.depth,
            width=spec.width,
            heads=_number(config, "num_attention_heads") or spec.num_heads or None,
            mlp=max(widths, default=None),
            patch=spec.patch_size if is_image else None,
            prefix=spec.num_prefix,
            suffix=spec.num_suffix,
            activation=next((v for name in _ACTIVATIONS if isinstance(v := getattr(config, name, None), str)), None),
            eps=eps[0] if eps else None,
            rope=_rope_base(config),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Plain]) -> Fingerprint:
        """From the result of `to_dict`. Unknown names are ignored."""
        known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(cls)}
        patch = known["patch"]
        return cls(**known | {"patch": tuple(patch) if isinstance(patch, list) else None})

    def to_dict(self) -> dict[str, Plain]:
        """The values by name, ready for JSON."""
        values: dict[str, Plain] = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"patch": None if self.patch is None else list(self.patch)}

    def differences(self, other: Fingerprint) -> list[str]:
        """Descriptions of the differences, with this fingerprint's value first. Empty if the two agree."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return [f"{name} {a!r} instead of {b!r}" for name, a, b in pairs if None not in (a, b) and a != b]


def fingerprint(model: nn.Module, spec: ModelSpec | None = None) -> dict[str, Plain]:
    """`Fingerprint.of`, as plain values by name.

    Args:
        model: A vision transformer, with or without adapters.
        spec: Description of the model. Default None: the model is probed.

    Examples:
        >>> from transformers import ViTConfig, ViTModel
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> fingerprint(ViTModel(tiny))["depth"]
        2
    """
    return Fingerprint.of(model, spec).to_dict()


@torch.no_grad()
def weights_digest(model: nn.Module, spec: ModelSpec, apart: Sequence[str] = ()) -> str | None:
    """A digest of the embeddings and blocks of a model without adapters: 16 evenly spaced values of each parameter.

    It tells two checkpoints apart, but not one checkpoint in float32, bfloat16 and float64: values are compared in
    bfloat16. It misses changes between the sampled values. Module names do not matter, so another layout of the same
    model has the same digest. Cost: one small copy per parameter.

    Args:
        model: The model.
        spec: Description of the model. Its head and its position tables, which depend on the image size, do not count.
        apart: Names, or dotted parts of names, of further modules that do not count.

    Returns:
        32 hexadecimal digits, or None if weights are missing (meta, sharded), quantized, or in float16, which rounds
        differently.
    """
    head = tuple(f"{name}." for name in (*spec.head, *spec.unread))
    named = {n: p for n, p in model.named_parameters() if not (f"{n}.".startswith(head) or _POSITIONS.search(n))}
    weights = {n: p for n, p in named.items() if not any(f".{part}." in f".{n}." for part in apart)}
    if any(type(p.data) is not Tensor or p.is_meta or p.dtype not in _DIGESTED for p in weights.values()):
        return None
    samples = [_sample(weight.detach()) for weight in weights.values()]
    parts = sorted(hashlib.blake2b(sample.view(torch.uint8).numpy().data).digest() for sample in samples)
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _sample(weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].to(torch.bfloat16).contiguous().cpu()


def _base_of(model: nn.Module) -> nn.Module:
    base: PreTrainedModel = model
    return base.get_base_model() if hasattr(model, "get_base_model") else base


def _own(module: nn.Module) -> nn.Module:
    own: nn.Module = getattr(module, "base_layer", module)
    return own


def _number(config: PreTrainedConfig | None, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _rope_base(config: PreTrainedConfig | None) -> float | None:
    parameters = getattr(config, "rope_parameters", None)
    base = (parameters or {}).get("rope_theta") if isinstance(parameters, dict) else None
    base = getattr(config, "rope_theta", None) if base is None else base
    return float(base) if isinstance(base, (int, float)) else None


__all__ = ["Fingerprint", "fingerprint", "weights_digest"]
