"""The two halves of a pre-norm block, each as stock modules run it and lean. A half gives its change of the tokens.

Shapes: B images, N tokens, Q of them asked for queries, H heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import BlockSpec, ModelSpec, apply_part, attend, computes_weights, first_rows
from peft_bsr.compat.transformers_api import ROTATE, function_of
from peft_bsr.core import BlockCall
from peft_bsr.engine.parts import LinearSource, attention_dropouts, find_mlp, linear_source, norm_source
from peft_bsr.engine.plan import Lean
from peft_bsr.ops import MLPOp, NormOp, ProjectionsOp, lean_dropout, recomputed, token_scores

_KNOWN = ("attention_mask", "position_embeddings")  # what a lean attention knows to do with
_SIDE = 5  # inputs of the attention next to its heads: the mask, and weight and bias of two norms
Changed = tuple[Tensor, list[Any]]  # the change [B, N or Q, D] and what else the attention returns


class StockAttention:
    """norm1, the attention and what follows it, called as modules.

    Args:
        block: The block.
        block_spec: Names of its parts.
    """

    def __init__(self, block: nn.Module, block_spec: BlockSpec) -> None:
        self.block, self.block_spec = block, block_spec

    def __call__(self, tokens: Tensor, arguments: dict[str, Any]) -> Changed:
        """[B, N, D] -> change, others."""
        block, block_spec = self.block, self.block_spec
        attended = getattr(block, block_spec.attention)(apply_part(block, block_spec.norm1, tokens), **arguments)
        attended, *others = attended if isinstance(attended, tuple) else (attended,)
        for name in block_spec.after_attention:
            attended = apply_part(block, name, attended)
        return attended, others


class StockMLP:
    """norm2, the MLP and what follows it, called as modules. `mix` may run in the place of the MLP.

    Args:
        block: The block.
        block_spec: Names of its parts.
    """

    def __init__(self, block: nn.Module, block_spec: BlockSpec) -> None:
        self.block, self.block_spec = block, block_spec

    def __call__(self, tokens: Tensor, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[B, N, D] -> tokens after the half, residual included."""
        block, block_spec = self.block, self.block_spec
        expanded = apply_part(block, block_spec.norm2, tokens)
        if mix is None:
            for name in block_spec.mlp[:-1]:
                expanded = apply_part(block, name, expanded)
            if block_spec.mlp_adds_residual:
                return apply_part(block, block_spec.mlp[-1], expanded, tokens)
            expanded = apply_part(block, block_spec.mlp[-1], expanded)
        else:
            expanded = mix(expanded)
        for name in () if block_spec.mlp_adds_residual else block_spec.after_mlp:
            expanded = apply_part(block, name, expanded)
        return tokens + expanded


class LeanMLP:
    """norm2 and the MLP by `MLPOp`, then what follows it.

    Args:
        block: The block.
        spec: Knows its parts.

    Attributes:
        called: Modules that run as such.

    Raises:
        NotLeanError: With what stands in the way.
    """

    def __init__(self, block: nn.Module, spec: ModelSpec) -> None:
        block_spec = spec.block_spec
        assert block_spec is not None, "only a block whose parts are known is taken apart"
        parts = _known(find_mlp(block, block_spec))
        kind, eps, self.norm = _known(norm_source(getattr(block, block_spec.norm2)))
        self.linears = [_known(linear_source(module)) for module in (*parts.first, parts.last)]
        activation = parts.operator
        if activation is None:
            raise NotLeanError(f"the derivative of {type(parts.activation).__name__} is not known")
        if len(parts.hidden_dropout) > 1:
            raise NotLeanError("several dropouts lie inside of the MLP")
        self.op = MLPOp(kind, eps, tuple(source.scaling for source in self.linears), activation)
        self.hidden_dropout = parts.hidden_dropout
        self.after = [
            *parts.output_dropout,
            *_after(block, () if block_spec.mlp_adds_residual else block_spec.after_mlp),
        ]
        self.called = _called(self.after)

    def __call__(self, tokens: Tensor, lean: Lean) -> Tensor:
        """[B, N, D] -> tokens after the half, residual included."""
        tensors = _read(self.norm, self.linears)
        rate = self.hidden_dropout[0].p if self.hidden_dropout and self.hidden_dropout[0].training else 0.0
        # for the few tokens that a head reads, the first product is computed again at any level
        expanded = self.op(tokens, tensors, lean.save_products and lean.num_queries is None, rate)
        return tokens + _run_after(self.after, expanded)


class LeanAttention:
    """norm1 and the projections by `ProjectionsOp`, the attention itself, then the output projection as a module.

    Args:
        block: The block.
        spec: Knows its parts.

    Attributes:
        called: Modules that run as such.

    Raises:
        NotLeanError: With what stands in the way.
    """

    def __init__(self, block: nn.Module, spec: ModelSpec) -> None:
        block_spec = spec.block_spec
        assert block_spec is not None, "only a block whose parts are known is taken apart"
        if spec.scores_from is None or not spec.num_heads:
            raise NotLeanError("the queries and keys of the attention are not seen")
        self.attention: Any = block.get_submodule(spec.attention)
        inside = {name: path for name, path in spec.paths.items() if name.startswith("attention.")}
        param_modules = {name: block.get_submodule(path) for name, path in inside.items()}
        names = ("qkv",) if "attention.qkv" in param_modules else ("query", "key", "value")
        kind, eps, self.norm = _known(norm_source(getattr(block, block_spec.norm1)))
        self.linears = [_known(linear_source(param_modules.get(f"attention.{name}"))) for name in names]
        self.output: Any = param_modules.get("attention.output")
        if self.output is None:
            raise NotLeanError("no output projection is known")
        width = self.linears[0].out_features // (3 if len(self.linears) == 1 else 1)
        scalings = tuple(source.scaling for source in self.linears)
        self.op = partial(ProjectionsOp, kind, eps, scalings, width // spec.num_heads)
        self.ops: dict[int | None, ProjectionsOp] = {None: self.op()}
        self.head_width = width // spec.num_heads
        self.source, self.scaling = spec.scores_from, spec.scaling or self.head_width**-0.5
        self.rotate = function_of(self.attention, ROTATE)
        norms = [getattr(self.attention, name, None) for name in ("q_norm", "k_norm")]
        self.norms = [
            None if norm is None or isinstance(norm, nn.Identity) else _known(norm_source(norm)) for norm in norms
        ]
        self.rates, dropouts = attention_dropouts(self.attention, getattr(block, block_spec.attention))
        self.after = [*dropouts, *_after(block, block_spec.after_attention)]
        self.called = _called([self.output, *self.after])

    def problem(self, arguments: dict[str, Any]) -> str | None:
        """Why the half cannot run with these arguments, or None."""
        for name, value in arguments.items():
            # a single number speaks of no token (Trainer's `num_items_in_batch` comes by here)
            is_array = isinstance(value, tuple) or (isinstance(value, Tensor) and value.ndim > 0)
            if name not in _KNOWN and is_array:
                return f"the attention is called with `{name}`"
        if self.rotate is None and arguments.get("position_embeddings") is not None:
            return "how the attention rotates its queries and keys is not known"
        return None

    def __call__(self, call: BlockCall, tokens: Tensor, arguments: dict[str, Any], lean: Lean) -> Tensor:
        """[B, N, D] -> change [B, N or Q, D]; scores asked for are left in `call`."""
        mask, tables = arguments.get("attention_mask"), arguments.get("position_embeddings")
        op, tensors, rate = self.op_for(lean.num_queries), self.tensors(), self.rate
        mix = partial(self._mix, call.score, tables, rate, call.admit, not lean.save_products)
        inputs = (mask, *self.norm_tensors())
        if lean.save_products:
            results = mix(*inputs, *op(tokens, tensors))
        else:
            results = recomputed(partial(_project_and_mix, op, mix), tokens, *inputs, *tensors, is_random=rate > 0)
        if call.score is not None:
            call.token_scores = results[1]
        return self.finished(results[0])

    @property
    def rate(self) -> float:
        """Of the dropout on attention weights, now."""
        return max([read() for read in self.rates], default=0.0) if self.attention.training else 0.0

    def op_for(self, num_queries: int | None) -> ProjectionsOp:
        """Norm and projections with so many queries; None = of all tokens."""
        op = self.ops.get(num_queries)
        if op is None:
            op = self.ops[num_queries] = self.op(num_queries)
        return op

    def tensors(self) -> list[Any]:
        """Of norm and projections, as they are now."""
        return _read(self.norm, self.linears)

    def norm_tensors(self) -> list[Tensor | None]:
        """Weight and bias of the query's and of the key's norm."""
        return [*_tensors_of(self.norms[0]), *_tensors_of(self.norms[1])]

    def finished(self, mixed: Tensor) -> Tensor:
        """The output projection and what follows it."""
        return _run_after(self.after, self.output(mixed))

    def _mix(
        self, score: str | None, tables: Any, rate: float, admit: Any, is_recomputed: bool, *inputs: Any
    ) -> tuple[Tensor, ...]:
        """Attention output [B, Q, H * d], and the token scores [B, N] if they are asked for.

        Args:
            score: Kind of the scores.
            tables: Of positions, or None.
            rate: Of the dropout on attention weights.
            admit: Told that square matrices are tokens, where these are kept in 8 bits; or None.
            is_recomputed: Whether nothing of this is kept, since it runs again.
            *inputs: The mask; weight and bias of the query's and the key's norm; query, key and value by heads.
        """
        mask, query_weight, query_bias, key_weight, key_bias, query, key, value = inputs
        query = self._normed(self.norms[0], query, query_weight, query_bias, is_recomputed)
        key = self._normed(self.norms[1], key, key_weight, key_bias, is_recomputed)
        if tables is not None:
            query, key = self._rotated(query, key, tables)
        mask = first_rows(mask, query.shape[2])
        mixed = self._attended(query, key, value, mask, rate, admit)
        return (mixed,) if score is None else (mixed, token_scores(score, query, key, self.scaling, mask))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, rate: float, admit: Any) -> Tensor:
        """The attention's output [B, Q, H * d]; see `_mix`."""
        shows_weights = admit is None or rate or computes_weights(self.attention, self.source)
        if not shows_weights and query.shape[2] == query.shape[3]:
            admit(True)
        mixed = attend(self.attention, self.source, query, key, value, mask, self.scaling, rate)
        if admit is not None:
            admit(False)
        return mixed

    def _normed(self, source: Any, part: Tensor, weight: Tensor, bias: Tensor | None, is_recomputed: bool) -> Tensor:
        """Queries or keys after their norm, over a head or over all of them; only its input and output are kept."""
        if source is None:
            return part
        kind, eps, _ = source
        is_whole = weight.shape[0] != self.head_width
        tokens = part.transpose(1, 2).flatten(2) if is_whole else part
        run = partial(_run_norm, kind, eps)
        (tokens,) = run(tokens, weight, bias) if is_recomputed else recomputed(run, tokens, weight, bias)
        return tokens.unflatten(2, (-1, self.head_width)).transpose(1, 2) if is_whole else tokens

    def _rotated(self, query: Tensor, key: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions; fewer queries are those of the first tokens."""
        assert self.rotate is not None, "looked at in `mismatch`"
        count = query.shape[2]
        if count < key.shape[2]:  # tables have a row for each token
            query = torch.cat([query, key[:, :, count:]], dim=2)
        query, key = self.rotate(query, key, *tables)
        return query[:, :, :count], key


class NotLeanError(Exception):
    """A half cannot run lean, for the reason in its text; never leaves the engine."""


def _project_and_mix(op: ProjectionsOp, mix: Any, tokens: Tensor, *inputs: Any) -> Any:
    """All of a lean attention but the output projection, by plain operations."""
    return mix(*inputs[:_SIDE], *op.plain(tokens, inputs[_SIDE:]))


def _tensors_of(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm[2]["weight"], norm[2].get("bias"))


def _run_norm(kind: type[NormOp], eps: float, tokens: Tensor, weight: Tensor, bias: Any) -> tuple[Tensor]:
    return (kind(weight, bias, eps).run(tokens)[0].to(tokens.dtype),)


def _read(norm: dict[str, Any], linears: Sequence[LinearSource]) -> list[Any]:
    """Tensors of the norm and the Linears as they are now."""
    tensors = [norm["weight"], norm.get("bias")]
    for source in linears:
        tensors += source.read()
    return tensors


def _after(block: nn.Module, names: Sequence[str]) -> list[Any]:
    """What runs after a half's Linears: modules, or vectors that the block holds."""
    parts = [(name, getattr(block, name)) for name in names]
    return [
        part if isinstance(part, nn.Module) else partial(apply_part, block, name)
        for name, part in parts
        if part is not None and not isinstance(part, nn.Identity)
    ]


def _called(parts: Sequence[Any]) -> tuple[nn.Module, ...]:
    """Those that a lean half calls as modules, so that their hooks run."""
    return tuple(part for part in parts if isinstance(part, nn.Module) and type(part) is not nn.Dropout)


def _run_after(parts: Sequence[Any], tokens: Tensor) -> Tensor:
    for part in parts:
        if type(part) is not nn.Dropout:
            tokens = part(tokens)
        elif part.p and part.training:
            tokens = lean_dropout(tokens, part.p)
    return tokens


def _known(found: Any) -> Any:
    if isinstance(found, str):
        raise NotLeanError(found)
    return found
