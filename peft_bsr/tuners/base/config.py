"""Base of all configurations: what they store about the model, and hooks that run when they are saved."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedConfig

from peft_bsr.backbones import Fingerprint, ModelSpec, weights_digest
from peft_bsr.backbones.fingerprint import Plain
from peft_bsr.core.checks import MOST_CLASSES
from peft_bsr.engine import Plan
from peft_bsr.errors import AdapterFileError, ConfigError, OtherWeightsWarning
from peft_bsr.tuners.base.base_model import changed_settings, new_weights, own_config
from peft_bsr.tuners.base.classifier import without_layer
from peft_bsr.tuners.base.files import AdapterFiles
from peft_bsr.tuners.base.reductions import record

if TYPE_CHECKING:
    from peft_bsr.tuners.base.resolution import Resolution

AFTER_SAVE: list[Callable[[SavedConfig, Path], None]] = []
"""Functions of an attached adapter's configuration and its folder, called after each save. The model card uses one.

PEFT has no hook for this: `PeftModel` writes the card itself, and we do not change its class."""


@dataclass(frozen=True)
class Attachment:
    """The model that an adapter is attached to. Not saved in the adapter's files.

    Attributes:
        spec: Description of the model.
        plan: Plan of the blocks; for ALaST, the plan on which each step is based.
        classes: Names of the model's class and of its base classes.
        config: The model's configuration (the object itself, not a copy), or None.
        own: The configuration in the files that the model was loaded from, or None.
        parts: Names of the adapter's modules in the model. Set once the adapter is attached.
    """

    spec: ModelSpec
    plan: Plan
    classes: tuple[str, ...]
    config: object
    own: PreTrainedConfig | None
    parts: tuple[str, ...] = ()

    @property
    def problem_type(self) -> str | None:
        """`problem_type` of the model's configuration, which the losses of transformers set."""
        return getattr(self.config, "problem_type", None)


@dataclass
class SavedConfig(AdapterFiles):
    """Base class of the configurations.

    Args:
        part: Name of the vision model inside a larger model, such as `"model.vision_tower"`: blocks are looked for only
            inside it, and names in `target_modules` and `exclude_modules` are relative to it. Default None: the vision
            model inside, where an image alone does not run the model and there is exactly one; else the model itself.
            The name that was found is written into the configuration.
        labels: Class names by index. Written when the adapter is attached to a model with a classifier;
            `peft_bsr.load` uses them to create a head of the right size.
        base_config: Other settings of the base model's configuration that differ from its file, such as
            `problem_type`: name -> plain JSON value. Written when the adapter is saved; `peft_bsr.load` applies them.
        fingerprint: Description of the base model (`peft_bsr.backbones.Fingerprint`) and a digest of its `weights`.
            Written when the adapter is attached. Loading on a different model is an error, on different weights a
            warning.
        digests: Digests of these `settings` and of the file with the `weights`. Written when the adapter is saved;
            incomplete files, and files that were not saved together, are an error.
    """

    part: str | None = field(
        default=None, metadata={"help": "Name of the vision model inside a larger one; None = found by itself."}
    )
    labels: list[str] | None = field(default=None, metadata={"help": "Written at attach: class names of the head."})
    base_config: dict[str, object] | None = field(
        default=None, metadata={"help": "Written at save: settings of the base model that differ from its own file."}
    )
    fingerprint: dict[str, Plain] | None = field(
        default=None, metadata={"help": "Written at attach: a description of the base model that identifies it."}
    )
    digests: dict[str, str] | None = field(
        default=None, metadata={"help": "Written at save: digests of the settings and of the file with the weights."}
    )

    target_modules = cast("Any", None)  # PEFT asks for it; methods that take names of modules have a field
    frozen_weights = "full"  # precision of frozen blocks' weights; methods that support it have a field of this name
    # not annotated, so that these are neither fields nor saved
    resolution = cast("Any", None)  # the method's Resolution, if known before the adapter is attached
    attachment = cast("Attachment | None", None)
    place = None  # where `peft_bsr.load` read it
    facts = None  # measurements, see `peft_bsr.hub.CardFacts`

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.part is not None and not (isinstance(self.part, str) and self.part):
            problems.append(f"`part={self.part!r}` must be a module's name, such as 'model.vision_tower', or None.")
        if self.labels is not None and not (isinstance(self.labels, list) and all(map(_is_text, self.labels))):
            problems.append(f"`labels={self.labels!r}` must be a list of strings, or None.")
        elif self.labels is not None and len(self.labels) > MOST_CLASSES:
            problems.append(f"`labels` has {len(self.labels)} names; at most {MOST_CLASSES} are allowed.")
        if self.base_config is not None and not isinstance(self.base_config, dict):
            problems.append(f"`base_config={self.base_config!r}` must be a dict or None.")
        if self.fingerprint is not None and not isinstance(self.fingerprint, dict):
            problems.append(f"`fingerprint={self.fingerprint!r}` must be a dict or None.")
        if self.digests is not None and not (
            isinstance(self.digests, dict) and all(map(_is_text, self.digests.values()))
        ):
            problems.append(f"`digests={self.digests!r}` must be a dict of strings, or None.")
        if problems:
            raise ConfigError.from_problems(type(self).__name__, problems)

    def attached_to(
        self,
        model: nn.Module,
        spec: ModelSpec,
        plan: Plan,
        held: Sequence[str],
        fingerprint: dict[str, Plain] | None = None,
    ) -> None:
        """Store what identifies the model.

        Args:
            model: The model.
            spec: Description of the model.
            plan: Plan of the blocks.
            held: Names of the modules whose weights the adapter has, replaces, or does not need.
            fingerprint: Fingerprint of the model before its first adapter, if it has adapters. Default None: computed
                from the model.

        Raises:
            AdapterFileError: If the adapter comes from a file and was trained on another model or for other classes.
            ConfigError: If a weight that the adapter does not have is not in the base model's files.
        """
        labels = self._labels(model, spec)
        own = own_config(model)
        found = fingerprint or self._fingerprint_of(model, spec)
        if self.fills_weights or self.inference_mode:  # transformers' loader reads the file itself
            _check_labels(self.labels, labels)
            _check_model(self.fingerprint, found, warn=self.fills_weights)
            if labels == _default_labels(labels) and self.labels and len(self.labels) == len(labels or ()):
                labels = self.labels  # a model created in memory has no names
        elif own is not None:
            _check_new(model, new_weights(model, own), held, self)
        classes = tuple(cls.__name__ for cls in type(model).__mro__)
        self.attachment = Attachment(spec, plan, classes, getattr(model, "config", None), own)
        self.labels, self.fingerprint = labels, found

    def _fingerprint_of(self, model: nn.Module, spec: ModelSpec) -> dict[str, Plain]:
        apart = getattr(self, "modules_to_save", None) or ()
        return {**Fingerprint.of(model, spec).to_dict(), "weights": weights_digest(model, spec, apart)}

    @property
    def has_dense_tasks(self) -> bool:
        """Whether a task needs an output for each patch."""
        return False

    def recorded(self, resolution: Resolution) -> SavedConfig:
        """A copy with the values that were chosen for the model, see `Resolution`."""
        config = copy.copy(self)
        record(config, resolution.plan)
        config.part = resolution.spec.part
        return config

    def _labels(self, model: nn.Module, spec: ModelSpec) -> list[str] | None:
        return find_labels(model, spec)

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """Save the configuration, then call `AFTER_SAVE`.

        Args:
            save_directory: The folder.
            kwargs: For `PeftConfig.save_pretrained`.
        """
        at = self.attachment
        if at is not None and at.own is not None:
            self.base_config = changed_settings(at.config, at.own, with_labels=self.labels is None) or None
        super().save_pretrained(save_directory, **kwargs)
        if self.attachment is not None:
            for action in AFTER_SAVE:
                action(self, Path(save_directory))


def find_labels(model: nn.Module, spec: ModelSpec) -> list[str] | None:
    """Class names by index, or None if no part of the head is a classifier with that many classes."""
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    heads = [without_layer(model.get_submodule(name)) for name in spec.head]
    if not any(isinstance(head, nn.Linear) and head.out_features == len(named) for head in heads):
        return None
    return [str(named[index]) for index in sorted(named)]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _default_labels(labels: list[str] | None) -> list[str]:
    """The default class names of transformers."""
    return [f"LABEL_{index}" for index in range(len(labels or ()))]


def _check_model(saved: dict[str, Plain] | None, found: dict[str, Plain], *, warn: bool) -> None:
    if saved is None:
        return
    if differing := Fingerprint.from_dict(found).differences(Fingerprint.from_dict(saved)):
        raise AdapterFileError(
            f"The adapter was trained on a different model than this one, which has {', '.join(differing)}. Load it on "
            "the model that it was trained on; `peft_bsr.load(adapter)` finds it."
        )
    digests = [values.get("weights") for values in (saved, found)]
    if warn and None not in digests and digests[0] != digests[1]:
        warnings.warn(
            "The base model has other weights than the one that the adapter was trained on. Outputs will differ; load "
            "the same checkpoint if this is not intended.",
            OtherWeightsWarning,
            stacklevel=2,
        )


def _check_labels(saved: list[str] | None, found: list[str] | None) -> None:
    if saved is not None and found is not None and len(saved) != len(found):
        raise AdapterFileError(
            f"The adapter's head has {len(saved)} classes, this model's has {len(found)}. `peft_bsr.load(adapter)` "
            "reads the base model with a head of the right size, `peft_bsr.pipeline(adapter)` predicts with it; or "
            f"load the base model with `num_labels={len(saved)}, ignore_mismatched_sizes=True`."
        )


def _check_new(
    model: nn.Module,
    new: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    held: Sequence[str],
    config: SavedConfig,
) -> None:
    """Raise if new weights would be lost: frozen at random values, and not in any file."""
    saved = [rf"(^|.*\.){re.escape(name)}($|\..*)" for name in getattr(config, "modules_to_save", None) or ()]
    lost = {
        name: shapes
        for name, shapes in new.items()
        if not any(f"{name}.".startswith(f"{module}.") for module in held)
        and not any(re.match(pattern, name) for pattern in saved)
    }
    if not lost:
        return
    name, (shape, before) = next(iter(lost.items()))
    raise ConfigError(
        f"{type(config).__name__}: `{name}` {list(shape)} is not from the base model's files, which have "
        f"{list(before)}: it would stay random, and the adapter would not contain it. Train new patch embeddings with "
        "`BSRConfig(trainable_blocks='every:1', modules_to_save=['patch_embeddings'])` or "
        "`ALaSTConfig(train_embeddings=True)`; for images of another size use "
        "`peft_bsr.set_image_size(model, pixels)` instead. If the weights are trained already, save the model with "
        "`save_pretrained(folder)` and load it from there."
    )


__all__ = ["AFTER_SAVE", "Attachment", "SavedConfig", "find_labels"]
