"""A model prepared for export: merged weights, active reduction, one tensor in, a tuple of tensors out."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peft_bsr.backbones import find_rule, input_shapes, main_input, probe_inputs, set_image_size
from peft_bsr.core import ForwardContext, as_plain
from peft_bsr.engine import BlockController, Plan, attach_controller
from peft_bsr.errors import ExportError, ReductionNotMergedWarning
from peft_bsr.ops import FrozenLinear
from peft_bsr.tuners.base.layer import find_controllers
from peft_bsr.tuners.base.tuner import MethodTuner

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class ImageFunction(nn.Module):
    """A model as a function of its images.

    Args:
        model: The model, in evaluation mode.
        plan: Plan of the token reduction.

    Attributes:
        input_name: The model's name for its images, usually `"pixel_values"`.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.input_name = main_input(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] -> the model's outputs that are tensors."""
        return tuple(self.named_outputs(images).values())

    def named_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs by name: `"logits"`, `"last_hidden_state"`, ..."""
        output = self.model(**{self.input_name: images})
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}

    def sample(self, batch_size: int, image_size: int | tuple[int, int] | None) -> Tensor:
        """Random images [B, C, H, W], always the same.

        Args:
            batch_size: B.
            image_size: Pixels, one number or (height, width); None: that of the model's config.

        Raises:
            ExportError: If the model has other inputs than images.
        """
        if others := [name for name in probe_inputs(self.model, 1) if name != self.input_name]:
            raise ExportError(
                f"{type(self.model).__name__} also takes {', '.join(f'`{name}`' for name in others)} (see its "
                "FamilyRule); an exported file takes images only. Wrap the model in a module that makes the other "
                "inputs."
            )
        shape = input_shapes(self.model)[-1]
        if image_size is not None:
            if len(shape) != 3 or self.input_name != "pixel_values":
                raise ExportError(
                    f"`image_size={image_size!r}` is for image models; this model's input is {shape}. Leave it out."
                )
            shape = (shape[0], *((image_size, image_size) if isinstance(image_size, int) else image_size))
        return torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))


def to_image_function(
    model: PeftModel, all_tokens: bool = False, image_size: int | tuple[int, int] | None = None
) -> ImageFunction:
    """A copy of `model` on the CPU in fp32, with its active adapter's weights merged and its reduction active.

    Parts that cannot be merged (queries, heads of tasks, mixtures of experts) stay in the model.

    Args:
        model: From `get_peft_model` or `PeftModel.from_pretrained`; it is not changed.
        all_tokens: Whether to disable token reduction.
        image_size: Pixels, see `peft_bsr.set_image_size`. Default None: the model's.

    Raises:
        ConfigError: If `image_size` does not fit the model.
        ExportError: If the model has no adapter of ours, or several tasks.
        UnsupportedModelError: If the model cannot take images of `image_size`.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MethodTuner):
        others = sorted({str(config.peft_type.value) for config in getattr(model, "peft_config", {}).values()})
        found = f"{type(model).__name__} with {', '.join(others)}" if others else type(model).__name__
        raise ExportError(
            f"`export` needs a PeftModel with an adapter of peft_bsr, not a {found}. Create one with "
            "`get_peft_model(model, BSRConfig())` or `PeftModel.from_pretrained`; merge other adapters with "
            "`merge_and_unload()` or `peft-bsr merge`, and export the plain model with transformers and optimum."
        )
    if tuner.part is not None:
        raise ExportError(
            f"the adapter is on `{tuner.part}`, and {type(tuner.model).__name__} takes more than images. Merge it with "
            "`merge_and_unload()` and export the whole model with the tools of its task."
        )
    name, plan = tuner.active_adapters[0], tuner.plan()
    tasks = [task.name for task in getattr(tuner.peft_config[name], "tasks", None) or ()]
    if len(tasks) > 1:
        raise ExportError(
            f"Adapter {name!r} has the tasks {tasks}; a file has one. Save one of them as a separate adapter with "
            f"`export_task(model, {tasks[0]!r}, folder)`, load it and export that."
        )
    if all_tokens or not tuner.reduces_in_evaluation:
        plan = plan.without_reductions()
    copied = _with_plain_weights(copy.deepcopy(model)).to("cpu", torch.float32).eval()
    if tasks or not tuner.merges:
        for controller in find_controllers(copied):
            controller.plans[name] = plan
        return ImageFunction(_at_size(copied.get_base_model(), image_size), plan)
    spec = tuner.spec
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReductionNotMergedWarning)  # it is attached again right here
        merged = _at_size(copied.merge_and_unload(), image_size)
    if plan.reduces:
        context = ForwardContext()
        for index in range(spec.depth):
            attach_controller(merged, BlockController(index, spec, context, find_rule(merged), plan))
    return ImageFunction(merged.eval(), plan)


def _with_plain_weights(model: PeftModel) -> PeftModel:
    """The model, its weights that `frozen_weights` rounded as plain tensors: a file must not need torchao."""
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            weight = as_plain(module.weight.detach(), torch.float32)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _at_size(model: PreTrainedModel, image_size: int | tuple[int, int] | None) -> PreTrainedModel:
    if image_size is not None:
        set_image_size(model, image_size)
    return model


__all__ = ["ImageFunction", "to_image_function"]
