"""Checks that every supported model must pass, used by the test and the report. They raise AssertionError.

The reference for attention is the stock model with eager attention, observed and masked at its softmax. It shares no
code with the way in which the package gets query, key and mask.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from families import NO_REDUCTION, SUPPORTED, run_batch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_bsr import BSRConfig, record_routes
from peft_bsr.backbones import tensors_of
from peft_bsr.engine import bound

MODELS = ChainMap(SUPPORTED, NO_REDUCTION)  # tests add families of their own
EVERY_BLOCK = {"trainable_blocks": [1, 3], "reduction_blocks": [0, 1, 2]}
ALL_TOKENS = {"trainable_blocks": [1, 2], "reduction_blocks": None, "keep_rate": 1.0}


def attach(name: str, mode: str | None, **settings: Any) -> PeftModel:
    """The family's tiny model with an adapter, in evaluation mode."""
    if name in NO_REDUCTION:
        settings = {**settings, **ALL_TOKENS}
    hashable = ((key, tuple(value) if isinstance(value, list) else value) for key, value in settings.items())
    return copy.deepcopy(_attached(name, mode, tuple(hashable)))


@functools.lru_cache(maxsize=4)
def _attached(name: str, mode: str | None, settings: tuple[tuple[str, Any], ...]) -> PeftModel:
    """The model of which the checks and the tests of a family take copies."""
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in settings}
    torch.manual_seed(3)
    return get_peft_model(MODELS[name](), BSRConfig(mode=mode, **{**EVERY_BLOCK, **given})).eval()


def outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """All tensors that the model returns, with the same random numbers every time."""
    torch.manual_seed(7)
    with torch.no_grad():
        return tensors_of(model(**batch))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check_identity(name: str, mode: str | None) -> None:
    """keep_rate 1.0 equals the base model bit for bit, and so do reducing blocks that happen to keep all tokens."""
    base = MODELS[name]()
    batch = run_batch(base)
    expected = outputs(base, batch)
    assert_same(outputs(attach(name, mode, keep_rate=1.0), batch), expected)
    if name in NO_REDUCTION:
        return
    nearly_all = attach(name, mode, keep_rate=0.999)  # rounding up keeps all of these few tokens
    with record_routes(nearly_all) as routes:
        found = outputs(nearly_all, batch)
    assert len(routes) == 3, "the blocks ran through their own forward"
    assert_same(found, expected)


def check_masking(name: str, mode: str | None, batch: dict[str, Any] | None = None) -> None:
    """Dropping tokens equals keeping them and masking their keys in later blocks, to 1e-5."""
    model = attach(name, mode, keep_rate=0.7, fuse_dropped=False)
    spec = model.base_model.spec
    batch = batch or run_batch(model.base_model.model)
    last = model.get_submodule(f"base_model.model.{spec.full_name(spec.blocks[-1])}")
    seen: dict[str, Tensor] = {}
    handle = last.register_forward_hook(lambda _m, _a, out: seen.update(reduced=tensors_of(out)[0]))
    with record_routes(model) as routes:
        outputs(model, batch)
    handle.remove()
    assert routes[-1][1].origins.shape[1] < routes[-1][1].num_patches

    stock = SUPPORTED[name]()
    blocks = [stock.get_submodule(spec.full_name(block)) for block in spec.blocks]
    use_eager(stock, name)
    blocks[-1].register_forward_hook(lambda _m, _a, out: seen.update(masked=tensors_of(out)[0]))

    def mask_dropped(index: int, logits: Tensor) -> Tensor:
        earlier = [route for block, route in routes if block < index]
        if not earlier:
            return logits
        special = torch.ones(len(logits), spec.num_special, dtype=torch.bool)
        prefix, suffix = special[:, : spec.num_prefix], special[:, spec.num_prefix :]
        visible = torch.cat([prefix, earlier[-1].alive(), suffix], dim=1)
        return logits.masked_fill(~visible[:, None, None], -1e30)

    with watched_softmax(blocks, change=mask_dropped):
        outputs(stock, batch)
    places = routes[-1][1].places()[..., None].expand(-1, -1, spec.width)
    reduced = seen["reduced"]
    if model.peft_config["default"].mode == "full_view":
        reduced = reduced.gather(1, places)
    torch.testing.assert_close(reduced, seen["masked"].gather(1, places), atol=1e-5, rtol=1e-5)


def check_scores(name: str, mode: str | None) -> None:
    """Token scores equal those computed from the stock model's eager attention, to 1e-5."""
    model = attach(name, mode, reduction_blocks=[1])
    spec, kind = model.base_model.spec, model.peft_config["default"].score
    batch = run_batch(model.base_model.model)
    found: list[Tensor] = []
    true_reduce = bound.reduce_tokens

    def note(hidden_states: Tensor, origins: Tensor | None, scores: Tensor, *others: Any) -> Any:
        found.append(scores)
        return true_reduce(hidden_states, origins, scores, *others)

    with mock.patch.object(bound, "reduce_tokens", note):
        outputs(model, batch)
    stock = SUPPORTED[name]()
    use_eager(stock, name)
    logits: dict[int, Tensor] = {}
    with watched_softmax(
        [stock.get_submodule(spec.full_name(block)) for block in spec.blocks],
        change=lambda index, values: logits.setdefault(index, values),
    ):
        outputs(stock, batch)
    torch.testing.assert_close(found[0], expected_scores(kind, logits[1]), atol=1e-5, rtol=1e-5)


def expected_scores(kind: str, logits: Tensor) -> Tensor:
    """Scores [B, N] from the logits [B, H, N, N] of plain attention, without padding in means over queries."""
    weights = logits.softmax(dim=-1)
    is_padding = logits[:, :, 0] < -1e30
    count = (~is_padding).sum(dim=-1, keepdim=True)
    if kind == "class":
        return weights[:, :, 0].mean(dim=1)
    if kind == "received":
        rows = weights.masked_fill(is_padding[..., None], 0).sum(dim=2) / count
        return rows.mean(dim=1)
    mean = logits.masked_fill(is_padding[..., None], 0).sum(dim=2) / count
    return mean.softmax(dim=-1).mean(dim=1)


def check_gradients(name: str, mode: str | None) -> None:
    """Gradients with both kinds of checkpointing and two forwards before the backward equal those without.

    Models without checkpointing in transformers only need to have gradients.
    """
    found = []
    is_there = MODELS[name]().supports_gradient_checkpointing
    ways = (None, False) if name.startswith("wavlm") else (None, False, True)  # its own backward does not end
    for use_reentrant in ways if is_there else (None,):
        model = attach(name, mode, keep_rate=0.7, init_weights=False).train()
        base = model.base_model.model
        if use_reentrant is not None:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        first, second = run_batch(base, seed=1), run_batch(base, seed=2)
        torch.manual_seed(5)
        losses = [
            sum(t.float().square().mean() for t in tensors_of(model(**batch)) if t.requires_grad)
            for batch in (first, second)
        ]
        (losses[0] + losses[1]).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain = found[0]
    assert sum(gradient is not None for gradient in plain.values()) > 4
    for gradients in found[1:]:
        for parameter, expected in plain.items():
            assert (gradients[parameter] is None) == (expected is None), parameter
            if expected is not None:
                torch.testing.assert_close(gradients[parameter], expected, atol=1e-5, rtol=1e-4, msg=parameter)


def check_lean(name: str, mode: str | None) -> None:
    """Gradients of lean blocks, `exact` and `max`, equal those of stock blocks to 1e-5."""

    def gradients(lean: str) -> tuple[dict[str, Tensor | None], str]:
        model = attach(name, mode, keep_rate=0.7, init_weights=False, lean=lean).train()
        batch = run_batch(model.base_model.model)
        torch.manual_seed(5)
        sum(t.float().square().mean() for t in tensors_of(model(**batch)) if t.requires_grad).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, model.base_model.explain()

    expected, _ = gradients("off")
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for level in ("exact", "max"):
        found, explained = gradients(level)
        assert "runs stock" not in explained, explained
        for parameter, gradient in expected.items():
            assert (found[parameter] is None) == (gradient is None), parameter
            if gradient is not None:
                # gradients that are zero except for rounding (a key's bias) are compared at the others' scale
                size = max(float(gradient.abs().max()), 1e-2 * largest)
                assert float((found[parameter] - gradient).abs().max()) <= 1e-5 * size, parameter


def lean_levels(name: str) -> str:
    """The lean levels of the family's blocks that pass the check at attach."""
    found = {}
    for level in ("exact", "max"):
        lean = attach(name, None, lean=level).base_model.plan().blocks[1].lean
        halves = [] if lean is None else [half for half in ("attention", "mlp") if getattr(lean, half)]
        found[level] = "" if len(halves) == 2 else f" ({halves[0]} only)" if halves else None
    return ", ".join(f"{level}{note}" for level, note in found.items() if note is not None) or "off"


def check_save_and_load(name: str, mode: str | None) -> None:
    """A saved adapter, loaded on a new base model under another name, has the same outputs bit for bit."""
    model = attach(name, mode, init_weights=False)
    batch = run_batch(model.base_model.model)
    expected = outputs(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # trainable, because torch uses another order of operations if a weight does not require gradients
        loaded = PeftModel.from_pretrained(MODELS[name](), folder, "other", is_trainable=True).eval()
    assert_same(outputs(loaded, batch), expected)
    assert loaded.peft_config["other"].mode == model.peft_config["default"].mode


def check_disable(name: str, mode: str | None) -> None:
    """Disabled and unloaded, the model equals the base model bit for bit."""
    base = MODELS[name]().requires_grad_(False)  # torch uses another order of operations without gradients
    batch = run_batch(base)
    expected = outputs(base, batch)
    model = attach(name, mode, init_weights=False)
    changed = outputs(model, batch)
    assert not all(torch.equal(a, b) for a, b in zip(changed, expected, strict=True))
    with model.disable_adapter():
        assert_same(outputs(model, batch), expected)
    assert_same(outputs(model.unload(), batch), expected)


CHECKS: dict[str, Callable[[str, str | None], None]] = {
    "identity": check_identity,
    "masking": check_masking,
    "scores": check_scores,
    "gradients": check_gradients,
    "lean": check_lean,
    "save and load": check_save_and_load,
    "disable": check_disable,
}


WITHOUT_TOKENS = ("identity", "gradients", "lean", "save and load", "disable")
"""Those that apply where no token can be dropped: there are no dropped keys to mask and no scores."""


def use_eager(model: nn.Module, name: str) -> None:
    """Switch a stock model to eager attention."""
    if (
        name.startswith("data2vec") and name != "data2vec_audio"
    ):  # it chooses the class of its attention in its constructor
        from transformers.models.data2vec import modeling_data2vec_vision as module

        for attention in model.modules():
            if type(attention) is module.Data2VecVisionSdpaSelfAttention:
                attention.__class__ = module.Data2VecVisionSelfAttention
        return
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm's switch
            module.fused_attn = False
    model.set_attn_implementation("eager")


class _SoftmaxWatcher(TorchFunctionMode):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.softmax, torch.softmax, Tensor.softmax) and args[0].ndim == 4:
            args = (self.change(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def watched_softmax(blocks: list[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Context manager: `change(block index, logits [B, H, N, N])` replaces the logits of each attention softmax."""
    running: list[int] = []
    handles = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda _m, _a, index=index: running.append(index)))
        handles.append(block.register_forward_hook(lambda _m, _a, _o: (running.pop(), None)[1]))
    try:
        with _SoftmaxWatcher(lambda logits: change(running[-1], logits) if running else logits):
            yield
    finally:
        for handle in handles:
            handle.remove()
