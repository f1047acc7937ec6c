"""Pool the tokens of a headless vision model into one vector per image, in the way each family was trained for.

Shapes: B images, N tokens, P prefix tokens, M patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from peft_bsr.compat.transformers_api import backbone_class_of, classifiers_of

Pool = Literal["class", "mean", "class+mean", "attention"]
POOLS: tuple[Pool, ...] = get_args(Pool)


@dataclass(frozen=True)
class FamilyPool:
    """How to pool a family's tokens.

    Attributes:
        pool: Pooling that the family was trained for.
        why: The reason, as a clause.
        norm: Name of the backbone's last norm if it is not applied to `last_hidden_state`.
        new_norm: Whether to add a new LayerNorm before pooling, because the backbone has no last norm.
    """

    pool: Pool
    why: str
    norm: str | None = None
    new_norm: bool = False


_OWN_CLASSIFIER = "as its released classifier does"
_CONTRASTIVE = "it was trained against texts"
FAMILY_POOLS: dict[str, FamilyPool] = {
    "aimv2_vision_model": FamilyPool("attention", "it was evaluated with one"),
    "blip_vision_model": FamilyPool("class", _CONTRASTIVE),
    "chinese_clip_vision_model": FamilyPool("class", _CONTRASTIVE, norm="post_layernorm"),
    "clip_vision_model": FamilyPool("class", _CONTRASTIVE, norm="post_layernorm"),
    "dinov2": FamilyPool("class+mean", _OWN_CLASSIFIER),
    "dinov2_with_registers": FamilyPool("class+mean", _OWN_CLASSIFIER),
    "dinov3_vit": FamilyPool("class+mean", _OWN_CLASSIFIER),
    "internvl_vision": FamilyPool("mean", "the language model reads patches, not the class token"),
    "metaclip_2_vision_model": FamilyPool("class", _CONTRASTIVE, norm="post_layernorm"),
    "mlcd_vision_model": FamilyPool("class", "it was trained to tell clusters apart", "post_layernorm"),
    "owlv2_vision_model": FamilyPool("class", _CONTRASTIVE, norm="post_layernorm"),
    "owlvit_vision_model": FamilyPool("class", _CONTRASTIVE, norm="post_layernorm"),
    "pixio": FamilyPool("class", "its own pooling is their mean"),
    "radio": FamilyPool("class", "they are its summary, one for each teacher", new_norm=True),
    "siglip2_vision_model": FamilyPool("attention", "its own, which was trained against texts"),
    "siglip_vision_model": FamilyPool("attention", "its own, which was trained against texts"),
    "vit_mae": FamilyPool("mean", "as it was fine-tuned by its authors"),
}
"""`model_type` of a backbone -> how to pool its tokens."""


def family_pool(config: PreTrainedConfig, num_prefix: int) -> FamilyPool:
    """The family's entry. Without one, the class token if there are prefix tokens, else the mean.

    Args:
        config: Configuration of the backbone.
        num_prefix: Number of tokens before the patches, P.
    """
    found = FAMILY_POOLS.get(config.model_type)
    if found is None:
        return FamilyPool("class", "it has one") if num_prefix else FamilyPool("mean", "it has no class token")
    if config.model_type == "internvl_vision" and getattr(config, "use_mean_pooling", False):
        return FamilyPool(found.pool, found.why, new_norm=True)  # the model has no last norm then
    return found


def takes_head(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a vision model without a head, to which `with_head` can add one.

    Args:
        config: Configuration of any model.
    """
    if classifiers_of(config):
        return False
    if config.model_type in FAMILY_POOLS:
        return True
    bare = backbone_class_of(config)
    return bare is not None and bare.__name__ in (config.architectures or ())


def class_tokens(config: PreTrainedConfig) -> tuple[int, ...]:
    """Indices of a backbone's class tokens.

    Args:
        config: Configuration of the backbone.
    """
    if config.model_type == "radio":
        return tuple(config.summary_idxs)
    return tuple(range(getattr(config, "n_cls_tokens", 1)))


class TokenPool(nn.Module):
    """Tokens [B, N, D] -> input of a classifier [B, `width`].

    Args:
        pool: One of `POOLS`.
        config: Configuration of the backbone.
        num_prefix: Number of tokens before the patches, P.
        has_own: Whether the backbone has its own attention pool.

    Attributes:
        width: Width of the output, D or a multiple of it.
    """

    def __init__(self, pool: Pool, config: PreTrainedConfig, num_prefix: int, has_own: bool) -> None:
        super().__init__()
        self.pool, self.num_prefix = pool, num_prefix
        self.classes = class_tokens(config)
        self.is_summary = config.model_type == "radio"
        width = config.hidden_size
        self.norm = nn.LayerNorm(width) if family_pool(config, num_prefix).new_norm else None
        self.attention = (
            AttentionPool(width, config.num_attention_heads) if pool == "attention" and not has_own else None
        )
        numbers = {"class": len(self.classes) if self.is_summary else 1, "mean": 1, "attention": 1}
        self.width: int = width * sum(numbers[part] for part in pool.split("+"))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool the tokens.

        Args:
            tokens: Tokens of the backbone, [B, N, D].
            mask: 0 for padding, [B, M]. Default None: no padding.
        """
        if self.norm is not None:
            tokens = self.norm(tokens)
        patches = tokens[:, self.num_prefix :]
        if self.attention is not None:
            pooled: Tensor = self.attention(patches, mask)
            return pooled
        parts = []
        if "class" in self.pool:
            chosen = tokens[:, list(self.classes)]
            parts.append(chosen.flatten(1) if self.is_summary else chosen.mean(1))
        if "mean" in self.pool:
            weights = None if mask is None else mask.to(patches.dtype)[..., None]
            parts.append(patches.mean(1) if weights is None else (patches * weights).sum(1) / weights.sum(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class AttentionPool(nn.Module):
    """One learned query that attends to all patches [B, M, D] -> [B, D], as attentive probing does (arXiv 2202.03026).

    Args:
        width: D.
        num_heads: Heads of the attention.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool patches [B, M, D]; `mask` [B, M] is 0 for padding."""
        heads = (self.num_heads, -1)
        query = self.query.expand(len(patches), -1, -1).unflatten(-1, heads).transpose(1, 2)
        key, value = (linear(patches).unflatten(-1, heads).transpose(1, 2) for linear in (self.key, self.value))
        kept = None if mask is None else mask.bool()[:, None, None]
        pooled = scaled_dot_product_attention(query.to(key.dtype), key, value, attn_mask=kept)
        output: Tensor = self.out(pooled.transpose(1, 2).flatten(1))
        return output


__all__ = [
    "FAMILY_POOLS",
    "POOLS",
    "AttentionPool",
    "FamilyPool",
    "Pool",
    "TokenPool",
    "class_tokens",
    "family_pool",
    "takes_head",
]
