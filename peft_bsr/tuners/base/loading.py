"""Checks around loading and saving: a file must match the adapter exactly, and an adapter must be complete."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peft_bsr.backbones.fingerprint import Plain
from peft_bsr.compat.peft_api import ModulesToSaveWrapper
from peft_bsr.errors import AdapterError, AdapterFileError
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.layer import ROOT, adapter_parts, foreign_layers
from peft_bsr.tuners.base.source import read_header

_NAMED = 3  # tensors named in a message, for each problem
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_SPARE = 2**18  # a file may have this many elements more than twice the adapter's


class FileChecks(BaseTuner):
    """A tuner of PEFT with checks before loading and saving."""

    model: nn.Module
    peft_config: dict[str, SavedConfig]
    _requires_grad: dict[str, bool]

    @contextmanager
    def _undone_on_error(self, adapter_name: str) -> Iterator[None]:
        """Context manager around attaching an adapter: checks its file, and restores the model after an error."""
        before = {name: p.requires_grad for name, p in self.model.named_parameters()}
        try:
            yield
            self._check_file(adapter_name)
        except BaseException:
            if len(self.peft_config) > 1:
                self.delete_adapter(adapter_name)
            else:
                self.unload()
            restore_requires_grad(self.model, before)
            raise
        config = self.peft_config[adapter_name]
        assert config.attachment is not None, "set before the adapter is attached"
        parts = tuple(name for name, _ in adapter_parts(self.model, adapter_name))
        config.attachment = replace(config.attachment, parts=parts)

    def _check_file(self, adapter_name: str) -> None:
        """Raise if the file that PEFT is about to load would fail midway, or would allocate too much memory."""
        config = self.peft_config[adapter_name]
        path = config.source.weights if config.fills_weights and config.source else None
        if path is None:
            return
        header = read_header(path)
        wrappers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        }
        keys = {
            f"{ROOT}{name}.{key}"
            for name, wrapper in wrappers.items()
            for key in wrapper.adapter_state_dict_load_map(adapter_name)
        }
        own = sum(
            tensor.numel()
            for _, part in adapter_parts(self.model, adapter_name)
            for tensor in part.state_dict().values()
        )
        found = sum(tensor.numel() for tensor in header.values())
        problems = _problem(keys - header.keys(), "are missing in the file")
        if found > 2 * own + _SPARE:
            problems.append(f"the file has {found} numbers, the adapter {own}.")
        if problems:
            raise _refusal(adapter_name, problems)

    def _known_fingerprint(self, adapter_name: str) -> dict[str, Plain] | None:
        """The fingerprint that another adapter took before any adapter was attached, or None."""
        configs = {name: config for name, config in self.peft_config.items() if config.attachment is not None}
        known = next((config for name, config in configs.items() if name != adapter_name), None)
        if known is None or known.fingerprint is None:
            return None
        apart = [getattr(config, "modules_to_save", None) for config in (known, self.peft_config[adapter_name])]
        return known.fingerprint if apart[0] == apart[1] else {**known.fingerprint, "weights": None}

    @classmethod
    def _own_state(cls, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """All tensors that a file of the adapter may contain, under the model's names."""
        parts = adapter_parts(model, adapter_name)
        return {f"{name}.{key}": tensor for name, part in parts for key, tensor in part.state_dict().items()}

    @classmethod
    def _problems_of(cls, model: nn.Module, config: SavedConfig, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Problems of the values in a file, one sentence each."""
        return []

    @classmethod
    def _load_checked(
        cls, model: nn.Module, config: SavedConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors for PEFT to load, under the model's names. If they do not fit, a new adapter is removed again.

        Raises:
            AdapterFileError: See `check_loaded`.
        """
        renamed: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = getattr(model, "base_model", None)
        is_new, config.fills_weights = config.fills_weights, False
        if isinstance(tuner, FileChecks):  # transformers renames keys itself and reports missing ones
            parts = adapter_parts(model, adapter_name)
            required = {f"{name}.{key}" for name, part in parts for key, _ in part.named_parameters()}
            try:
                others = cls._problems_of(model, config, renamed)
                check_loaded(adapter_name, cls._own_state(model, adapter_name), required, renamed, others)
            except AdapterFileError:
                if is_new:
                    remove_adapter(model, adapter_name, tuner._requires_grad)
                raise
        return renamed

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SavedConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: object
    ) -> dict[str, Tensor]:
        """The state dict of an adapter, checked to be complete.

        Raises:
            AdapterError: If a part of it is no longer in the model.
        """
        check_whole(model, config, adapter_name)
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )
        others = tuple(f"{name}." for name in foreign_layers(model))
        return {key: tensor for key, tensor in found.items() if not key.startswith(others)}


def check_loaded(
    adapter_name: str,
    own: Mapping[str, Tensor],
    required: set[str],
    state_dict: Mapping[str, Tensor],
    others: list[str],
) -> None:
    """Compare the contents of a file with the adapter, before anything is copied.

    Args:
        adapter_name: Name of the adapter.
        own: Parameters and buffers of the adapter. The file must not have others.
        required: Names of its parameters. The file must have all of them.
        state_dict: Contents of the file, under the model's names.
        others: Further problems to report.

    Raises:
        AdapterFileError: If tensors are missing, unknown, of another shape or dtype, or not finite; the message names
            them.
    """
    common = {name: (state_dict[name], own[name]) for name in own.keys() & state_dict.keys()}
    shapes = {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in common.items()}
    kinds = {n: (a.dtype, b.dtype) for n, (a, b) in common.items() if not _is_same_kind(a, b)}
    broken = {n for n, t in state_dict.items() if t.is_floating_point() and not bool(t.isfinite().all())}
    problems = [
        *_problem(required - state_dict.keys(), "are missing in the file"),
        *_problem(state_dict.keys() - own.keys(), "are in the file, but not in this adapter"),
        *_problem({f"{n} {a} instead of {b}" for n, (a, b) in shapes.items() if a != b}, "have another shape"),
        *_problem({f"{n} {a} instead of {b}" for n, (a, b) in kinds.items()}, "have an incompatible dtype"),
        *_problem(broken, "are NaN or infinite"),
        *others,
    ]
    if problems:
        raise _refusal(adapter_name, problems)


def check_whole(model: nn.Module, config: SavedConfig, adapter_name: str) -> None:
    """Raise if a part of the adapter was replaced after it was attached: what trains there would not be saved.

    Args:
        model: The model with the adapter.
        config: Configuration of the adapter.
        adapter_name: Name of the adapter.

    Raises:
        AdapterError: If a part is missing; the message names it.
    """
    if config.attachment is None:
        return
    found = {_WRAPPERS.sub("", name).removeprefix(ROOT) for name, _ in adapter_parts(model, adapter_name)}
    if lost := sorted(set(config.attachment.parts) - found):
        modules = sorted({re.split(r"\.(?:\w+_params|modules_to_save)\.", name)[0] for name in lost})
        raise AdapterError(
            f"Adapter {adapter_name!r} is not saved: `{modules[0]}` was replaced or removed after the adapter was "
            "attached, so what trains there now is not part of the adapter. Change the model before `get_peft_model`, "
            "or put the module back."
        )


def remove_adapter(model: PeftModel, adapter_name: str, before: dict[str, bool]) -> None:
    """Remove an adapter whose weights could not be loaded.

    Args:
        model: The PeftModel with the adapter.
        adapter_name: Name of the adapter.
        before: Parameter name of the base model -> its `requires_grad` before the first adapter was attached.
    """
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    restore_requires_grad(model.base_model.unload(), before)


def restore_requires_grad(model: nn.Module, before: Mapping[str, bool]) -> None:
    """Restore `requires_grad` of parameters.

    Args:
        model: The model.
        before: Parameter name -> `requires_grad`.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))


def _is_same_kind(found: Tensor, own: Tensor) -> bool:
    """Whether both are floating point, or have the same dtype."""
    return found.is_floating_point() if own.is_floating_point() else found.dtype == own.dtype


def _refusal(adapter_name: str, problems: list[str]) -> AdapterFileError:
    end = (
        " The file is damaged, or belongs to another model or configuration; nothing was loaded from it. Load it on "
        "the model that it was trained on, or use another checkpoint."
    )
    return AdapterFileError.from_problems(f"Adapter {adapter_name!r}", [*problems[:-1], problems[-1] + end])


def _problem(names: Iterable[str], what: str) -> list[str]:
    found = sorted(names)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return [f"{', '.join(found[:_NAMED])}{more} {what}."] if found else []


__all__ = ["FileChecks", "check_loaded", "check_whole", "remove_adapter"]
