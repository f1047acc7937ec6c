"""The trained modules of SynQT: prompts that become queries, and a head that fuses what they read.

Shapes: B images, T queries, L layers that are read, D width, F = 1 + 3 L features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear

from peft_bsr.tuners.synqt.config import SynQTConfig


class Adapter(nn.Module):
    """`A_r(z) = z + W2 (s * dropout(gelu(W1 z)))`, r wide inside; starts as the identity.

    s is a learned scalar that starts at 1. It is applied before W2, where its gradient needs r values per token instead
    of D.

    Args:
        width: Embedding dimension, D.
        bottleneck: Inner width, r.
        rate: Dropout rate. Default 0.
    """

    def __init__(self, width: int, bottleneck: int, rate: float = 0.0) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.ones(1))
        self.rate = rate
        for tensor in (self.up.weight, self.up.bias, self.down.bias):
            nn.init.zeros_(tensor)

    def forward(self, tokens: Tensor, factor: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D], times `factor` if it is given, a learned scalar that is also applied before W2."""
        inside = dropout(gelu(self.down(tokens)), self.rate, self.training) * self.scale
        if factor is None:
            return tokens + self.up(inside)
        return factor * tokens + linear(factor * inside, self.up.weight, factor * self.up.bias)


class QuerySynthesis(nn.Module):
    """The queries of one layer, from prompts and the previous layer's feature, by adapters and a self-attention.

    ```
    z = A(P + s_feat H);  z = z + a SelfAttention(LN(z));  z = z + f A'(LN(z));  Hq = dropout(z)
    ```
    The self-attention has one head over D; its queries, keys, values and output are adapters without dropout, and the
    first three are normalized, each by its own LayerNorm.

    Args:
        width: D.
        config: Sizes, scales and rates.
        holds_scale: Whether it contains `s_feat`, which all layers share: only the first of several layers does.
    """

    def __init__(self, width: int, config: SynQTConfig, holds_scale: bool) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(config.num_queries, width).uniform_(-1, 1))
        self.prompt_adapter = Adapter(width, config.bottleneck, config.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (Adapter(width, config.attention_bottleneck) for _ in range(4))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention_scale = nn.Parameter(torch.full((1,), float(config.attention_scale)))
        self.norm2 = nn.LayerNorm(width)
        self.ffn_adapter = Adapter(width, config.bottleneck, config.dropout)
        self.ffn_scale = nn.Parameter(torch.full((1,), float(config.ffn_scale)))
        self.feature_scale = nn.Parameter(torch.full((1,), float(config.feature_scale))) if holds_scale else None
        self.rate = config.dropout

    def forward(self, feature: Tensor | None, feature_scale: Tensor | None, batch_size: int) -> Tensor:
        """Make the queries.

        Args:
            feature: H of the previous layer, [B, 1, D]. None in the first layer.
            feature_scale: s_feat.
            batch_size: Batch size, B.

        Returns:
            Hq [B, T, D].
        """
        queries = self.prompts.expand(batch_size, -1, -1)
        if feature is not None and feature_scale is not None:
            queries = queries + feature_scale * feature
        queries = self.prompt_adapter(queries)
        queries = queries + self.attend(self.norm1(queries))
        queries = queries + self.ffn_adapter(self.norm2(queries), self.ffn_scale)
        return dropout(queries, self.rate, self.training)

    def attend(self, tokens: Tensor) -> Tensor:
        """The self-attention of normalized tokens [B, T, D], times its scale."""
        query = self.query_norm(self.query(tokens))
        key = self.key_norm(self.key(tokens))
        value = self.value_norm(self.value(tokens))
        weights = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(dim=-1)
        attended: Tensor = self.output(weights @ value, self.attention_scale)
        return attended


class FusingHead(nn.Module):
    """Logits from the features of all layers: each is adapted and weighted by the last one, then they are averaged.

    ```
    u = f + A(LN(f));  w = [1, tanh(dropout(gelu(G u_0)))];  logits = classifier(LN'(mean(w u)))
    ```
    LN, A and G are shared by all features; G has no bias. In training, drop-path skips `A(LN(f))` per image and
    feature, except for the first feature.

    Args:
        width: D.
        num_layers: Number of layers, L.
        num_labels: Number of classes.
        config: Sizes and rates.
        final_norm: The backbone's final norm, which initializes LN'. None = LN' starts as the identity.
    """

    def __init__(
        self, width: int, num_layers: int, num_labels: int, config: SynQTConfig, final_norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.adapter = Adapter(width, config.bottleneck, config.dropout)
        self.gate = nn.Linear(width, 3 * num_layers, bias=False)
        self.final_norm = nn.LayerNorm(width)
        if isinstance(final_norm, nn.LayerNorm):
            self.final_norm.eps = final_norm.eps
            with torch.no_grad():
                for name, parameter in final_norm.named_parameters():
                    if not parameter.is_meta:  # a model without weights has nothing to copy
                        self.final_norm.get_parameter(name).copy_(parameter)
        self.classifier = nn.Linear(width, num_labels)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.rate, self.drop_path = config.dropout, config.drop_path

    def forward(self, features: Tensor) -> Tensor:
        """[B, F, D], ordered [H_L, H_1..H_L, F_att_1..F_att_L, F_ffn_1..F_ffn_L] -> [B, classes]."""
        adapted = features + self._drop_paths(self.adapter(self.norm(features)))
        gates = torch.tanh(dropout(gelu(self.gate(adapted[:, 0])), self.rate, self.training))
        weights = torch.cat([torch.ones_like(gates[:, :1]), gates], dim=1)
        fused = torch.bmm(weights[:, None].to(adapted.dtype), adapted)[:, 0] / adapted.shape[1]
        logits: Tensor = self.classifier(self.final_norm(fused))
        return logits

    def _drop_paths(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        stays = torch.full(branch.shape[:2], 1 - self.drop_path, device=branch.device).bernoulli()
        stays = stays / (1 - self.drop_path)
        stays[:, 0] = 1
        return branch * stays[..., None].to(branch.dtype)
