"""Check at attach that the token reduction of a plan is exact on this model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_bsr.backbones import (
    ModelSpec,
    SdpaObserver,
    StockRun,
    explicit_attention,
    find_rule,
    observed_interface,
    probe_inputs,
    quiet,
    relative_error,
    run_probe,
    run_stock,
    tensors_of,
    tolerance,
)
from peft_bsr.backbones.registry import Arguments
from peft_bsr.core import ForwardContext, mean_of_visible, token_scores, weights_to_scores
from peft_bsr.engine.controller import BlockController
from peft_bsr.engine.plan import BlockPlan, Mode, Plan
from peft_bsr.engine.record import record_routes
from peft_bsr.engine.runner import attach_controller, detach_controller
from peft_bsr.engine.watch import Watch, without_hooks
from peft_bsr.errors import UnsupportedModelError


def verify_plan(
    model: nn.Module,
    spec: ModelSpec,
    plan: Plan,
    modes: tuple[Mode, ...] | None = None,
    stock: StockRun | None = None,
) -> Plan:
    """Check token reduction on one random image. The model is not changed.

    1. If all tokens are kept, blocks that reduce tokens equal the stock blocks bit for bit.
    2. Attention is the softmax of the queries and keys from which the scores are computed, and the scores are its rows.
    3. The reduced forward runs through the head, keeps the planned number of tokens and returns the same shapes. In
       compact mode, the order of the tokens does not change the output (a grid head could silently take 9 tokens for a
       3 x 3 image).

    Args:
        model: The model.
        spec: Description of the model.
        plan: The plan.
        modes: Modes to try in the third check; the first that passes is used. Default None: the plan's mode.
        stock: The probe's forward. Default None: a new one is run.

    Returns:
        The plan in the mode that passed. In full view, `fuse` is off: dropped tokens stay in the sequence.

    Raises:
        UnsupportedModelError: With the check that failed.
    """
    modes = modes or (plan.mode,)
    if not plan.reduces:
        return plan.with_reductions(modes[0])
    name = type(model).__name__
    _check_reachable(model, spec, plan, name)
    inputs = probe_inputs(model, 1, spec.image_shape)
    with quiet(model):
        stock = stock or run_stock(model, spec.blocks, inputs)
        _check_blocks(model, spec, plan, stock)
        failures = []
        for mode in modes:
            candidate = plan.with_reductions(mode, **({"fuse": False} if mode == "full_view" else {}))
            may_shorten = len(modes) == 1  # the user asked for compact mode, in which hidden states are shorter
            failure = _try_reduced(model, spec, candidate, inputs, stock.outputs, may_shorten)
            if failure is None:
                return candidate
            failures.append(f"in mode {mode!r}, {failure}")
    instead = "`mode='full_view'` or `keep_rate=1.0`" if modes == ("compact",) else "`keep_rate=1.0`"
    raise UnsupportedModelError(f"{name}: {'; '.join(failures)}. Use {instead}.")


def _check_reachable(model: nn.Module, spec: ModelSpec, plan: Plan, name: str) -> None:
    if spec.scores_from is None and not plan.merges:
        raise UnsupportedModelError(
            f"{name}: its attention is not looked up in transformers' AttentionInterface, does not call torch's "
            "scaled_dot_product_attention and does not return its weights, so there are no token scores. Use "
            "`reduction='merge'` (BSR, SynQT), `keep_rate=1.0`, `attn_implementation='sdpa'`, or a newer transformers."
        )
    for block in spec.blocks:
        if "forward" in vars(model.get_submodule(block)):
            raise UnsupportedModelError(
                f"{name}: another library replaced the `forward` of {block!r} (accelerate does, for a device map over "
                "several devices), so tokens cannot be reduced inside it. Attach the adapter first, or use "
                "`keep_rate=1.0`."
            )


def _check_blocks(model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun) -> None:
    """Check outputs with all tokens kept, and scores, for each block with the stock forward's arguments."""
    name = type(model).__name__
    keep_all = plan.with_reductions(keep_rate=1.0)
    for index, (args, kwargs, expected) in enumerate(stock.calls):
        reduction = plan.blocks[index].reduction
        if reduction is None:
            continue
        block = model.get_submodule(spec.blocks[index])
        with controlled(model, spec, keep_all, start_at=index, like=args[0]):
            found = tensors_of(block(*args, **kwargs))
        if not all(torch.equal(a, b) for a, b in zip(found, tensors_of(expected), strict=True)):
            raise UnsupportedModelError(
                f"{name}: its blocks compute something other than norm, attention, norm and MLP with two residuals, so "
                "tokens cannot be reduced inside them. Use `reduce_at='after_block'` or `keep_rate=1.0`."
            )
        kind = reduction.score
        error = 0.0 if kind is None else _score_error(model, spec, index, kind, args, kwargs)
        if not error <= tolerance(args[0].dtype):
            raise UnsupportedModelError(
                f"{name}: the token scores of block {index} differ by {error:.1e} from an explicit softmax. Use "
                "`keep_rate=1.0`, or another attention implementation."
            )


def _score_error(
    model: nn.Module, spec: ModelSpec, index: int, kind: str, args: tuple[object, ...], kwargs: Arguments
) -> float:
    """Largest relative error of the scores and of the attention's output, compared with an explicit softmax."""
    block = model.get_submodule(spec.blocks[index])
    attention = block.get_submodule(spec.attention)
    errors: list[float] = []

    def observe(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: object, output: Tensor) -> None:
        weights, attended = explicit_attention(query, key, value, scaling, mask)
        errors.append(relative_error(output.float(), attended))
        mask = mask if isinstance(mask, Tensor) else None
        expected = weights_to_scores(kind, weights, mask)
        if expected is None:  # "mean_query" is not a row of the attention; the reference is the mean query's softmax
            mean = mean_of_visible(query.float(), mask)
            row_mask = None if mask is None else mask[:, :, :1]
            expected = explicit_attention(mean, key, value, scaling, row_mask)[0][:, :, 0].mean(dim=1)
        errors.append(relative_error(token_scores(kind, query, key, scaling, mask).float(), expected))

    if spec.scores_from == "weights":
        return 0.0  # the scores are rows of the weights that the attention returns
    context = observed_interface(attention, observe) if spec.scores_from == "interface" else SdpaObserver(observe)
    with context:
        block(*args, **kwargs)
    return max(errors)


def _try_reduced(
    model: nn.Module,
    spec: ModelSpec,
    plan: Plan,
    inputs: dict[str, Tensor],
    stock: list[Tensor],
    may_shorten: bool,
) -> str | None:
    """The failure of the reduced forward, or None."""
    if plan.token_counts(spec.num_tokens, spec.num_special)[-1][1] == spec.num_tokens:
        plan = plan.with_reductions(keep_rate=0.5)  # the rate keeps all tokens of this image, but not of larger ones
    if plan.mode == "compact" and not spec.is_chained:
        return "something between two blocks changes the whole sequence"
    with controlled(model, spec, plan), record_routes(model) as routes:
        try:
            reduced = tensors_of(run_probe(model, inputs))
            shuffled = reduced
            if plan.mode == "compact" and spec.reads_patches:
                with _reversed(model, spec, plan):
                    shuffled = tensors_of(run_probe(model, inputs))
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            return f"what follows the blocks does not run on fewer tokens ({error}); it probably needs the whole grid"
    counts = plan.token_counts(spec.num_tokens, spec.num_special)
    after = [*(attention for attention, _ in counts[1:]), None]
    found = {index: route.num_tokens for index, route in routes}
    # the routes of the reversed forward replace those of the first, which have the same lengths
    wrong = {i: n for i, n in found.items() if after[i] is not None and n != after[i]}
    if wrong or len(found) != sum(b.reduction is not None for b in plan.blocks):
        return f"planned token counts {counts}, found {found}"
    changed = [(a.shape, b.shape) for a, b in zip(stock, reduced, strict=True) if a.shape != b.shape]
    if may_shorten:
        changed = [(a, b) for a, b in changed if len(a) != 3 or a[1] not in (spec.num_tokens, spec.num_patches)]
    if changed:
        before, after_it = (tuple(shape) for shape in changed[0])
        return f"reducing tokens changes the shape of an output from {before} to {after_it}"
    unchanged = [i for i, (a, b) in enumerate(zip(stock, reduced, strict=True)) if a.shape == b.shape]
    errors = [relative_error(shuffled[i], reduced[i]) for i in unchanged if reduced[i].is_floating_point()]
    if max(errors, default=0.0) > tolerance(stock[0].dtype):
        return "what follows the blocks depends on the order of the tokens, so it needs the whole grid"
    return None


@contextmanager
def _reversed(model: nn.Module, spec: ModelSpec, plan: Plan) -> Iterator[None]:
    """Context manager: tokens are in reverse order after the first reduction; after the last one if the plan merges."""
    reducing = [i for i, block in enumerate(plan.blocks) if block.reduction is not None]

    def reverse(block: nn.Module, args: object, kwargs: Arguments, output: object) -> object:
        tokens, *others = output if isinstance(output, tuple) else (output,)
        call = kwargs["block_call"]
        end = spec.num_prefix + call.origins.shape[1]
        call.origins = call.origins.flip(1)
        prefix, alive, suffix = tokens[:, : spec.num_prefix], tokens[:, spec.num_prefix : end], tokens[:, end:]
        tokens = torch.cat([prefix, alive.flip(1), suffix], dim=1)
        return (tokens, *others) if isinstance(output, tuple) else tokens

    block = model.get_submodule(spec.blocks[reducing[-1 if plan.merges else 0]])
    handle = block.register_forward_hook(reverse, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def single_block(
    model: nn.Module, spec: ModelSpec, index: int, plan: BlockPlan, like: Tensor
) -> Iterator[BlockController]:
    """Context manager: block `index` can be called without the rest of the model, runs by `plan`, has no user hooks.

    Args:
        model: The model.
        spec: Description of the model.
        index: Index of the block.
        plan: Plan of the block; the gradient is cut before it.
        like: Input of the block, [B, N, D].

    Yields:
        The block's controller.
    """
    blocks = [BlockPlan(cut_gradient=i < index) for i in range(spec.depth)]
    blocks[index] = plan
    modules = model.get_submodule(spec.blocks[index]).modules()
    # a half with hooks on its modules runs stock anyway, as long as they are there
    with (
        without_hooks(modules),
        controlled(model, spec, Plan(tuple(blocks)), start_at=index, like=like) as controllers,
    ):
        yield controllers[0]


@contextmanager
def training_mode(block: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Context manager: `modules` of `block` are in training mode, gradients are on, and checkpointing is off."""
    for module in modules:
        module.training = True
    checkpointing = block.__dict__.pop("gradient_checkpointing", None)  # the class attribute is False
    try:
        with torch.enable_grad():
            yield
    finally:
        for module in modules:
            module.training = False
        if checkpointing is not None:
            block.__dict__["gradient_checkpointing"] = checkpointing


@contextmanager
def controlled(
    model: nn.Module,
    spec: ModelSpec,
    plan: Plan,
    start_at: int = 0,
    like: Tensor | None = None,
    controller_cls: type[BlockController] = BlockController,
) -> Iterator[list[BlockController]]:
    """Context manager: the blocks have controllers.

    Args:
        model: The model.
        spec: Description of the model.
        plan: The plan that the controllers run.
        start_at: Index of a block that is called by itself, if `like` is given. Default 0.
        like: Input of this block [B, N, D]; no other block gets a controller. Default None: all blocks get one.
        controller_cls: Class of the controllers.

    Yields:
        The controllers. They do not warn if a half runs stock.
    """
    context, rule = ForwardContext(), find_rule(model)
    now = context.now
    now.has_warned = True
    controllers = [
        controller_cls(i, spec, context, rule, plan) for i in ([start_at] if like is not None else range(spec.depth))
    ]
    for controller in controllers:
        attach_controller(model, controller)
    if like is not None:
        now.outside = Watch([nn.Identity()])  # as in a model that uses only what its head reads
        now.open(now.outside.root)
        now.route = controllers[0].start_route(like)
    try:
        yield controllers
    finally:
        for controller in controllers:
            detach_controller(model, controller)
