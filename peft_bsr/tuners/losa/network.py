"""The side network of LoSA: for each block that is read, a mixer across channels and one across positions.

Shapes: B images, N tokens `[prefix | patches | suffix]`, A alive ones, D width, r and t ranks.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import KeptTokens, MixerWeights, mix_tokens
from peft_bsr.errors import InputError
from peft_bsr.tuners.losa.config import LoSAConfig, patch_grid


class SideMixer(nn.Module):
    """`c + t` of tokens u: `c = W_up gelu(W_down LN(u))` for each token, `t` the same for each channel of LN(u) + c.

    Both `up` start at zero.

    Args:
        spec: Description of the model.
        config: Ranks, and the patch grid of the token mixer.
    """

    def __init__(self, spec: ModelSpec, config: LoSAConfig) -> None:
        super().__init__()
        self.grid = patch_grid(config, spec)
        self.num_prefix, self.num_suffix = spec.num_prefix, spec.num_suffix
        self.kept: KeptTokens = config.kept_tokens
        self.norm = nn.LayerNorm(spec.width)
        self.channel_down, self.channel_up = nn.Linear(spec.width, config.r), nn.Linear(config.r, spec.width)
        starts = [self.channel_up.weight, self.channel_up.bias, self.channel_down.bias]
        self.mixes_tokens = config.token_mixing
        if self.mixes_tokens:
            number = spec.num_special + prod(self.grid)
            self.token_down, self.token_up = nn.Linear(number, config.token_r), nn.Linear(config.token_r, number)
            starts += [self.token_up.weight, self.token_up.bias, self.token_down.bias]
        for tensor in starts:
            nn.init.zeros_(tensor)

    def forward(self, tokens: Tensor, grid: tuple[int, ...], places: Tensor | None, num_fused: int) -> Tensor:
        """Compute the block's contribution to the side state.

        Args:
            tokens: u [B, N or A, D].
            grid: Patch grid of the image.
            places: Indices of the alive tokens in the full sequence, [B, A] int64. None = all tokens.
            num_fused: Number of fused tokens, whose indices are after the end of the full sequence.

        Returns:
            [B, N or A, D], in autocast's dtype, or without autocast in that of the weights.
        """
        own: list[nn.LayerNorm | nn.Linear] = [self.norm, self.channel_down, self.channel_up]
        weights: list[Tensor] = [tensor for module in own for tensor in (module.weight, module.bias)]
        if self.mixes_tokens:
            weights += self.token_weights(grid, places, num_fused)
        device = tokens.device.type
        if torch.is_autocast_enabled(device):
            weights = [weight.to(torch.get_autocast_dtype(device)) for weight in weights]
        return mix_tokens(tokens, MixerWeights(*weights), self.norm.eps, self.kept)

    def token_weights(self, grid: tuple[int, ...], places: Tensor | None, num_fused: int) -> list[Tensor]:
        """Weights and biases of the token mixer for an image's patch grid, see `MixerWeights`."""
        down, up = self.token_down, self.token_up
        if grid == self.grid and places is None:
            return [down.weight, down.bias, up.weight, up.bias]
        table = torch.cat([down.weight.t(), up.weight, up.bias[:, None]], dim=1)
        if grid != self.grid:
            table = self._resized(table, grid)
        if places is not None:  # a fused token has no position and is not mixed
            table = nn.functional.pad(table, (0, 0, 0, num_fused))[places]
        of_down, of_up, bias = table.split([down.out_features, down.out_features, 1], dim=-1)
        return [of_down.transpose(-1, -2), down.bias, of_up, bias[..., 0]]

    def _resized(self, table: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Interpolate the table [N, 2 t + 1] to another grid: bicubic, scaled so that sums over patches are unchanged.

        Raises:
            InputError: If one of the two is not the grid of one image.
        """
        if len(self.grid) != 2 or len(grid) != 2:
            raise InputError(
                f"LoSA's token mixers are made for {' x '.join(map(str, self.grid))} patches, but the input has "
                f"{' x '.join(map(str, grid))}, and only 2-D grids are interpolated. Call the model with "
                "inputs of the size that the adapter was attached for, or train with `token_mixing=False`."
            )
        prefix, patches, suffix = table.split([self.num_prefix, prod(self.grid), self.num_suffix])
        image = patches.float().t().unflatten(1, self.grid)[None]
        image = nn.functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        patches = image[0].flatten(1).t()
        rank = self.token_down.out_features
        factor = patches.new_ones(patches.shape[1])
        factor[:rank] = prod(self.grid) / prod(grid)
        return torch.cat([prefix, (patches * factor).to(table.dtype), suffix])


__all__ = ["SideMixer"]
