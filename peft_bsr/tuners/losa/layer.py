"""The block controller of LoSA: reads the block's tokens, and returns the refined ones after the last block.

The side state is passed from block to block in the context of the running forward, not on a module.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import FamilyRule, ModelSpec, main_input
from peft_bsr.core import ForwardContext, Route, pick_tokens, put_tokens
from peft_bsr.engine import StopForwardError
from peft_bsr.errors import ForwardError, InputError
from peft_bsr.ops import exact_parameters
from peft_bsr.tuners.base.reading import ReadingController
from peft_bsr.tuners.blocks.layer import move_away, move_like
from peft_bsr.tuners.losa.config import LoSAConfig
from peft_bsr.tuners.losa.network import SideMixer


@dataclass
class Side:
    """The side network in one forward.

    Attributes:
        grid: Patch grid of the image. None if the image is unknown.
        state: Sum of the mixers' outputs so far, y [B, N or A, D]. None = no output yet.
        places: Indices of the state's tokens in the full sequence, [B, A]. None = all tokens.
        num_reductions: Number of reductions before `places`.
        collected: Tokens and origins of the blocks that are read, in a forward that only collects them.
    """

    grid: tuple[int, ...] | None = None
    state: Tensor | None = None
    places: Tensor | None = None
    num_reductions: int = 0
    collected: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)


class LoSAController(ReadingController):
    """A block controller with each adapter's mixer for the block, if the block is read.

    Args:
        index, spec, context, rule: See `BlockController`.
    """

    refines = True
    adapter_layer_names = ("bsr_params",)

    def __init__(self, index: int, spec: ModelSpec, context: ForwardContext, rule: FamilyRule) -> None:
        super().__init__(index, spec, context, rule)
        self.bsr_params = nn.ModuleDict()
        self.saved_as: dict[str, str] = {}  # adapter -> this module's name in the adapter's file, if it differs

    def update_layer(self, adapter_name: str, config: LoSAConfig, block: nn.Module) -> None:
        """Add an adapter's mixer.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            block: The block.
        """
        mixer, like = SideMixer(self.spec, config), next(exact_parameters(block))
        if not config.init_weights:
            move_away(mixer)
        move_like(mixer, like, like.device)
        self.bsr_params[adapter_name] = mixer

    @property
    def read_layers(self) -> list[int]:
        """The blocks that are read, and the last one on which the head depends, whose tokens are refined."""
        name = self.carried_adapter
        return [] if name is None else sorted({*self.layers[name], self.spec.last_read})

    def attached(self, model: nn.Module) -> None:
        """Register the hook that reads the images, after the forward's context is opened."""
        if self.index == self.spec.depth - 1:
            model.register_forward_pre_hook(self.see_image, with_kwargs=True)

    def see_image(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Store the patch grid of the image."""
        image, spec = kwargs.get(main_input(model), args[0] if args else None), self.spec
        if self.plan is None or not isinstance(image, Tensor) or spec.grid is None:
            return
        side = self.context.now.reading = Side()
        if tuple(image.shape[1:]) == spec.image_shape:
            side.grid = spec.grid
        elif len(spec.grid) == 2 and image.ndim == 4:
            side.grid = image.shape[2] // spec.patch_size[0], image.shape[3] // spec.patch_size[1]

    def refine(self, block: nn.Module, tokens: Tensor, route: Route | None) -> Tensor:
        """Read the block if it is to be read. After the last one that the head depends on, add the state to its tokens.

        Raises:
            StopForwardError: After that block, if the forward only collects tokens.
            ForwardError: If the block was called outside of the model's forward.
            InputError: If the token mixers cannot be interpolated to the patch grid.
            AdapterError: If the block is sharded by itself.
        """
        if self.context.now.resume_point is not None:
            self._collect(tokens, route)
            return tokens
        return self._step(block, tokens, route)

    def instead(
        self, block: nn.Module, hidden_states: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor | None:
        """Skip the block if the forward starts with the tokens of all blocks that are read."""
        now, layers = self.context.now, self.read_layers
        resume_point = now.resume_point
        if resume_point is None or not resume_point.starts:
            return None
        if self.index not in layers:
            return hidden_states
        place, plan, route = layers.index(self.index), self.plan, now.route
        tokens = resume_point.part(place)
        if resume_point.origins is not None and route is not None and plan is not None:
            alive = [length - self.spec.num_special for length in resume_point.lengths]
            number = sum(part.reduction is not None for part in plan.blocks[: self.index + 1])
            route = replace(route, origins=resume_point.origins.split(alive, dim=1)[place], num_reductions=number)
        return self._step(block, tokens.to(hidden_states.dtype), route)

    def _step(self, block: nn.Module, tokens: Tensor, route: Route | None) -> Tensor:
        name = self.carried_adapter
        assert name is not None, "a controller without an adapter has no plan, and its block runs untouched"
        is_read, is_last = self.index in self.layers[name], self.index == self.spec.last_read
        if not (is_read or is_last):
            return tokens
        self.refuse_sharded(block, "LoSA")
        side = self._side(is_first=self.index == self.layers[name][0])
        self._follow(side, route)
        if is_read:
            mixer: Any = self.bsr_params[name]
            inputs = tokens if side.state is None else (tokens + side.state).to(tokens.dtype)
            change = mixer(inputs, self._grid(side, tokens, route, mixer), side.places, side.num_reductions)
            change = change.to(torch.promote_types(change.dtype, tokens.dtype))
            side.state = change if side.state is None else side.state + change
        return self._refined(block, tokens, side) if is_last else tokens

    def _side(self, is_first: bool) -> Side:
        side = self.context.now.reading
        if not isinstance(side, Side):
            if not is_first:
                raise ForwardError(
                    "a block that LoSA reads was called outside of the model's forward. Call the model. If this is a "
                    "backward pass, disable the gradient checkpointing that wraps the block's call."
                )
            side = self.context.now.reading = Side()
        return side

    def _follow(self, side: Side, route: Route | None) -> None:
        """Select the state of the tokens that are left. New fused tokens start at zero."""
        if route is None or route.is_full_view or route.num_reductions == side.num_reductions:
            return
        places = route.places()
        if side.state is not None:
            number = route.full_length + route.num_reductions
            if side.places is None:
                whole = nn.functional.pad(side.state, (0, 0, 0, route.num_reductions))
            else:
                whole = side.state.new_zeros(len(places), number, side.state.shape[2])
                whole = put_tokens(whole, side.places, side.state)
            side.state = pick_tokens(whole, places)
        side.places, side.num_reductions = places, route.num_reductions

    def _grid(self, side: Side, tokens: Tensor, route: Route | None, mixer: SideMixer) -> tuple[int, ...]:
        """The patch grid of the image, if the token mixer needs it."""
        if not mixer.mixes_tokens:
            return ()
        number = tokens.shape[1] - self.spec.num_special if route is None else route.num_patches
        grids = [grid for grid in (side.grid, self.spec.grid, mixer.grid) if grid is not None]
        found = next((grid for grid in grids if prod(grid) == number), None)
        if found is None:
            raise InputError(
                f"LoSA's token mixers are made for {' x '.join(map(str, mixer.grid))} patches, but this input has "
                f"{number} in an unknown grid. Call the model with images, or train with `token_mixing=False`."
            )
        return found

    def _refined(self, block: nn.Module, tokens: Tensor, side: Side) -> Tensor:
        if side.state is None:
            return tokens
        state = side.state
        if block.training and torch.is_grad_enabled() and self._reads_prefix_alone() and not self.other_reader(block):
            # the head's norm keeps what it gets
            tokens, state = tokens[:, : self.spec.num_prefix], state[:, : self.spec.num_prefix]
        return (tokens + state).to(tokens.dtype)

    def _reads_prefix_alone(self) -> bool:
        spec, plan = self.spec, self.plan
        is_last = spec.last_read == spec.depth - 1 and spec.part is None  # a larger model may return all tokens
        reads_others = spec.reads_patches or spec.reads_suffix or not spec.reads_prefix
        return is_last and not reads_others and plan is not None and plan.mode == "compact"

    def _collect(self, tokens: Tensor, route: Route | None) -> None:
        """Collect the tokens for the resume point. After the last block, stop the forward."""
        layers, now = self.read_layers, self.context.now
        if self.index not in layers:
            return
        side = self._side(is_first=self.index == layers[0])
        is_shorter = route is not None and not route.is_full_view
        side.collected.append((tokens, route.origins_like(tokens) if is_shorter and route is not None else None))
        if self.index == layers[-1]:
            resume_point, found = now.resume_point, side.collected
            assert resume_point is not None, "tokens are collected for a resume point"
            resume_point.fill([tokens for tokens, _ in found])
            origins = [part for _, part in found if part is not None]
            resume_point.origins = torch.cat(origins, dim=1) if origins else None
            raise StopForwardError

    def __repr__(self) -> str:
        return f"losa.LoSAController(block={self.index}, adapters={sorted(self.plans)})"


__all__ = ["LoSAController", "Side"]
