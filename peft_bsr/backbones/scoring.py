"""Token scores from the queries and keys that an attention uses, for any attention implementation.

There are three sources. The probe takes the first that works for an attention:

1. `"interface"`: transformers looks up the attention function by `attention.config._attn_implementation` at each call.
   The attention gets a view of its config. While scores are needed, this names a scored version of the configured
   function, which also computes the scores. The model's own config is not changed, so masks are still created for the
   configured implementation, and `model.set_attn_implementation` keeps working.
2. `"sdpa"`: the attention calls torch's `scaled_dot_product_attention` (timm, Data2Vec).
3. `"weights"`: the attention always returns its weights (BLIP).

Hooks on the q and k projections would be wrong if anything happens between projection and product (row error 5e-2 on
DINOv3, 1e-2 on BEiT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedConfig

from peft_bsr.backbones.lookup import attention_function
from peft_bsr.backbones.model_spec import ScoreSource
from peft_bsr.backbones.registry import Arguments
from peft_bsr.compat.transformers_api import IMPLEMENTATION, attention_functions
from peft_bsr.core import BlockCall, ForwardContext, weights_to_scores
from peft_bsr.ops import lean_dropout, token_scores

_SCORED_PREFIX = "scored|"
Observer = Callable[[Tensor, Tensor, Tensor, float, object, Tensor], None]
"""Called with an attention's query [B, H, N, d], key, value, scaling, mask (any type) and output [B, H, N, d]."""
_Mask = TypeVar("_Mask")


class AttentionScorer:
    """Computes the token scores of the running block from the inputs of its attention.

    Args:
        context: Context of the forward, which holds the running block's call.
    """

    def __init__(self, context: ForwardContext) -> None:
        self.context = context

    @property
    def is_asked(self) -> bool:
        """Whether the running block needs scores and has none yet, or uses few queries in a compiled attention."""
        call = self.context.now.running
        if call is None:
            return False
        return (call.score is not None and call.token_scores is None) or call.num_queries is not None

    @property
    def traced_call(self) -> BlockCall | None:
        """The running block's call if it is being compiled, else None."""
        call = self.context.now.running
        return call if call is not None and call.is_traced else None

    def observe(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: object, output: Tensor) -> None:
        """Score the tokens by query and key [B, H, N, d]. A second attention in the same block is ignored."""
        call = self.context.now.running
        if call is not None and call.score is not None and call.token_scores is None:
            call.token_scores = token_scores(call.score, query, key, scaling, _dense(mask))

    def observe_weights(self, attention: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
        """A forward hook for an attention that returns (output, weights [B, H, N, N])."""
        call = self.context.now.running
        if call is not None and call.score is not None and call.token_scores is None and not call.is_traced:
            call.token_scores = weights_to_scores(call.score, output[1])

    def watching(self, source: ScoreSource | None) -> AbstractContextManager[object]:
        """A context in which attention of this source is observed; only `"sdpa"` needs one."""
        return SdpaObserver(self.observe) if source == "sdpa" else nullcontext()


class ScoringConfig:
    """A view of an attention module's config that names the scored attention while scores are needed.

    Otherwise it behaves like the config: its class is a subclass of the config's class and it shares the `__dict__`.

    Args:
        config: The config, which stays shared with the rest of the model.
        scorer: Tells whether scores are needed, and observes the attention.
    """

    __slots__ = ("config", "scorer")
    config: PreTrainedConfig
    scorer: AttentionScorer | _AlwaysObserve

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A view of `args[0]`. But `type(view)()`, as in `to_diff_dict`, creates a plain config."""
        if cls is not ScoringConfig:
            return cls.__bases__[1](*args, **kwargs)
        config_class: Any = type(args[0])
        return object.__new__(_view_class(config_class))

    def __init__(self, config: PreTrainedConfig, scorer: AttentionScorer | _AlwaysObserve) -> None:
        for name, value in (("__dict__", config.__dict__), ("config", config), ("scorer", scorer)):
            object.__setattr__(self, name, value)

    def __init_subclass__(cls) -> None:  # that of PreTrainedConfig would add an `__init__` to the subclass
        pass

    @property
    def _attn_implementation(self) -> str | None:
        implementation = getattr(self.config, IMPLEMENTATION)
        return _scored(implementation) if self.scorer.is_asked else implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str] | None) -> None:
        setattr(self.config, IMPLEMENTATION, value)

    def __eq__(self, other: object) -> bool:
        return bool(self.config == (other.config if isinstance(other, ScoringConfig) else other))

    __hash__ = None  # type: ignore[assignment]  # like a config

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        return ScoringConfig, (self.config, self.scorer)


@cache
def _view_class(config_class: type) -> type:
    return type(config_class.__name__, (ScoringConfig, config_class), {"__slots__": ()})


class SdpaObserver(TorchFunctionMode):
    """Calls `observe` for every `scaled_dot_product_attention`."""

    def __init__(self, observe: Observer) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Arguments | None = None
    ) -> object:
        """Call `func`, and `observe` if it is attention."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            _report(self.observe, output, *args, **kwargs)
        return output


def find_score_source(
    attention: nn.Module, args: tuple[Any, ...], kwargs: Arguments
) -> tuple[ScoreSource | None, int, float]:
    """The first source (see the module docstring) that works for an attention's call, number of heads and scaling."""
    seen: list[tuple[int, float]] = []

    def observe(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: object, output: Tensor) -> None:
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
    """Context manager: `observe` is called for every call of transformers' attention interface in `attention`."""
    config = getattr(attention, "config", None)
    if config is None or not hasattr(config, IMPLEMENTATION):
        yield
        return
    base = config.config if isinstance(config, ScoringConfig) else config
    attention.config = ScoringConfig(base, _AlwaysObserve(observe))
    try:
        yield
    finally:
        attention.config = config


class _AlwaysObserve:
    """Takes the place of an `AttentionScorer` where there is no forward context."""

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
    attention_mask: object,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Run `implementation`, and pass its inputs to the module's scorer.

    In a compiled call, the scorer is not used: the scores are returned in place of the attention weights, which few
    implementations return, and only the queries that the block needs are computed.
    """
    function, scorer = attention_function(module, implementation), module.config.scorer
    call = scorer.traced_call
    num_queries = None if call is None else call.num_queries
    if num_queries is None:
        output = function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        mask = first_rows(attention_mask, num_queries)
        output = function(module, query[:, :, :num_queries], key, value, mask, scaling=scaling, **kwargs)
        output = nn.functional.pad(output[0], (0, 0, 0, 0, 0, query.shape[2] - num_queries)), output[1]
    scale = _scale(query, scaling)
    if call is None:
        scorer.observe(query, key, value, scale, attention_mask, output[0].transpose(1, 2))
    elif call.score is not None and (output[1] is None or call.score != "class"):
        output = output[0], token_scores(call.score, query, key, scale, _dense(attention_mask))
    return output


def run_scored(source: ScoreSource, kind: str, run: Callable[[], tuple[Tensor, list[Any]]]) -> tuple[Tensor, Tensor]:
    """Result of a block's attention half and its token scores [B, N], in a compiled call.

    Args:
        source: Source of the scores.
        kind: Kind of the scores, see `peft_bsr.core.token_scores`.
        run: Runs the half. Returns its change of the tokens, and the other outputs of its attention.
    """
    if source == "sdpa":
        seen: list[Tensor] = []

        def observe(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: object, output: Tensor) -> None:
            seen.append(token_scores(kind, query, key, scaling, _dense(mask)))

        with SdpaObserver(observe):
            change, _ = run()
        return change, seen[0]
    change, others = run()
    scores: Any = others[0] if others[0].ndim == 2 else weights_to_scores(kind, others[0])
    return change, scores


def attend(
    attention: nn.Module,
    source: ScoreSource | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in the configured implementation.

    Args:
        attention: The module with the projections.
        source: Source of its scores. Unless it is `"interface"`, `scaled_dot_product_attention` runs.
        query: [B, H, Q, d].
        key: [B, H, N, d].
        value: [B, H, N, d].
        mask: Boolean or additive mask, or None.
        scaling: Factor on the products of queries and keys.
        dropout: Dropout rate on the attention weights. Default 0.

    Returns:
        [B, Q, H * d].
    """
    if source == "weights" and dropout:  # like this kind of attention; torch's function saves more with dropout
        weights = lean_dropout((query @ key.transpose(2, 3) * scaling).softmax(dim=-1), dropout)
        return (weights @ value).transpose(1, 2).flatten(2)
    if source != "interface":
        output = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return output.transpose(1, 2).flatten(2)
    config = attention.config.config if isinstance(attention.config, ScoringConfig) else attention.config
    function = attention_function(attention, getattr(config, IMPLEMENTATION))
    return function(attention, query, key, value, mask, scaling=scaling, dropout=dropout)[0].flatten(2)


def computes_weights(attention: nn.Module, source: ScoreSource | None) -> bool:
    """Whether `attend` without dropout computes attention weights [B, H, Q, N] that autograd records."""
    return source == "interface" and getattr(attention.config, IMPLEMENTATION) in (None, "eager")


def _scored(implementation: str | None) -> str:
    name = f"{_SCORED_PREFIX}{implementation}"
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
    **kwargs: object,
) -> None:
    observe(query, key, value, _scale(query, scale), attn_mask, output)


def first_rows(mask: _Mask, num_queries: int) -> _Mask | Tensor:
    """The rows of a mask [B, 1, N, N] for the first queries. Other masks are returned unchanged."""
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] > num_queries:
        return mask[:, :, :num_queries]
    return mask


def _scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _dense(mask: object) -> Tensor | None:
    """The mask or bias for the scores; a padding mask [B, N] of flash attention is expanded to [B, 1, 1, N]."""
    if not isinstance(mask, Tensor):
        return None
    return mask[:, None, None, :].bool() if mask.ndim == 2 else mask


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: object
) -> tuple[Tensor, Tensor]:
    """Weights [B, H, N, N] and output [B, H, N, d] of plain softmax attention in fp32, the reference for scores."""
    logits = query.float() @ key.float().transpose(2, 3) * scaling
    dense = _dense(mask)
    if dense is not None:
        logits = logits.masked_fill(~dense, -torch.inf) if dense.dtype == torch.bool else logits + dense.float()
    weights = logits.softmax(dim=-1)
    return weights, weights @ value.float()
