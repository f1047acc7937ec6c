"""The place in a model whose tokens a feature cache stores: what they depend on, and how a forward resumes there."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from peft_bsr.backbones import Fingerprint
from peft_bsr.core import ResumePoint
from peft_bsr.engine import Plan
from peft_bsr.errors import FeatureCacheError
from peft_bsr.training.cache_files import Key
from peft_bsr.tuners.base.layer import ROOT, AdapterController, SingleAdapterLayer, find_controllers


class CachePoint:
    """The input of the first trained block, or the output of all blocks if none trains and a side network reads them.

    Args:
        model: A model with an active adapter of ours.

    Attributes:
        plan: Plan of the active adapter.
        index: Index of the block whose input is stored; the depth of the model for the output of the last block.
        layers: Blocks whose tokens are stored, if a side network reads them; otherwise empty.

    Raises:
        FeatureCacheError: If there is no adapter, it is disabled, or its plan changes from step to step.
    """

    def __init__(self, model: nn.Module) -> None:
        controllers: list[AdapterController] = find_controllers(model)
        if not controllers:
            raise FeatureCacheError(
                f"{type(model).__name__} has no adapter of peft_bsr. Call get_peft_model(model, BSRConfig()) first."
            )
        controller = controllers[0]
        if controller.is_dynamic:
            raise FeatureCacheError(
                "this adapter's plan changes from step to step, so the output of its blocks cannot be cached. Train "
                "without a cache, or use `BSRConfig`."
            )
        if controller.plan is None:
            raise FeatureCacheError("the adapter is disabled: the base model has no trained block. Enable the adapter.")
        if controller.spec.part is not None:
            raise FeatureCacheError(
                f"the adapter is on `{controller.spec.part}`, and the model around it takes more than its tokens. "
                "Train without a cache."
            )
        self.model, self.spec = model, controller.spec
        self.plan: Plan = controller.plan
        self.layers = controller.read_layers
        self.index = controller.spec.depth if self.layers else self.plan.trained_blocks[0]

    def key(self) -> Key:
        """What the tokens depend on, other than the images."""
        end = self.layers[-1] + 1 if self.layers else self.index
        modules = {name.removeprefix(ROOT): module for name, module in self.model.named_modules()}
        trained = [name for name, module in modules.items() if isinstance(module, SingleAdapterLayer)]
        behind = (*self.spec.blocks[end:], *(self.spec.head if self.layers else ()))
        others = tuple(f"{name}." for name in (*trained, *behind))
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if not name.removeprefix(ROOT).startswith(others):
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        blocks = self.plan.blocks[:end]
        reductions = {str(i): repr(block.reduction) for i, block in enumerate(blocks) if block.reduction}
        place = {"layers": self.layers} if self.layers else {"first_trained_block": self.index}
        model = {f"model_{name}": value for name, value in Fingerprint.of(self.model, self.spec).to_dict().items()}
        return {
            **model,
            "leading_weights": digest.hexdigest(),
            **place,
            "reductions": reductions,
            "mode": self.plan.mode if reductions else "compact",
        }

    def resume_point(
        self, tokens: Tensor, origins: Tensor | None, lengths: tuple[int, ...], merged: Tensor | None = None
    ) -> ResumePoint:
        """The point from which a forward on cached tokens resumes.

        Args:
            tokens: [B, N, D].
            origins: Origins [B, A] of the route there, or None.
            lengths: Number of tokens of each layer that is read, see `ResumePoint`.
            merged: What each patch is part of [B, M] on the route there, or None.
        """
        number = sum(block.reduction is not None for block in self.plan.blocks[: self.index])
        route = (None if places is None else places.long() for places in (origins, merged))
        return ResumePoint(self.index, tokens, next(route), number, lengths, next(route))


__all__ = ["CachePoint"]
