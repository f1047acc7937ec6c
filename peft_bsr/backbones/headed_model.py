"""A headless vision model with a new classifier, as a transformers model with its own configuration class."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from peft_bsr.backbones.inputs import input_shapes, main_input, probe_inputs, vision_parts
from peft_bsr.backbones.pooling import Pool, TokenPool, family_pool
from peft_bsr.compat.transformers_api import (
    IMPLEMENTATION,
    backbone_class_of,
    config_class_of,
    keep_weights,
    register_classifier,
    source_of,
)
from peft_bsr.errors import ConfigError, UnsupportedModelError

_WORDS = {
    "class": "the class token",
    "mean": "the mean of the patches",
    "class+mean": "the class token and the mean of the patches",
    "attention": "an attention pool over the patches",
}
_PLACE = ("revision", "token", "cache_dir", "local_files_only", "dtype")  # arguments that the configuration consumes


class BackboneWithHeadConfig(PreTrainedConfig):
    """Configuration of `BackboneForImageClassification`.

    `from_pretrained` also takes the folder or Hub id of a headless model, whose configuration becomes
    `backbone_config`.

    Args:
        backbone_config: Configuration of the vision model.
        pool: See `with_head`. Default None: what the family was trained for, filled in by the model.
        num_prefix: Number of tokens before the patches. Default None: counted by the model.
        classifier_dropout: Dropout rate on the classifier's input. Default 0.
        initializer_range: Standard deviation of new weights. Default 0.02.
        kwargs: Arguments of `PreTrainedConfig`: `num_labels`, `id2label`, `problem_type`, ...
    """

    model_type = "peft_bsr_with_head"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        pool: str | None = None,
        num_prefix: int | None = None,
        classifier_dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: object,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = config_class_of(backbone_config["model_type"]).from_dict(dict(backbone_config))
        self.backbone_config = backbone_config
        self.pool, self.num_prefix = pool, num_prefix
        self.classifier_dropout, self.initializer_range = classifier_dropout, initializer_range
        implementation = getattr(backbone_config, IMPLEMENTATION, None)
        super().__init__(**({"attn_implementation": implementation} | kwargs))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: object
    ) -> tuple[dict[str, object], dict[str, object]]:
        """Values of a saved configuration; that of a headless model becomes `backbone_config`."""
        stored, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if stored.get("model_type", cls.model_type) != cls.model_type:
            inner = config_class_of(stored["model_type"]).from_dict(dict(stored))
            stored = {"model_type": cls.model_type, "backbone_config": getattr(inner, "vision_config", inner)}
        return stored, kwargs


class BackboneForImageClassification(PreTrainedModel):
    """A headless vision model, a pool over its tokens, and a linear classifier.

    After `import peft_bsr`, `AutoModelForImageClassification.from_pretrained` loads a folder that its `save_pretrained`
    wrote. Its own `from_pretrained` also takes the folder or Hub id of a headless model.

    Args:
        config: Configuration. Values that are None are filled in.
        backbone: The vision model, with its weights. Default None: created from the configuration with random weights.

    Raises:
        UnsupportedModelError: If the vision model does not return one sequence of tokens per image.
        ConfigError: If `pool` needs a class token and the model has none.
    """

    config_class = BackboneWithHeadConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_missing = [r"^backbone\.pooler\."]  # noqa: RUF012  (never read)

    def __init__(self, config: BackboneWithHeadConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        inner: PreTrainedConfig = config.backbone_config
        made = bare_class(inner)
        if config.num_prefix is None:
            config.num_prefix = _count_prefix(made, inner)
        config.pool = _check_pool(config.pool, inner, config.num_prefix)
        if hasattr(inner, "mask_ratio"):
            inner.mask_ratio = 0.0  # a classifier sees the whole image
        if backbone is not None:
            keep_weights(backbone)
        self.backbone: PreTrainedModel = made(inner) if backbone is None else backbone
        self.has_own = config.pool == "attention" and bool(getattr(self.backbone, "use_head", False))
        self.pool = TokenPool(cast(Pool, config.pool), inner, config.num_prefix, self.has_own)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(self.pool.width, config.num_labels or 0)
        norm = family_pool(inner, config.num_prefix).norm
        names = [name for name, _ in self.backbone.named_modules() if norm and name.endswith(norm)]
        self.norm_name = names[0] if names else None
        self.inputs = set(inspect.signature(made.forward).parameters)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        query = getattr(module, "query", None)
        if isinstance(query, nn.Parameter) and not getattr(query, "_is_hf_initialized", False):
            query.normal_(0.0, self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's input embeddings."""
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> ImageClassifierOutput | tuple[object, ...]:
        """Classify images.

        Args:
            pixel_values: [B, C, height, width], or the backbone's own format.
            labels: Class of each image [B], or for several labels or values [B, `num_labels`], to compute the loss.
            output_hidden_states: Whether to return the tokens after each block.
            output_attentions: Whether to return attention weights.
            return_dict: Whether to return a `ModelOutput` instead of a tuple. Default True.
            kwargs: Further inputs of the backbone, such as `pixel_attention_mask`.

        Returns:
            `loss` if there are labels, and `logits` [B, `num_labels`].
        """
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        given = kwargs | {name: value for name, value in asked.items() if value is not None}
        if "noise" in self.inputs and "noise" not in given:  # a masked autoencoder sorts its patches by it
            given["noise"] = self._in_order(pixel_values)
        outputs = self.backbone(pixel_values, **given)
        if self.has_own:
            pooled = outputs.pooler_output
        else:
            tokens = outputs.last_hidden_state
            if self.norm_name is not None:
                tokens = self.backbone.get_submodule(self.norm_name)(tokens)
            pooled = self.pool(tokens, kwargs.get("pixel_attention_mask"))
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        found = ImageClassifierOutput(loss, logits, outputs.get("hidden_states"), outputs.get("attentions"))
        return found.to_tuple() if return_dict is False else found

    @classmethod
    def around(cls, backbone: PreTrainedModel, config: BackboneWithHeadConfig) -> BackboneForImageClassification:
        """Add a new classifier to a vision model, on its device and in its dtype and mode.

        Args:
            backbone: The vision model.
            config: Configuration. Its `backbone_config` is replaced by the vision model's.
        """
        config.backbone_config = backbone.config
        weight = next(p for p in backbone.parameters() if p.is_floating_point())
        model = cls(config, backbone)
        model.config.name_or_path = model.name_or_path = source_of(backbone.config) or ""
        for part in (model.pool, model.classifier):
            part.to(device=weight.device, dtype=weight.dtype)
        return model.train(backbone.training)

    def describe_head(self) -> str:
        """A clause that says what the classifier reads and why."""
        made_for = family_pool(self.config.backbone_config, self.config.num_prefix)
        why = f" ({made_for.why})" if made_for.pool == self.config.pool else ""
        return f"a new classifier reads {_WORDS[self.config.pool]}{why}"

    def _in_order(self, pixel_values: Any) -> Tensor:
        patch = self.config.backbone_config.patch_size
        number = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
        return torch.arange(number, device=pixel_values.device, dtype=torch.float32).expand(len(pixel_values), -1)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: object, **kwargs: Any
    ) -> Any:
        """Load a saved model of this class, or a headless model's weights with a new classifier.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            args: See transformers.
            kwargs: See transformers; also fields of the configuration (`pool`, `id2label`, ...).
        """
        source = pretrained_model_name_or_path
        place = {name: kwargs[name] for name in _PLACE if name in kwargs}
        stored, _ = PreTrainedConfig.get_config_dict(source, **{n: v for n, v in place.items() if n != "dtype"})
        if stored.get("model_type") == cls.config_class.model_type:
            return super().from_pretrained(source, *args, **kwargs)
        config = kwargs.pop("config", None)
        if config is None:
            config, unused = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
            kwargs = unused | place
        wants_report = kwargs.pop("output_loading_info", False)
        backbone, report = bare_class(config.backbone_config).from_pretrained(
            source, config=config.backbone_config, output_loading_info=True, **kwargs
        )
        _check_found(backbone, report["missing_keys"], source)
        model = cls.around(backbone, config)
        new = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
        missing = new | {f"backbone.{name}" for name in report["missing_keys"]}
        other = [(f"backbone.{name}", *shapes) for name, *shapes in report["mismatched_keys"]]
        return (model, report | {"missing_keys": missing, "mismatched_keys": other}) if wants_report else model


def bare_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The vision model without a head that transformers has for a configuration.

    Raises:
        UnsupportedModelError: If there is none.
    """
    found = backbone_class_of(config)
    if found is None:
        raise UnsupportedModelError(f"transformers has no vision model without a head for {config.model_type!r}.")
    return found


def _count_prefix(backbone_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """Number of tokens before the patches, from the shapes of one forward on the meta device."""
    config = copy.deepcopy(config)
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    with torch.device("meta"):
        model = backbone_class(config).eval()
    name = backbone_class.__name__
    if main_input(model) != "pixel_values":
        inside = next(iter(vision_parts(model)), None)
        advice = f". Give the vision model inside: `with_head(model.{inside}, ...)`." if inside else " and no images."
        raise UnsupportedModelError(f"{name} takes `{main_input(model)}`{advice}")
    try:
        shape = input_shapes(model)[0]
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None
    if len(shape) not in (2, 3):
        raise UnsupportedModelError(f"{name} takes `{main_input(model)}` of shape {shape} instead of images.")
    if len(shape) == 2:  # flattened patches of images of several sizes: such models have no other tokens
        return 0
    if detections := getattr(config, "num_detection_tokens", 0):
        raise UnsupportedModelError(
            f"{name} has tokens after the patches (`num_detection_tokens={detections}`), which no pool leaves out. "
            "Give a backbone without them."
        )
    try:
        with torch.no_grad():
            tokens = getattr(model(**probe_inputs(model, 1, shape)), "last_hidden_state", None)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UnsupportedModelError(f"{name}: a forward pass on an image failed with {error!r}.") from error
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        found = "returns none" if tokens is None else f"this has shape {tuple(tokens.shape)}"
        raise UnsupportedModelError(
            f"{name} should return tokens [images, tokens, width] as `last_hidden_state`, but {found}. Give the vision "
            "model inside."
        )
    number = tokens.shape[1] - _count_patches(config, shape)
    if number < 0:
        raise UnsupportedModelError(
            f"{name} returns {tokens.shape[1]} tokens for {_count_patches(config, shape)} patches: it is not a plain "
            "vision transformer."
        )
    return number


def _count_patches(config: PreTrainedConfig, shape: tuple[int, ...]) -> int:
    patch = config.patch_size
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return (shape[-2] // rows) * (shape[-1] // columns)


def _check_pool(pool: str | None, config: PreTrainedConfig, num_prefix: int) -> str:
    if pool is None:
        return family_pool(config, num_prefix).pool
    if "class" in pool and not num_prefix:
        raise ConfigError(f"`pool={pool!r}`: {config.model_type} has no class token. Use 'mean' or 'attention'.")
    return pool


def _check_found(backbone: PreTrainedModel, missing: Collection[str], source: str | os.PathLike[str]) -> None:
    """Reject a checkpoint in which the vision weights have other names: transformers would initialize them."""
    missing = [name for name in missing if not name.startswith("pooler.")]
    if len(missing) > len(backbone.state_dict()) / 2:
        raise UnsupportedModelError(
            f"Most weights of {type(backbone).__name__} are missing in {str(source)!r}, which is a larger model. Load "
            "it with its own class, give the vision model inside to `with_head`, and save the result."
        )


register_classifier(BackboneWithHeadConfig, BackboneForImageClassification)

__all__ = ["BackboneForImageClassification", "BackboneWithHeadConfig"]
