"""Watching what the class token looks at in every block of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_bsr.backbones import AttentionScorer, ModelSpec, SdpaObserver, observed_interface
from peft_bsr.core import CLASS_FREE_SCORE, BlockCall, ForwardContext, Route, ScoreKind
from peft_bsr.engine.runner import CONTROLLER


@dataclass(frozen=True)
class BlockScores:
    """How much the tokens of one block's attention were attended to in one forward.

    Attributes:
        block: Its index.
        scores: [B, N], mean over heads, see `peft_bsr.core.token_scores`; N tokens are alive, special ones included.
        route: Which tokens those are.
    """

    block: int
    scores: Tensor
    route: Route


@contextmanager
def record_scores(model: nn.Module, spec: ModelSpec, kind: ScoreKind | None = None) -> Iterator[list[BlockScores]]:
    """Collect the token scores of every block that runs inside the `with` block, from the attention's own queries.

    Args:
        model: With or without one of our adapters; not compiled.
        spec: Of this model, its names as in `model`.
        kind: What is collected; default the class token's row, or the mean query's where there is no such token.

    Yields:
        A list that fills up as the model runs.

    Examples:
        >>> with record_scores(model, probe_model(model)) as found:  # doctest: +SKIP
        ...     model(pixel_values=images)
        >>> found[11].scores  # doctest: +SKIP
    """
    wanted = kind or ("class" if spec.num_prefix else CLASS_FREE_SCORE)
    own, found = ForwardContext(), list[BlockScores]()
    scorer = AttentionScorer(own)

    def begin(controller: Any, hidden_states: Tensor) -> None:
        route = None if controller is None else controller.context.now.route
        if route is None:
            patches = hidden_states.shape[1] - spec.num_special
            route = Route(spec.num_prefix, patches, spec.num_suffix)
        own.now.running = BlockCall(route, score=wanted)

    def end(index: int) -> None:
        run, own.now.running = own.now.running, None
        if run is not None and run.token_scores is not None:
            found.append(BlockScores(index, run.token_scores, run.route))

    with ExitStack() as stack:
        if spec.scores_from == "sdpa":
            stack.enter_context(SdpaObserver(scorer.observe))
        for index, name in enumerate(spec.blocks):
            block = model.get_submodule(name)
            attention, controller = block.get_submodule(spec.attention), getattr(block, CONTROLLER, None)
            if spec.scores_from == "interface":
                stack.enter_context(observed_interface(attention, _both(scorer, controller)))
            hooks = [
                attention.register_forward_pre_hook(
                    lambda _, args, kwargs, r=controller: begin(r, (*args, *kwargs.values())[0]),
                    with_kwargs=True,
                )
            ]
            if spec.scores_from == "weights":
                hooks.append(attention.register_forward_hook(scorer.observe_weights))
            hooks.append(attention.register_forward_hook(lambda *_, i=index: end(i)))
            for hook in hooks:
                stack.callback(hook.remove)
        yield found


def _both(scorer: AttentionScorer, controller: Any) -> Any:
    """Tells the block's own scorer too, whose place on the attention is taken."""

    def observe(*seen: Any) -> None:
        scorer.observe(*seen)
        if controller is not None:
            controller.scorer.observe(*seen)

    return observe
