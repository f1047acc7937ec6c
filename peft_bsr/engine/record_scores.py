"""Records the token scores of every block in a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_bsr.backbones import AttentionScorer, ModelSpec, SdpaObserver, observed_interface
from peft_bsr.core import CLASS_FREE_SCORE, BlockCall, ForwardContext, Route, ScoreKind
from peft_bsr.engine.controller import CONTROLLER, BlockController


@dataclass(frozen=True)
class BlockScores:
    """Token scores of one block's attention in one forward.

    Attributes:
        block: Index of the block.
        scores: [B, N], mean over heads, see `peft_bsr.core.token_scores`. N counts the alive tokens with special ones.
        route: The route that tells which tokens these are.
    """

    block: int
    scores: Tensor
    route: Route


@contextmanager
def record_scores(model: nn.Module, spec: ModelSpec, kind: ScoreKind | None = None) -> Iterator[list[BlockScores]]:
    """Collect the token scores of every block that runs inside the `with` block, by its own queries and keys.

    Args:
        model: The model, with or without an adapter of this package; not compiled.
        spec: Description of the model, with module names as in `model`.
        kind: Kind of score. Default None: `"class"`, or `CLASS_FREE_SCORE` if there is no prefix token.

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

    def begin(controller: BlockController | None, hidden_states: Tensor) -> None:
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


def _both(scorer: AttentionScorer, controller: BlockController | None) -> Callable[..., None]:
    """An observer that also calls the block's own scorer, which it replaces on the attention."""

    def observe(*seen: Any) -> None:
        scorer.observe(*seen)
        if controller is not None:
            controller.scorer.observe(*seen)

    return observe
