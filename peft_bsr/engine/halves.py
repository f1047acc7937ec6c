"""The two halves of a pre-norm block: stock, by the block's own modules, and lean, keeping less for backward.

Shapes: B images, N tokens, Q of them used as queries, H heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peft_bsr.backbones import BlockSpec, ModelSpec, apply_part, attend, computes_weights, first_rows
from peft_bsr.backbones.lookup import rotation_of
from peft_bsr.core import BlockCall
from peft_bsr.engine.parts import LinearSource, NormSource, attention_dropouts, find_mlp, linear_source, norm_source
from peft_bsr.engine.plan import Lean
from peft_bsr.ops import MLPOp, NormOp, ProjectionsOp, lean_dropout, recomputed, token_scores

_KNOWN = ("attention_mask", "position_embeddings", "rope")  # arguments that a lean attention supports
_SIDE = 5  # inputs of `_mix` before query, key and value: the mask, and weight and bias of two norms
Changed = tuple[Tensor, list[object]]  # the change [B, N or Q, D], and the attention's other outputs
Admit = Callable[[bool], None]  # see `BlockCall.admit`
Source = TypeVar("Source")


class StockAttention:
    """norm1, the attention and what follows it, called as modules.

    Args:
        block: The block.
        block_spec: Names of its parts.
    """

    def __init__(self, block: nn.Module, block_spec: BlockSpec) -> None:
        self.block, self.block_spec = block, block_spec

    def __call__(self, tokens: Tensor, arguments: dict[str, object]) -> Changed:
        """[B, N, D] -> change, other outputs."""
        block, block_spec = self.block, self.block_spec
        attended = getattr(block, block_spec.attention)(apply_part(block, block_spec.norm1, tokens), **arguments)
        attended, *others = attended if isinstance(attended, tuple) else (attended,)
        for name in block_spec.after_attention:
            attended = apply_part(block, name, attended)
        return attended, others


class StockMLP:
    """norm2, the MLP and what follows it, called as modules. `mix` may replace the MLP.

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
        spec: Description of the model.

    Attributes:
        called: Modules that it calls, so that their hooks run.

    Raises:
        NotLeanError: If the half cannot run lean, with the reason.
    """

    def __init__(self, block: nn.Module, spec: ModelSpec) -> None:
        block_spec = spec.block_spec
        assert block_spec is not None, "only blocks with known parts are split into halves"
        parts = _known(find_mlp(block, block_spec))
        kind, eps, self.norm = _known(norm_source(getattr(block, block_spec.norm2) if block_spec.norm2 else None))
        self.linears = [_known(linear_source(module)) for module in (*parts.first, parts.last)]
        activation = parts.operator
        if activation is None:
            raise NotLeanError(f"the derivative of {type(parts.activation).__name__} is not known")
        if len(parts.hidden_dropout) > 1:
            raise NotLeanError("the MLP has several dropouts before its last Linear")
        self.op = MLPOp(kind, eps, tuple(source.scaling for source in self.linears), activation)
        self.hidden_dropout = parts.hidden_dropout
        self.after: list[Callable[[Tensor], Tensor]] = [
            *parts.output_dropout,
            *_after(block, () if block_spec.mlp_adds_residual else block_spec.after_mlp),
        ]
        self.called = _called(self.after)

    def __call__(self, tokens: Tensor, lean: Lean) -> Tensor:
        """[B, N, D] -> tokens after the half, residual included."""
        return tokens + self.expanded(tokens, lean)

    def expanded(self, tokens: Tensor, lean: Lean) -> Tensor:
        """[B, N, D] -> change [B, N, D]."""
        tensors = _read(self.norm, self.linears)
        rate = self.hidden_dropout[0].p if self.hidden_dropout and self.hidden_dropout[0].training else 0.0
        # for the few tokens that a head reads, the first product is recomputed at both levels
        expanded = self.op(tokens, tensors, lean.save_products and lean.num_queries is None, rate)
        return _run_after(self.after, expanded)


class LeanAttention:
    """norm1 and the projections by `ProjectionsOp`, the attention itself, then the output projection as a module.

    Args:
        block: The block.
        spec: Description of the model.

    Attributes:
        called: Modules that it calls, so that their hooks run.

    Raises:
        NotLeanError: If the half cannot run lean, with the reason.
    """

    def __init__(self, block: nn.Module, spec: ModelSpec) -> None:
        block_spec = spec.block_spec
        assert block_spec is not None, "only blocks with known parts are split into halves"
        if spec.scores_from is None or not spec.num_heads:
            raise NotLeanError("the probe did not find the attention's queries and keys")
        self.attention = block.get_submodule(spec.attention)
        inside = {name: path for name, path in spec.paths.items() if name.startswith("attention.")}
        param_modules = {name: block.get_submodule(path) for name, path in inside.items()}
        names = ("qkv",) if "attention.qkv" in param_modules else ("query", "key", "value")
        kind, eps, self.norm = _known(norm_source(getattr(block, block_spec.norm1)))
        self.linears = [_known(linear_source(param_modules.get(f"attention.{name}"))) for name in names]
        output = param_modules.get("attention.output")
        if output is None:
            raise NotLeanError("no output projection was found")
        self.output = output
        width = self.linears[0].out_features // (3 if len(self.linears) == 1 else 1)
        scalings = tuple(source.scaling for source in self.linears)
        self.op = partial(ProjectionsOp, kind, eps, scalings, width // spec.num_heads)
        self.ops: dict[int | None, ProjectionsOp] = {None: self.op()}
        self.head_width = width // spec.num_heads
        self.source, self.scaling = spec.scores_from, spec.scaling or self.head_width**-0.5
        self.rotate = rotation_of(self.attention)
        norms = [getattr(self.attention, name, None) for name in ("q_norm", "k_norm")]
        self.norms: list[NormSource | None] = [
            None if norm is None or isinstance(norm, nn.Identity) else _known(norm_source(norm)) for norm in norms
        ]
        self.rates, dropouts = attention_dropouts(self.attention, getattr(block, block_spec.attention))
        self.after: list[Callable[[Tensor], Tensor]] = [*dropouts, *_after(block, block_spec.after_attention)]
        self.called = _called([self.output, *self.after])

    def problem(self, arguments: dict[str, object]) -> str | None:
        """Why the half cannot run with these arguments, or None."""
        for name, value in arguments.items():
            # a scalar does not depend on the tokens (Trainer passes `num_items_in_batch`)
            is_array = isinstance(value, tuple) or (isinstance(value, Tensor) and value.ndim > 0)
            if name not in _KNOWN and is_array:
                return f"the attention is called with `{name}`"
        if self.rotate is None and known_arguments(arguments)[1] is not None:
            return "the function that rotates the attention's queries and keys was not found"
        return None

    def __call__(self, call: BlockCall, tokens: Tensor, arguments: dict[str, object], lean: Lean) -> Tensor:
        """[B, N, D] -> change [B, N or Q, D]; scores, if asked for, are stored in `call`."""
        mask, tables = known_arguments(arguments)
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
        """Current dropout rate of the attention weights."""
        return max([read() for read in self.rates], default=0.0) if self.attention.training else 0.0

    def op_for(self, num_queries: int | None) -> ProjectionsOp:
        """Norm and projections, with queries of the first `num_queries` tokens; None = of all."""
        op = self.ops.get(num_queries)
        if op is None:
            op = self.ops[num_queries] = self.op(num_queries)
        return op

    def tensors(self) -> list[Tensor | None]:
        """Current tensors of the norm and the projections."""
        return _read(self.norm, self.linears)

    def norm_tensors(self) -> list[Tensor | None]:
        """Weight and bias of the query norm, then of the key norm; None without one."""
        return [*_tensors_of(self.norms[0]), *_tensors_of(self.norms[1])]

    def finished(self, mixed: Tensor) -> Tensor:
        """Run the output projection and what follows it."""
        return _run_after(self.after, self.output(mixed))

    def _mix(
        self,
        score: str | None,
        tables: Sequence[Tensor] | None,
        rate: float,
        admit: Admit | None,
        is_recomputed: bool,
        *inputs: Any,
    ) -> tuple[Tensor, ...]:
        """Attention output [B, Q, H * d], and the token scores [B, N] if asked for.

        Args:
            score: Kind of token score, or None.
            tables: Rotary tables, or None.
            rate: Dropout rate of the attention weights.
            admit: See `BlockCall.admit`.
            is_recomputed: Whether all of this is recomputed in backward.
            *inputs: The mask; weight and bias of the query norm and the key norm; query, key and value by heads.
        """
        mask, query_weight, query_bias, key_weight, key_bias, query, key, value = inputs
        query = self._normed(self.norms[0], query, query_weight, query_bias, is_recomputed)
        key = self._normed(self.norms[1], key, key_weight, key_bias, is_recomputed)
        if tables is not None:
            query, key = self._rotated(query, key, tables)
        mask = first_rows(mask, query.shape[2])
        mixed = self._attended(query, key, value, mask, rate, admit)
        return (mixed,) if score is None else (mixed, token_scores(score, query, key, self.scaling, mask))

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, admit: Admit | None
    ) -> Tensor:
        """The attention's output [B, Q, H * d]; see `_mix`."""
        is_square = query.shape[2] == query.shape[3]
        if admit is not None and is_square and not (rate or computes_weights(self.attention, self.source)):
            admit(True)
        mixed = attend(self.attention, self.source, query, key, value, mask, self.scaling, rate)
        if admit is not None:
            admit(False)
        return mixed

    def _normed(
        self, source: NormSource | None, part: Tensor, weight: Tensor, bias: Tensor | None, is_recomputed: bool
    ) -> Tensor:
        """Queries or keys after their norm, over each head or over all heads; only its input and output are kept."""
        if source is None:
            return part
        kind, eps, _ = source
        is_whole = weight.shape[0] != self.head_width
        tokens = part.transpose(1, 2).flatten(2) if is_whole else part
        run = partial(_run_norm, kind, eps)
        (tokens,) = run(tokens, weight, bias) if is_recomputed else recomputed(run, tokens, weight, bias)
        return tokens.unflatten(2, (-1, self.head_width)).transpose(1, 2) if is_whole else tokens

    def _rotated(self, query: Tensor, key: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys after rotary embedding. Q < N queries are those of the first tokens."""
        assert self.rotate is not None, "checked in `problem`"
        count = query.shape[2]
        if count < key.shape[2]:  # tables have a row for each token
            query = torch.cat([query, key[:, :, count:]], dim=2)
        query, key = self.rotate(query, key, *tables)
        return query[:, :, :count], key


class NotLeanError(Exception):
    """A half cannot run lean, for the reason in its text; caught in the engine."""


def known_arguments(arguments: Mapping[str, Any]) -> tuple[Tensor | None, Sequence[Tensor] | None]:
    """The attention mask and the rotary tables among an attention's arguments."""
    tables, table = arguments.get("position_embeddings"), arguments.get("rope")  # timm has one table for both
    return arguments.get("attention_mask"), tables if table is None else (table,)


def _project_and_mix(
    op: ProjectionsOp, mix: Callable[..., tuple[Tensor, ...]], tokens: Tensor, *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """A lean attention without its output projection, by plain operations."""
    return mix(*inputs[:_SIDE], *op.plain(tokens, inputs[_SIDE:]))


def _tensors_of(norm: NormSource | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm[2]["weight"], norm[2].get("bias"))


def _run_norm(kind: type[NormOp], eps: float, tokens: Tensor, weight: Tensor, bias: Any) -> tuple[Tensor]:
    return (kind(weight, bias, eps).run(tokens)[0].to(tokens.dtype),)


def _read(norm: Mapping[str, Tensor | None], linears: Sequence[LinearSource]) -> list[Tensor | None]:
    """Current tensors of the norm and the Linears."""
    tensors = [norm["weight"], norm.get("bias")]
    for source in linears:
        tensors += source.read()
    return tensors


def _after(block: nn.Module, names: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    """What runs after a half's Linears: modules, or products with parameters of the block."""
    parts = [(name, getattr(block, name)) for name in names]
    return [
        part if isinstance(part, nn.Module) else partial(apply_part, block, name)
        for name, part in parts
        if part is not None and not isinstance(part, nn.Identity)
    ]


def _called(parts: Sequence[object]) -> tuple[nn.Module, ...]:
    """The modules that a lean half calls; it runs dropouts itself."""
    return tuple(part for part in parts if isinstance(part, nn.Module) and type(part) is not nn.Dropout)


def _run_after(parts: Sequence[Callable[[Tensor], Tensor]], tokens: Tensor) -> Tensor:
    for part in parts:
        if type(part) is not nn.Dropout:
            tokens = part(tokens)
        elif part.p and part.training:
            tokens = lean_dropout(tokens, part.p)
    return tokens


def _known(found: Source | str) -> Source:
    """`found`; a string is the reason why it was not found.

    Raises:
        NotLeanError: For a string.
    """
    if isinstance(found, str):
        raise NotLeanError(found)
    return found
