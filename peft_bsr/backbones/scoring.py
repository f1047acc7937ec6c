"""Token scores from the query and key that attention really uses, whichever implementation runs.

Three ways, in this order; the probe finds out which one an attention allows:

1. `"interface"`: transformers looks the attention function up by `attention.config._attn_implementation` at each call.
   While scores are asked for, the attention gets a view of its config that names a scored version of the configured
   function; it notes query, key and mask and runs the configured one. The model's own config is untouched (so
   masks are still made for the configured implementation), and `model.set_attn_implementation` keeps working.
2. `"sdpa"`: attention that calls torch's `scaled_dot_product_attention` itself (timm, Data2Vec).
3. `"weights"`: attention that always returns its weights (BLIP).

Hooks on the q and k projections would be wrong wherever something sits between projection and product (row error
5e-2 on DINOv3, 1e-2 on BEiT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from peft_bsr.backbones.lookup import attention_function
from peft_bsr.backbones.model_spec import ScoreSource
from peft_bsr.compat.transformers_api import IMPLEMENTATION, attention_functions
from peft_bsr.core import BlockCall, ForwardContext, weights_to_scores
from peft_bsr.ops import lean_dropout, token_scores

_TWIN_PREFIX = "scored|"
# what attention was called with and what it gave: query [B, H, N, d], key, value, scaling, mask, output [B, H, N, d]
Observer = Callable[[Tensor, Tensor, Tensor, float, Any, Tensor], None]


class AttentionScorer:
    """Fills the scores of the block that runs with what its attention is called with.

    Args:
        context: Knows the block that runs.
    """

    def __init__(self, context: ForwardContext) -> None:
        self.context = context

    @property
    def is_asked(self) -> bool:
        """Whether the running block wants scores that it has not got, or has few queries in a compiled attention."""
        call = self.context.now.running
        if call is None:
            return False
        return (call.score is not None and call.token_scores is None) or call.num_queries is not None

    @property
    def traced_call(self) -> BlockCall | None:
        """The call of the block that runs, if a compiler sees it."""
        call = self.context.now.running
        return call if call is not None and call.is_traced else None

    def observe(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Any, output: Tensor) -> None:
        """Score the tokens of [B, H, N, d]; a second attention inside the same block is not looked at."""
        call = self.context.now.running
        if call is not None and call.score is not None and call.token_scores is None:
            call.token_scores = token_scores(call.score, query, key, scaling, _dense(mask))

    def observe_weights(self, attention: nn.Module, args: Any, output: Any) -> None:
        """A forward hook for attention that returns (output, weights [B, H, N, N])."""
        call = self.context.now.running
        if call is not None and call.score is not None and call.token_scores is None and not call.is_traced:
            call.token_scores = weights_to_scores(call.score, output[1])

    def watching(self, source: ScoreSource | None) -> Any:
        """A context in which attention of this source reports here; only `"sdpa"` needs one."""
        return SdpaObserver(self.observe) if source == "sdpa" else nullcontext()


class ScoringConfig:
    """A view of an attention module's config that names the scored attention while scores are asked for.

    In all else it is that config: an instance of a subclass of the config's class, which shares its `__dict__`.

    Args:
        config: The config to look through; it stays shared with the rest of the model.
        scorer: Asked at each look-up, told at each call.
    """

    __slots__ = ("config", "scorer")
    config: Any
    scorer: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A view of `args[0]`; but `type(view)()`, as in `to_diff_dict`, is a config, not a view."""
        if cls is not ScoringConfig:
            return cls.__bases__[1](*args, **kwargs)
        config_class: Any = type(args[0])
        return object.__new__(_view_class(config_class))

    def __init__(self, config: Any, scorer: Any) -> None:
        for name, value in (("__dict__", config.__dict__), ("config", config), ("scorer", scorer)):
            object.__setattr__(self, name, value)

    def __init_subclass__(cls) -> None:  # transformers' own would write an `__init__` into the subclass
        pass

    @property
    def _attn_implementation(self) -> str | None:
        implementation = getattr(self.config, IMPLEMENTATION)
        return _scored(implementation) if self.scorer.is_asked else implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        setattr(self.config, IMPLEMENTATION, value)

    def __eq__(self, other: object) -> bool:
        return bool(self.config == (other.config if isinstance(other, ScoringConfig) else other))

    __hash__ = None  # type: ignore[assignment]  # as a config

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return ScoringConfig, (self.config, self.scorer)


@cache
def _view_class(config_class: type) -> type:
    return type(config_class.__name__, (ScoringConfig, config_class), {"__slots__": ()})


class SdpaObserver(TorchFunctionMode):
    """Tells `observe` what `scaled_dot_product_attention` is called with."""

    def __init__(self, observe: Observer) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass everything on."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            _report(self.observe, output, *args, **kwargs)
        return output


def find_score_source(attention: Any, args: Any, kwargs: Any) -> tuple[ScoreSource | None, int, float]:
    """Which way `attention`, called with these arguments, allows (see the module's text); its heads and scaling."""
    seen: list[tuple[int, float]] = []

    def observe(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Any, output: Tensor) -> None:
        seen.append((query.shape[1], scaling))

    with observed_interface(attention, observe):
        attention(*args, **kwargs)
    if seen:
        return "interface", *seen[0]
    with SdpaObserver(observe):
        output = attention(*args, **kwargs)
    if seen:
        return "sdpa", *seen[0]
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    tokens = args[0] if args else next(iter(kwargs.values()))
    if isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[2:] == (tokens.shape[1],) * 2:
        return "weights", weights.shape[1], 0.0
    return None, 0, 0.0


@contextmanager
def observed_interface(attention: Any, observe: Observer) -> Iterator[None]:
    """Tell `observe` what the attention function of transformers' interface is called with."""
    config = getattr(attention, "config", None)
    if config is None or not hasattr(config, IMPLEMENTATION):
        yield
        return
    base = config.config if isinstance(config, ScoringConfig) else config
    attention.config = ScoringConfig(base, _Asking(observe))
    try:
        yield
    finally:
        attention.config = config


class _Asking:
    is_asked = True
    traced_call = None

    def __init__(self, observe: Observer) -> None:
        self.observe = observe


def _attend_scored(
    implementation: str | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Run `implementation`, and tell the module's scorer on what.

    Where a compiler sees the call nobody is told: the scores are handed on in the place of the attention weights, which
    few implementations give, and only the queries that the block asks run.
    """
    function, scorer = attention_function(module, implementation), module.config.scorer
    call = scorer.traced_call
    asked = None if call is None else call.num_queries
    if asked is None:
        output = function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        mask = first_rows(attention_mask, asked)
        output = function(module, query[:, :, :asked], key, value, mask, scaling=scaling, **kwargs)
        output = nn.functional.pad(output[0], (0, 0, 0, 0, 0, query.shape[2] - asked)), output[1]
    scale = _scale(query, scaling)
    if call is None:
        scorer.observe(query, key, value, scale, attention_mask, output[0].transpose(1, 2))
    elif call.score is not None and (output[1] is None or call.score != "class"):
        output = output[0], token_scores(call.score, query, key, scale, _dense(attention_mask))
    return output


def run_scored(source: ScoreSource, kind: str, run: Callable[[], tuple[Tensor, list[Any]]]) -> tuple[Tensor, Tensor]:
    """What the first half of a block gives and its token scores [B, N], where a compiler sees the call.

    Args:
        source: Of the attention's scores.
        kind: Of the scores.
        run: The half: its change, and what else its attention returns.
    """
    if source == "sdpa":
        seen: list[Tensor] = []

        def observe(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Any, output: Tensor) -> None:
            seen.append(token_scores(kind, query, key, scaling, _dense(mask)))

        with SdpaObserver(observe):
            change, _ = run()
        return change, seen[0]
    change, others = run()
    scores: Any = others[0] if others[0].ndim == 2 else weights_to_scores(kind, others[0])
    return change, scores


def attend(
    attention: Any,
    source: ScoreSource | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """What `attention` makes of query [B, H, Q, d], key and value [B, H, N, d], in the implementation configured.

    Args:
        attention: The module with the projections.
        source: How its scores are had; where that is not transformers' interface, torch's own attention runs.
        query: Asked.
        key: Compared with.
        value: Summed.
        mask: Boolean or additive, or None.
        scaling: Factor on the products.
        dropout: Rate of the dropout on attention weights.

    Returns:
        [B, Q, H * d].
    """
    if source == "weights" and dropout:  # as such an attention does it: torch's own keeps more when it drops
        weights = lean_dropout((query @ key.transpose(2, 3) * scaling).softmax(dim=-1), dropout)
        return (weights @ value).transpose(1, 2).flatten(2)
    if source != "interface":
        output = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return output.transpose(1, 2).flatten(2)
    config = attention.config.config if isinstance(attention.config, ScoringConfig) else attention.config
    function = attention_function(attention, getattr(config, IMPLEMENTATION))
    return function(attention, query, key, value, mask, scaling=scaling, dropout=dropout)[0].flatten(2)


def computes_weights(attention: Any, source: ScoreSource | None) -> bool:
    """Whether `attend` without dropout makes a matrix of attention weights [B, H, Q, N] that autograd can see."""
    return source == "interface" and getattr(attention.config, IMPLEMENTATION) in (None, "eager")


def _scored(implementation: str | None) -> str:
    name = f"{_TWIN_PREFIX}{implementation}"
    if name not in attention_functions:
        AttentionInterface.register(name, partial(_attend_scored, implementation))
    return name


def _report(
    observe: Observer,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> None:
    observe(query, key, value, _scale(query, scale), attn_mask, output)


def first_rows(mask: Any, num_queries: int) -> Any:
    """The part of a mask [B, 1, N, N] for the first queries; other masks have no rows to choose."""
    has_rows = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] > num_queries
    return mask[:, :, :num_queries] if has_rows else mask


def _scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _dense(mask: Any) -> Tensor | None:
    """Masks [B, 1, N, N] and biases count for the scores; the [B, N] padding of flash attention becomes one."""
    if not isinstance(mask, Tensor):
        return None
    return mask[:, None, None, :].bool() if mask.ndim == 2 else mask


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Any) -> tuple[Tensor, Tensor]:
    """Weights [B, H, N, N] and output [B, H, N, d] of plain softmax attention in fp32: the reference for scores."""
    logits = query.float() @ key.float().transpose(2, 3) * scaling
    dense = _dense(mask)
    if dense is not None:
        logits = logits.masked_fill(~dense, -torch.inf) if dense.dtype == torch.bool else logits + dense.float()
    weights = logits.softmax(dim=-1)
    return weights, weights @ value.float()
