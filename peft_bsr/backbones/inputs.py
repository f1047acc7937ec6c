"""Random inputs for one forward of a model, and context managers for forwards without side effects."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_bsr.backbones.registry import Arguments, Call, find_rule, vision_config
from peft_bsr.errors import UnsupportedModelError

_PREFERRED_PATCHES = 256  # a probe at DINOv2's native 518 px (1369 patches) takes seconds, at 256 patches a fraction
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
RecordedCall = tuple[tuple[Any, ...], Arguments, Any]
"""Positional arguments of a block, hidden states first; keyword arguments; output."""


@contextmanager
def in_mode(training: bool, *models: nn.Module) -> Iterator[None]:
    """Context manager: `models` are in training or evaluation mode. Restores the mode of every module."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            if training or any(module.training for module in model.modules()):
                model.train(training)
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def default_state() -> Iterator[None]:
    """Context manager: torch's defaults instead of the caller's inference mode, autocast, default device and dtype."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Context manager: `model` is in evaluation mode without gradients. Restores the random state and all modes.

    Inference mode is disabled, because the probe computes gradients of the head; see `default_state`.

    Raises:
        UnsupportedModelError: If the model's weights were created in inference mode.
    """
    if any(p.is_inference() for p in model.parameters()):
        raise UnsupportedModelError(
            "its weights were created inside `torch.inference_mode()` and cannot have gradients. Load the model "
            "outside of it, or inside `torch.no_grad()`."
        )
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with (
        default_state(),
        in_mode(False, model),
        torch.random.fork_rng(devices),
        _same_draws({p.device.type for p in model.parameters()} - {"cpu", "cuda", "meta"}),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),  # a compiled block does not call hooks that are added later
        _same_numbers(model),
    ):
        yield


@contextmanager
def _same_draws(kinds: Collection[str]) -> Iterator[None]:
    """Give the current devices of other kinds (`"mps"`, `"xpu"`) their random state back: `seed` sets it too."""
    before = {kind: torch.get_device_module(kind).get_rng_state() for kind in kinds}
    try:
        yield
    finally:
        for kind, state in before.items():
            torch.get_device_module(kind).set_rng_state(state)


@contextmanager
def _same_numbers(model: nn.Module) -> Iterator[None]:
    """Give every module the numbers back that it set in a forward: Swin makes its windows smaller, for good."""
    before = [(vars(module), _numbers_of(module)) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, numbers in before:
            attributes.update(numbers)


def _numbers_of(module: nn.Module) -> dict[str, Any]:
    own = vars(module).items()
    return {name: value for name, value in own if isinstance(value, int) and not isinstance(value, bool)}


def probe_inputs(model: nn.Module, batch_size: int, shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """Random inputs of `model`, the same at every call, in the dtype and on the device of its weights.

    Args:
        model: A vision (or spectrogram) model.
        batch_size: Batch size.
        shape: Shape of the main input without the batch. Default None: the first of `input_shapes`.

    Raises:
        UnsupportedModelError: If the config does not describe the input.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    make = find_rule(model).probe_inputs
    if make is not None:
        inputs = make(vision_config(model), batch_size, generator)
        if "decoder_input_ids" not in inspect.signature(model.forward).parameters:  # Whisper's classifier
            inputs.pop("decoder_input_ids", None)
    else:
        shape = input_shapes(model)[0] if shape is None else shape
        inputs = {main_input(model): torch.randn(batch_size, *shape, generator=generator)}
    dtypes = {name: like.dtype if value.is_floating_point() else value.dtype for name, value in inputs.items()}
    return {name: value.to(device=like.device, dtype=dtypes[name]) for name, value in inputs.items()}


def input_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the main input to try, without the batch: first a small image if the native one has many patches.

    Raises:
        UnsupportedModelError: If the config does not describe the input.
    """
    rule = find_rule(model)
    config: PreTrainedConfig = vision_config(model)
    if rule.probe_inputs is not None:
        return [tuple(rule.probe_inputs(config, 1, torch.Generator().manual_seed(0))[main_input(model)].shape[1:])]
    if main_input(model) == "input_values" and hasattr(config, "num_mel_bins"):
        return [(config.max_length, config.num_mel_bins)]
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_chans", None) or 3
    patch = getattr(config, "patch_size", None)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    if size is None:
        raise UnsupportedModelError(_without_size(model))
    height, width = _pair(size)
    if frames is not None:
        return [(frames, channels, height, width)]
    shapes: list[tuple[int, ...]] = [(channels, height, width)]
    if patch is not None:
        side = int(_PREFERRED_PATCHES**0.5)
        small = (side * _pair(patch)[0], side * _pair(patch)[1])
        if height * width > small[0] * small[1]:
            shapes.insert(0, (channels, *small))
    return shapes


def grid_of_config(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of patches by the patch size in the config, for patches of no convolution (RADIO), or None."""
    patch = getattr(vision_config(model), "patch_size", None)
    if patch is None or len(image_shape) != 3:
        return None
    return image_shape[1] // _pair(patch)[0], image_shape[2] // _pair(patch)[1]


def check_takes_images(model: nn.Module) -> None:
    """Refuse a model that takes text first (BERT, CLIP's two encoders, LLaVA): an image alone does not run it.

    Raises:
        UnsupportedModelError: Naming the vision model inside, if there is one.
    """
    is_first = next(iter(inspect.signature(model.forward).parameters), None) == "input_ids"
    if is_first and not takes_rule_inputs(model):
        inside = _attach_inside(model)
        raise UnsupportedModelError(f"it takes text and images. {inside}" if inside else "it takes text, not images")


def describe_failure(model: nn.Module, failure: Exception | None) -> str:
    """Why a forward on random images failed, and for a model that takes text as well the vision model inside."""
    reason = f"a forward pass on random inputs failed with {failure!r}"
    inside = _attach_inside(model) if _takes_text(model) else None
    return f"{reason}. {inside}" if inside else reason


def vision_parts(model: nn.Module) -> list[str]:
    """Names of the outermost models of transformers inside that take images alone."""
    found: list[str] = []
    for name, part in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not is_inside and isinstance(part, PreTrainedModel) and _takes_images_alone(part):
            found.append(name)
    return found


def needs_part(model: nn.Module) -> bool:
    """Whether an image alone does not run the model: it takes text as well, or its config has no image size."""
    if takes_rule_inputs(model):
        return False
    if _takes_text(model):
        return True
    try:
        return not input_shapes(model)
    except UnsupportedModelError:
        return True


def takes_rule_inputs(model: nn.Module) -> bool:
    """Whether the family's entry makes inputs for this very model, and not for one inside."""
    return find_rule(model).probe_inputs is not None and vision_config(model) is getattr(model, "config", None)


def _takes_images_alone(model: nn.Module) -> bool:
    has_size = hasattr(model.config, "image_size") or find_rule(model).probe_inputs is not None
    is_first = next(iter(inspect.signature(model.forward).parameters), None) == "pixel_values"
    return (is_first and has_size and not _takes_text(model)) or takes_rule_inputs(model)


def _without_size(model: nn.Module) -> str:
    """Advice for a model without an image size in its config. Most such models contain a backbone that has one."""
    if advice := _attach_inside(model):
        return f"it has no config with an `image_size`. {advice}"
    return (
        "its config has no `image_size`, so no probe image can be created. Register a FamilyRule with `probe_inputs`, "
        "see docs/new_model.md."
    )


def _attach_inside(model: nn.Module) -> str | None:
    """A sentence that names the vision model inside, or None if there is none."""
    names = vision_parts(model)
    if not names:
        return None
    return f"Name the vision model inside: `BSRConfig(part={names[0]!r})`; docs/guides/parts.md shows the rest."


def _takes_text(model: nn.Module) -> bool:
    return "input_ids" in inspect.signature(model.forward).parameters


@dataclass
class StockRun:
    """One forward of the stock model on the probe's image.

    Attributes:
        calls: Arguments and output of every block.
        outputs: All tensors that the model returned.
    """

    calls: list[RecordedCall]
    outputs: list[Tensor]


def run_stock(model: nn.Module, blocks: tuple[str, ...], inputs: dict[str, Tensor]) -> StockRun:
    """Run one forward, inside `quiet`, and record the arguments and the output of every block."""
    calls: list[RecordedCall] = []

    def record(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        calls.append((*hidden_first(args, kwargs), output))

    handles = [model.get_submodule(name).register_forward_hook(record, with_kwargs=True) for name in blocks]
    try:
        return StockRun(calls, tensors_of(run_probe(model, inputs)))
    finally:
        for handle in handles:
            handle.remove()


def hidden_first(args: tuple[object, ...], kwargs: dict[str, object]) -> Call:
    """A block's arguments with its hidden states as the first positional one."""
    if args:
        return args, kwargs
    return (kwargs["hidden_states"],), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def run_probe(model: nn.Module, inputs: dict[str, Tensor]) -> object:
    """One forward, inside `quiet`, with the same random numbers every time (a masked autoencoder draws its masks)."""
    seed(model)
    return model(**inputs)


def seed(model: nn.Module) -> None:
    """Set the random seed of the CPU and of the model's devices, but of no other device."""
    for device in {torch.device("cpu"), *(p.device for p in model.parameters())}:
        if device.type == "cpu":
            torch.default_generator.manual_seed(0)
        elif device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(0)
        else:
            torch.get_device_module(device).manual_seed(0)


def tensors_of(output: object) -> list[Tensor]:
    """All tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in tensors_of(value)]
    return []


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that is allowed for sums in another order: 1e-4 in fp32, 5e-2 in half precision."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2


def main_input(model: nn.Module) -> str:
    """Name of the model's main input, such as `"pixel_values"`."""
    return getattr(model, "main_input_name", "pixel_values")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
