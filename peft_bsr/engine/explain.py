"""What each block was planned to do, and what is active."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peft_bsr.engine.controller import BlockController
from peft_bsr.engine.plan import BlockPlan, GradientTokens, Plan


def explain_blocks(blocks: Sequence[tuple[nn.Module, BlockController]]) -> str:
    """One line per block: its plan, and which parts of it are not active in training, with the reason.

    Args:
        blocks: (block, controller) pairs, first to last.
    """
    plan = blocks[0][1].plan if blocks else None
    if plan is None:
        return (
            "No plan is active: adapters are off, or plans are for training alone and its first forward makes one. "
            "Blocks run stock."
        )
    lines = ["block  planned"]
    for (block, controller), own in zip(blocks, plan.blocks, strict=True):
        lines.append(f"{controller.index:>5}  {describe_block(own)}")
        reasons = {**(_standing(controller, block, own) if own.lean is not None else {}), **controller.aside}
        lines += [f"       {_aside(part)}: {reason}" for part, reason in sorted(reasons.items())]
    lean = [block for (block, _), own in zip(blocks, plan.blocks, strict=True) if own.lean is not None]
    if lean and not any(block.training for block in lean):
        lines.append("nothing runs lean now: the model is in evaluation mode")
    return "\n".join([*lines, *_notes(plan)])


def describe_block(plan: BlockPlan) -> str:
    """A block's plan in a few words."""
    words = ["trained" if plan.trained else "frozen"]
    if not plan.in_graph:
        words.append("outside of the graph")
    if plan.reduction is not None:
        verb = "merges tokens down to" if plan.reduction.merges else "keeps"
        words.append(f"{verb} {plan.reduction.keep_rate:g} of the tokens ({plan.reduction.position})")
    if plan.lean is not None:
        halves = [name for name, is_lean in (("attention", plan.lean.attention), ("MLP", plan.lean.mlp)) if is_lean]
        words.append(f"{' and '.join(halves)} lean ({'exact' if plan.lean.save_products else 'max'})")
        if plan.lean.num_queries is not None:
            words.append(f"for the first {plan.lean.num_queries} tokens only")
    if plan.gradient_tokens is not None:
        words.append(_gradients(plan.gradient_tokens, plan.in_graph))
    if plan.int8:
        words.append("activations in 8 bits")
    if plan.mixture:
        words.append("mixture of experts")
    return ", ".join(words)


def _gradients(tokens: GradientTokens, in_graph: bool) -> str:
    if not in_graph:
        return "ranks the tokens for the gradients of the next block"
    how = "at random" if tokens.score is None else f"by {tokens.score}"
    return f"gradients of {tokens.share:g} of the tokens ({how})"


def _aside(part: str) -> str:
    whole = {"int8": "activations are kept in full", "gradient tokens": "all tokens carry gradients"}
    return whole.get(part, f"{part} runs stock")


def _standing(controller: BlockController, block: nn.Module, plan: BlockPlan) -> dict[str, str]:
    """Reasons that do not depend on the input."""
    reasons = controller.bound(block).reasons
    assert plan.lean is not None, "only lean halves have reasons to run stock"
    wanted = {"attention": plan.lean.attention and not plan.lean.as_modules, "mlp": plan.lean.mlp and not plan.mixture}
    return {half: reason for half, reason in reasons.items() if wanted[half]}


def _notes(plan: Plan) -> list[str]:
    return ["left out when the adapter was attached:", *(f"  {note}" for note in plan.notes)] if plan.notes else []


__all__ = ["describe_block", "explain_blocks"]
