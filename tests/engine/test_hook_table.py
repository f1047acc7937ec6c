"""The table of docs/guides/hooks.md: each of its rows is made here, and compared with the stock model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_bsr import BSRConfig
from peft_bsr.backbones import tensors_of

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
sys.path.insert(0, str(Path(__file__).parent))

from families import SUPPORTED, run_batch
from pairs import stock_halves

pytestmark = [
    pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook"),
]
PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "hooks.md").read_text()
ROWS = {
    "the inner model (`model.base_model.model.vit`)": "vit",
    "a block before the first trained one": "vit.layers.0",
    "the attention of such a block": "vit.layers.0.attention",
    "a trained or later block": "vit.layers.2",
    "its first norm": "vit.layers.2.layernorm_before",
    "its attention": "vit.layers.2.attention",
    "its query, key or value projection": "vit.layers.2.attention.v_proj",
    "its output projection": "vit.layers.2.attention.o_proj",
    "its second norm": "vit.layers.2.layernorm_after",
    "its MLP": "vit.layers.2.mlp",
    "a Linear of its MLP": "vit.layers.2.mlp.fc1",
    "the activation in its MLP": "vit.layers.2.mlp.activation_fn",
    "the last block": "vit.layers.3",
    "the MLP of the last block": "vit.layers.3.mlp",
    "the final norm": "vit.layernorm",
    "the classifier": "classifier",
}
MODES = {
    "off": {"lean": "off"},
    "exact": {"lean": "exact"},
    "max": {"lean": "max"},
    "int8": {"saved_activations": "int8"},
    "checkpointing": {},
}
HALVES = {
    "attention": "its attention half",
    "mlp": "its MLP half",
    "class token only": "the last block's class token only",
}


def first(values):
    """The first tensor among a hook's arguments."""
    if isinstance(values, Tensor):
        return values
    values = values.to_tuple() if hasattr(values, "to_tuple") else values
    return next((t for value in values for t in [first(value)] if t is not None), None) if values else None


def put_hooks(module, seen):
    """A hook of every kind; each records the first tensor among its arguments."""

    def note(kind, values):
        value = first(values)
        seen.append((kind, None if value is None else value.detach().clone()))

    return [
        module.register_forward_pre_hook(lambda m, a, k: note("forward", a or [*k.values()]), with_kwargs=True),
        module.register_forward_hook(lambda m, a, output: note("forward", output)),
        module.register_full_backward_pre_hook(lambda m, grads: note("backward", grads)),
        module.register_full_backward_hook(lambda m, grads, outer: note("backward", outer)),
    ]


def step(model, base, training, checkpointing):
    model.zero_grad()
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    batch = run_batch(base)
    sum(t.square().mean() for t in tensors_of(model.train(training)(**batch)) if t.requires_grad).backward()


def make_stock():
    torch.manual_seed(0)
    return SUPPORTED["vit"]()


STOCK = make_stock()
MODELS: dict[str, nn.Module] = {}


def seen_on(model, base, place, training, checkpointing):
    seen: list = []
    handles = put_hooks(base.get_submodule(place), seen)
    try:
        step(model, base, training, checkpointing)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def model_in(mode):
    if mode not in MODELS:
        settings = {"trainable_blocks": [1, 3], "reduction_blocks": [], **MODES[mode]}
        MODELS[mode] = get_peft_model(make_stock(), BSRConfig(**settings))
    return MODELS[mode]


@pytest.mark.parametrize("row", ROWS)
def test_each_row_is_what_the_stock_model_shows(row):
    """Every kind of hook, in training and evaluation, in each mode; the same calls, with the same numbers."""
    place, backward, asides = ROWS[row], set(), {}
    for training in (True, False):
        for mode in MODES:
            model, checkpointing = model_in(mode), mode == "checkpointing"
            expected = seen_on(STOCK, STOCK, place, training, checkpointing)
            found = seen_on(model, model.base_model.model, place, training, checkpointing)
            if ".layers.0" in place:  # before the graph: only forward hooks run, without recomputation
                backward |= {kind for kind, _ in found if kind == "backward"}
                expected = [(kind, value) for kind, value in expected if kind == "forward"][:2]
            assert [kind for kind, _ in found] == [kind for kind, _ in expected], (mode, training)
            for (kind, value), (_, other) in zip(found, expected, strict=True):
                if value is not None:
                    close = {"atol": 2e-2, "rtol": 0.1} if mode == "int8" else {"atol": 1e-5, "rtol": 1e-4}
                    torch.testing.assert_close(value, other, msg=f"{mode} {training} {kind}", **close)
            asides[mode, training] = stock_halves(model) if training else {}
    kinds = {kind for kind, _ in expected}
    parts = sorted({name.partition(" ")[2] for name in asides["exact", True]}, key=list(HALVES).index)
    stock = ", ".join(HALVES[part] for part in parts) or "nothing"
    forward, seen_backward = "all tokens", "all tokens" if "backward" in kinds else "never"
    if row == "the classifier":
        forward, seen_backward = "its input", "its output"
    elif place == "vit":
        seen_backward = "none, as on the stock model"
    assert asides["max", True].keys() == asides["exact", True].keys() and not asides["off", True]
    assert f"| {row} | {forward} | {seen_backward} | {stock} |" in PAGE


def test_the_table_has_no_other_rows():
    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.splitlines() if line.startswith("| ")]
    assert rows == ["hook on", *ROWS]


@pytest.mark.parametrize("mode", MODES)
def test_the_inner_model_called_by_itself_gives_all_tokens(mode):
    model = model_in(mode).train()
    images = run_batch(STOCK)["pixel_values"]
    found, expected = (m.vit(pixel_values=images).last_hidden_state for m in (model.base_model.model, STOCK.train()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


class Recorder:
    """Hooks that cannot be copied."""

    def __init__(self) -> None:
        self.calls, self.lock = 0, open(__file__)  # noqa: SIM115

    def note(self, *_):
        self.calls += 1


KINDS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_a_module_run_on_its_trained_copy_until_they_are_removed(when, kind):
    """Hooks from before and after the adapter was attached."""
    base = make_stock()
    places = [base.get_submodule(n) for n in ("vit.layers.2.mlp.fc1", "vit.layers.2.layernorm_before", "vit.layernorm")]
    recorders = [Recorder() for _ in places]

    def put():
        return [getattr(m, f"register_{kind}")(r.note) for m, r in zip(places, recorders, strict=True)]

    handles = put() if when == "before" else []
    model = get_peft_model(base, BSRConfig(trainable_blocks=[2, 3], reduction_blocks=[]))
    handles = handles or put()
    for recorder in recorders:
        recorder.calls = 0
    step(model, base, True, False)
    assert [recorder.calls for recorder in recorders] == [1, 1, 1]
    assert set(stock_halves(model)) == {"2 mlp", "2 attention", "3 class token only"}
    with model.disable_adapter(), torch.no_grad():
        model(**run_batch(base))
    assert all(recorder.calls == (2 if kind.startswith("forward") else 1) for recorder in recorders)
    for recorder, handle in zip(recorders, handles, strict=True):
        handle.remove()
        recorder.calls = 0
        recorder.lock.close()
    step(model, base, True, False)
    assert [recorder.calls for recorder in recorders] == [0, 0, 0] and stock_halves(model) == {}
