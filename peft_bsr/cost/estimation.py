"""Predicts the memory and compute of a training step, without running it and without the model's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_bsr.backbones import input_shapes, probe_inputs, tensors_of
from peft_bsr.compat.torch_api import NeedsValues, no_memory
from peft_bsr.cost.compiled import kept_when_compiled
from peft_bsr.cost.dry_run import DryRun, HostMemory, dry_run, without_memory
from peft_bsr.cost.proxy import attach_resolved, on_meta, resolve_narrow
from peft_bsr.cost.setup import Setup, library_bytes, optimizer_bytes, update_bytes
from peft_bsr.engine import Plan, WeightOffload
from peft_bsr.errors import ConfigError, UnsupportedModelError
from peft_bsr.tuners import method_of
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.blocks.config import BlockConfig
from peft_bsr.tuners.blocks.layer import BlockWeights

_DEFAULT = Setup()


@dataclass(frozen=True)
class Estimate:
    """Predicted memory and compute of a training step, without Python, torch and internal memory of kernels.

    Attributes:
        weights_bytes: Parameters and buffers in memory, without base weights that are offloaded to files.
        optimizer_bytes: Optimizer state of all trainable parameters.
        gradients_bytes: Gradients of parameters in memory at the peak.
        activations_bytes: Activations saved for backward, in memory at the peak.
        workspace_bytes: The batch, and temporary memory of operations, at the peak.
        library_bytes: Workspaces of cuBLAS, on CUDA.
        saved_bytes: Activations of the batch saved for backward, at the end of the forward; see `saved_activations`.
        training_flops: FLOPs of forward and backward for the batch.
        batch_size: Images per step.
        trainable_parameters: Number of trainable parameters.
        plan: Plan of the adapter, or None without an adapter of this package.
        host_bytes: Memory offloaded from the device to the CPU: inputs of blocks, optimizer state.
    """

    weights_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    workspace_bytes: int
    library_bytes: int
    saved_bytes: int
    training_flops: int
    batch_size: int
    trainable_parameters: int
    plan: Plan | None = None
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The peak: the sum of the first six."""
        return sum(getattr(self, name) for name in self._parts())

    def describe(self) -> str:
        """One line for each part, and one for the peak."""
        lines = [f"{name.removesuffix('_bytes'):<11}{getattr(self, name) / 2**20:>9.1f} MiB" for name in self._parts()]
        return "\n".join([*lines, f"{'peak':<11}{self.total_bytes / 2**20:>9.1f} MiB"])

    @classmethod
    def _parts(cls) -> list[str]:
        return [field.name for field in fields(cls)][:6]


@torch.inference_mode(False)  # the dry run needs gradients, also if the caller has disabled them
def estimate(
    model: nn.Module,
    config: PeftConfig | None = None,
    setup: Setup = _DEFAULT,
    **settings: Any,
) -> Estimate:
    """Predict memory and compute for training `model` with an adapter, by running a step on tensors without memory.

    Args:
        model: A vision model of transformers, best without weights: `with torch.device("meta"): Class(config)`. If
            `config` is None, its parameters that require gradients are trained. The model is not changed.
        config: Configuration of a method of this package (for ALaST the first step is predicted) or of PEFT. Default
            None: train the parameters that require gradients (full fine-tuning). `frozen_weights="int8"` does not need
            torchao here.
        setup: How the model is trained. Default `Setup()`.
        settings: Fields of `Setup` that override `setup`, such as `batch_size=8`.

    Returns:
        An `Estimate`.

    Raises:
        ConfigError: If an argument is out of range, or this model does not support the config.
        UnsupportedModelError: If the model is not one of transformers that this package supports, or computes with
            numbers that it reads from tensors.

    Examples:
        >>> from peft_bsr import BSRConfig
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> with torch.device("meta"):
        ...     vit = ViTForImageClassification(ViTConfig(num_labels=10))
        >>> found = estimate(vit, BSRConfig(), batch_size=8)
        >>> f"{found.saved_bytes / 8 / 2**20:.1f} MiB per image are kept for backward"
        '18.3 MiB per image are kept for backward'
    """
    setup = replace(setup, **settings)
    method = None if config is None else method_of(config)
    is_compiled = setup.compile and not (method and method.is_dynamic)  # whose compiled halves save the same
    if setup.compile and isinstance(config, BlockConfig):  # saved activations are not quantized there
        config = replace(config, saved_activations="full")
    bare = on_meta(model, setup.image_size, setup.dtype)
    adapted: nn.Module = bare
    plan = None
    spared = made_anew = 0
    if isinstance(config, SavedConfig):
        resolution = resolve_narrow(bare, config)
        adapted, in_8_bits = attach_resolved(bare, config, resolution)
        plan, (spared, made_anew) = resolution.plan, _eight_bits(bare, in_8_bits)
    elif config is not None:
        adapted = get_peft_model(bare, copy.deepcopy(config))
    host = HostMemory()
    if setup.gradient_checkpointing:
        arguments = {"use_reentrant": False, "preserve_rng_state": False}
        if not bare.supports_gradient_checkpointing:
            raise UnsupportedModelError(
                f"{type(bare).__name__} of transformers does not support gradient checkpointing. Use "
                "`gradient_checkpointing=False`."
            )
        enable = getattr(bare, "activation_checkpointing_enable", None) or bare.gradient_checkpointing_enable
        enable(arguments)
    device = setup.device if _is_there(setup.kind) else "cpu"
    nowhere = no_memory()
    with nowhere:
        trained = without_memory(adapted, device).train()
        if setup.gradient_checkpointing == "offload":
            host.take_inputs_of_checkpoints(trained)
        inputs = probe_inputs(_innermost(trained), setup.batch_size, input_shapes(bare)[-1])
        weights = [p for p in trained.parameters() if p.requires_grad]  # all of them: a step may select some

    def forward(called: Callable[..., object] = trained) -> Tensor:
        with torch.autocast(torch.device(device).type, setup.autocast, enabled=setup.autocast is not None):
            output = called(**inputs)
        return _loss(output)

    try:
        with nowhere:
            run = dry_run(trained, inputs.values(), forward)
    except NeedsValues as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads numbers from tensors in its forward, and here they have none. Attach the "
            "adapter and measure it with `peft_bsr.cost.saved_activations`."
        ) from error
    if is_compiled:
        run = run.scaled(kept_when_compiled(trained, forward))
    batch_bytes = sum(tensor.nbytes for tensor in inputs.values())
    found = _summarize(trained, weights, run, batch_bytes, setup, plan)
    return replace(
        found,
        weights_bytes=found.weights_bytes - spared,
        workspace_bytes=found.workspace_bytes + made_anew,
        host_bytes=found.host_bytes + host.most_bytes,
    )


def _eight_bits(model: nn.Module, names: list[str]) -> tuple[int, int]:
    """Bytes saved by weights in 8 bits (with a scale and zero point per row), and bytes of the largest restored one."""
    weights = [cast("nn.Linear", model.get_submodule(name)).weight for name in names]
    kept = sum(weight.numel() + len(weight) * (weight.itemsize + 1) for weight in weights)
    return sum(weight.nbytes for weight in weights) - kept, max((weight.nbytes for weight in weights), default=0)


def _is_there(kind: str) -> bool:
    """Whether this machine has such a device: torch asks it to choose kernels, also for tensors without memory."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return kind == "cpu" or (accelerator is not None and accelerator.type == kind)


def _innermost(model: PeftModel | BaseTuner | PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "model", model)


def _loss(output: object) -> Tensor:
    outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
    if not outputs:
        raise ConfigError("nothing trains: no output of the model depends on a parameter with `requires_grad=True`.")
    return torch.stack([tensor.float().sum() for tensor in outputs]).sum()


def _summarize(
    model: nn.Module, trained: list[nn.Parameter], run: DryRun, batch_bytes: int, setup: Setup, plan: Plan | None
) -> Estimate:
    layers = (module for module in model.modules() if isinstance(module, BlockWeights))
    in_files = sum(p.nbytes for layer in layers if layer.offloads_base for p in WeightOffload.takes(layer.base_layer))
    parts = (run.gradient_bytes, run.activation_bytes, run.workspace_bytes)
    copied = update_bytes(setup.optimizer, setup.kind, trained)
    update = (sum(p.nbytes for p in trained), 0, batch_bytes + copied)
    held, offloaded = optimizer_bytes(setup.optimizer, trained)
    return Estimate(
        sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - in_files,
        held,
        *max(parts, update, key=sum),
        library_bytes=library_bytes(setup.kind),
        saved_bytes=run.saved_bytes,
        training_flops=run.flops,
        batch_size=setup.batch_size,
        trainable_parameters=sum(p.numel() for p in trained),
        plan=plan,
        host_bytes=offloaded,
    )


__all__ = ["Estimate", "estimate"]
