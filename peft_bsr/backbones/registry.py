"""Registry of exceptions for model families that probing cannot find.

See docs/new_model.md for when a model needs an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from peft_bsr.core import Route
from peft_bsr.deprecation import warn_renamed
from peft_bsr.errors import ConfigError

Arguments = dict[str, Any]
"""Arguments of a module's forward by name."""
Call = tuple[tuple[Any, ...], Arguments]
"""Positional and keyword arguments of a module's forward."""
_Config = TypeVar("_Config")  # a configuration or None


@dataclass(frozen=True)
class FamilyRule:
    """Exceptions of one model family.

    Attributes:
        probe_inputs: `(config, batch_size, generator) -> inputs`: random inputs for one forward. Default None: images,
            videos or spectrograms of the shape in the config.
        gather_side_inputs: `(route, arguments) -> arguments`: selects the alive tokens' part of the attention's
            arguments (by name, without the hidden states). Default None: `Route.gather` on each argument with the
            kind that the probe found.
        position_bias: Name of a module in the block or its attention that returns a bias [.., N, N] for all tokens. Its
            `dim_size` is set to the full length; inside an attention, its output is gathered by the route. Default
            None: there is no such module.
        attention_arguments: `(block, hidden_states, arguments) -> arguments`: how a block computes its attention's
            arguments from its own. Default None: it passes arguments of the same name.

    Examples:
        >>> rule = FamilyRule(gather_side_inputs=lambda route, arguments: {**arguments, "ids": route.origins})
        >>> register_family("my_model", rule)
        >>> unregister_family("my_model")
    """

    probe_inputs: Callable[[PreTrainedConfig, int, torch.Generator], dict[str, Tensor]] | None = None
    gather_side_inputs: Callable[[Route, Arguments], Arguments] | None = None
    position_bias: str | None = None
    attention_arguments: Callable[[nn.Module, Tensor, Arguments], Arguments] | None = None
    follow_attention: InitVar[Callable[[Route, Arguments], Arguments] | None] = None
    """Old name of `gather_side_inputs`."""

    def __post_init__(self, follow_attention: Callable[[Route, Arguments], Arguments] | None) -> None:
        if follow_attention is not None:
            warn_renamed("FamilyRule(follow_attention)", "gather_side_inputs", stacklevel=4)
            object.__setattr__(self, "gather_side_inputs", follow_attention)


_RULES: dict[str, FamilyRule] = {}


def register_family(model_type: str, rule: FamilyRule) -> None:
    """Add the exceptions of a family.

    Args:
        model_type: The `model_type` of the vision model's config.
        rule: The exceptions.

    Raises:
        ConfigError: If the family already has an entry. Remove it with `unregister_family`.
    """
    if model_type in _RULES:
        raise ConfigError(f"{model_type!r} has an entry already: {_RULES[model_type]}. Call unregister_family first.")
    _RULES[model_type] = rule


def unregister_family(model_type: str) -> None:
    """Remove the entry of a family.

    Raises:
        KeyError: If there is none.
    """
    del _RULES[model_type]


def find_rule(model: nn.Module) -> FamilyRule:
    """The entry for `model`; an empty rule for most models."""
    return _RULES.get(getattr(vision_config(model), "model_type", ""), FamilyRule())


def vision_config(model: nn.Module) -> PreTrainedConfig | None:
    """The config from which the model's blocks are built, or None."""
    config = getattr(model, "config", None)
    inner = inner_config(config)
    if inner is not getattr(config, "backbone_config", None):
        return inner
    is_used = any(type(getattr(module, "config", None)) is type(inner) for module in model.modules())
    return inner if is_used else config  # DPTForSemanticSegmentation makes its blocks by its own sizes


def inner_config(config: _Config) -> _Config:
    """The part of a config that describes the blocks: `vision_config`, `backbone_config`, or the config itself."""
    for part in ("vision_config", "backbone_config"):
        inner: Any = getattr(config, part, None)
        if hasattr(inner, "num_hidden_layers") or hasattr(inner, "image_size"):  # a hybrid's convolutional one has none
            return inner
    return config


def _siglip2_inputs(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """NaFlex inputs: flattened patches, a mask and the grid. The last row is padding, as in most real batches."""
    rows = int(config.num_patches**0.5)
    columns = config.num_patches // rows
    values = torch.randn(batch_size, rows * columns, config.num_channels * config.patch_size**2, generator=generator)
    mask = torch.ones(batch_size, rows * columns, dtype=torch.int64)
    mask[:, -columns:] = 0
    return {
        "pixel_values": values,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[rows - 1, columns]] * batch_size),
    }


def _segformer_inputs(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images of 128 px: the config names no size, because any will do."""
    return {"pixel_values": torch.randn(batch_size, config.num_channels, 128, 128, generator=generator)}


def _qwen_vl_inputs(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Packed patches of images of 8 x 8 patches (twice that where 4 x 4 are merged), and their grids."""
    side = 4 * config.spatial_merge_size
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
    values = channels * config.temporal_patch_size * config.patch_size**2
    return {
        "pixel_values": torch.randn(batch_size * side**2, values, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * batch_size),
    }


def _whisper_inputs(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Spectrograms of the only length that the encoder takes, and one token for the decoder where there is one."""
    frames = 2 * config.max_source_positions
    start = torch.full((batch_size, 1), config.decoder_start_token_id)
    values = torch.randn(batch_size, config.num_mel_bins, frames, generator=generator)
    return {"input_features": values, "decoder_input_ids": start}


def _waveform_inputs(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Waveforms of 50 tokens of which the last is padding: what a head does with a mask decides the mode."""
    length = 50
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    mask = torch.ones(batch_size, length, dtype=torch.int64)
    mask[:, -1:] = 0
    return {"input_values": torch.randn(batch_size, length, generator=generator), "attention_mask": mask}


class _PerImageTable:
    """A table [B, alive, d] for an attention that takes [N, d] and adds the batch axis itself."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def unsqueeze(self, dim: int) -> Tensor:
        return self.table


def _gather_mlcd(route: Route, arguments: Arguments) -> Arguments:
    cos, sin = (
        _PerImageTable(table[:, 0]) for table in route.gather(arguments["position_embeddings"], "rotary_tables")
    )
    return {**route.gather_side_inputs(arguments, but="position_embeddings"), "position_embeddings": (cos, sin)}


def _gather_vjepa2(route: Route, arguments: Arguments) -> Arguments:
    """The attention rotates by `arange(N)` or by given token indices. Index 0 is not rotated."""
    assert route.origins is not None
    numbers = torch.where(route.origins < route.num_patches, route.origins, 0)
    return {**arguments, "position_mask": numbers}


def _timm_inputs(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    shape = config.pretrained_cfg["input_size"]
    return {"pixel_values": torch.randn(batch_size, *shape, generator=generator)}


def _gather_timm(route: Route, arguments: Arguments) -> Arguments:
    """EVA's table is sine and cosine, concatenated: [M, 2 d]."""
    followed = route.gather_side_inputs(arguments, but="rope")
    rope = arguments.get("rope")
    if rope is None:
        return followed
    sin, cos = rope.tensor_split(2, dim=-1)
    cos, sin = route.gather((cos, sin), "rotary_tables")
    return {**followed, "rope": torch.cat([sin, cos], dim=-1)}


def _beit_attention_arguments(block: Any, hidden_states: Tensor, arguments: Arguments) -> Arguments:
    """The block adds its own bias to the mask that it is called with."""
    arguments = dict(arguments)
    interpolate = arguments.pop("interpolate_pos_encoding", False)
    resolution = arguments.pop("resolution", None)
    mask = arguments.pop("attention_mask", None)
    if block.relative_position_bias is not None:
        window = tuple(side // block.patch_size for side in resolution)
        bias = block.relative_position_bias(window, interpolate, dim_size=hidden_states.shape[1])
        mask = bias if mask is None else bias + mask
    return {**arguments, "attention_mask": mask}


register_family("siglip2_vision_model", FamilyRule(probe_inputs=_siglip2_inputs))
for _family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
    register_family(f"{_family}_vision", FamilyRule(probe_inputs=_qwen_vl_inputs))
register_family("segformer", FamilyRule(probe_inputs=_segformer_inputs))
register_family("whisper", FamilyRule(probe_inputs=_whisper_inputs))
for _name in ("wav2vec2", "hubert", "data2vec-audio", "unispeech", "unispeech-sat", "wavlm"):
    register_family(_name, FamilyRule(probe_inputs=_waveform_inputs))
register_family("mlcd_vision_model", FamilyRule(gather_side_inputs=_gather_mlcd))
register_family("vjepa2", FamilyRule(gather_side_inputs=_gather_vjepa2))
register_family("timm_wrapper", FamilyRule(probe_inputs=_timm_inputs, gather_side_inputs=_gather_timm))
register_family(
    "beit", FamilyRule(position_bias="relative_position_bias", attention_arguments=_beit_attention_arguments)
)
register_family("data2vec-vision", FamilyRule(position_bias="relative_position_bias"))
