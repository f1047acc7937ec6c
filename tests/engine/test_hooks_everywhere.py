"""Hooks on any module of a lean model see, count and change what they do with `lean="off"`, to 1e-9."""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_bsr.errors import LeanBlockWarning

sys.path.insert(0, str(Path(__file__).parent))

from pairs import assert_alike, base_of, batch_of, make, modules_of, step, stock_halves

pytestmark = pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning")


def tensors_in(values):
    if isinstance(values, Tensor):
        return [values.detach().clone()]
    if isinstance(values, dict):
        values = tuple(values.values())
    return [t for value in values for t in tensors_in(value)] if isinstance(values, (tuple, list)) else []


def larger(values):
    """Scale floating-point tensors up by 10%."""
    if isinstance(values, Tensor):
        return values * 1.1 if values.is_floating_point() else values
    return tuple(map(larger, values)) if isinstance(values, tuple) else values


class Hooks:
    """Hooks of every kind that record what they see and change it."""

    def __init__(self):
        self.seen = []

    def note(self, changes, *values):
        self.seen.append(tensors_in(values))
        return larger(changes)

    def forward(self, module, args, output):
        return self.note(output, args, output)

    def pre(self, module, args):
        return self.note(args, args)

    def backward(self, module, of_inputs, of_outputs):
        return self.note(of_inputs, of_inputs, of_outputs)

    def backward_pre(self, module, of_outputs):
        return self.note(of_outputs, of_outputs)

    def put_on(self, module, kinds=("forward", "pre", "backward", "backward_pre")):
        add = {"forward": module.register_forward_hook, "pre": module.register_forward_pre_hook}
        add |= {"backward": module.register_full_backward_hook, "backward_pre": module.register_full_backward_pre_hook}
        return [add[kind](getattr(self, kind)) for kind in kinds]


def hooked_step(model, module, **kinds):
    """What hooks on the module saw in a training step, and the step's result."""
    hooks = Hooks()
    handles = hooks.put_on(module, **kinds)
    try:
        outcome = step(model)
    finally:
        for handle in handles:
            handle.remove()
    return hooks.seen, outcome


def assert_same_sights(found, expected, about):
    assert [[t.shape for t in call] for call in found] == [[t.shape for t in call] for call in expected], about
    pairs = [(a, b) for call, other in zip(found, expected, strict=True) for a, b in zip(call, other, strict=True)]
    size = max((float(b.abs().max()) for _, b in pairs if b.numel()), default=0.0)
    for a, b in pairs:
        assert a.dtype == b.dtype, about
        assert not a.numel() or float((a - b).abs().max()) <= 1e-9 * size, about


@functools.cache
def with_lean_off(family, trainable, keep_rate):
    """What hooks see, by module."""
    model = make(family, "off", trainable=trainable, keep_rate=keep_rate)
    inside = {name for index in range(4) for name in modules_of(model, index)}
    modules = {name: m for name, m in base_of(model).named_modules() if name not in inside and "embed" not in name}
    modules |= modules_of(model, 1) | modules_of(model, 3)
    left_out = (nn.ModuleDict, nn.ModuleList)  # never called
    names = [n for n, m in modules.items() if not isinstance(m, left_out) and "q_proj" not in n and "k_proj" not in n]
    return {name: hooked_step(model, modules[name]) for name in names}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lean", ["exact", "max"])
@pytest.mark.parametrize(
    ("family", "trainable", "keep_rate"),
    [("vit", "full", 1.0), ("vit", "lora", 0.7), ("dinov2", "full", 0.7), ("data2vec", "full", 0.7)],
)
def test_hooks_on_any_module_see_and_change_the_same(family, trainable, keep_rate, lean):
    """Blocks, each part of them, adapters' copies and updates, base layers, norm, classifier, backbone, model."""
    model = make(family, lean, trainable=trainable, keep_rate=keep_rate)
    for name, (seen, outcome) in with_lean_off(family, trainable, keep_rate).items():
        found, result = hooked_step(model, base_of(model).get_submodule(name))
        assert_same_sights(found, seen, name)
        assert_alike(result, outcome, about=name)
    step(model)
    assert stock_halves(model) == {}, "lean again without hooks"


PLACES = ["layernorm_before", "attention.v_proj", "attention", "layernorm_after", "mlp", "mlp.activation_fn", "dropout"]


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward_pre"])
def test_one_hook_of_any_kind_is_enough(kind):
    models = [make("vit", lean) for lean in ("exact", "off")]
    for place in PLACES:
        (found, result), (seen, outcome) = [
            hooked_step(m, base_of(m).vit.layers[1].get_submodule(place), kinds=[kind]) for m in models
        ]
        assert seen
        assert_same_sights(found, seen, place)
        assert_alike(result, outcome, about=place)
        halves = {"mlp": ["mlp"], "layernorm_after": ["mlp"], "mlp.activation_fn": ["mlp"]}
        halves["dropout"] = ["attention", "mlp"]
        expected = {
            f"1 {half}": f"the hook Hooks.{kind} looks at its modules" for half in halves.get(place, ["attention"])
        }
        assert stock_halves(models[0]) == expected
        for half, reason in expected.items():
            assert f"{half[2:]} runs stock: {reason}" in models[0].base_model.explain()
        step(models[0])
        assert stock_halves(models[0]) == {}, f"lean again without the hook on {place!r}"


@pytest.mark.parametrize("place", ["", "attention.o_proj", "attention.o_proj.bsr_params.default"])
def test_hooks_on_what_lean_halves_call_leave_them_lean(place):
    model = make("vit", "exact")
    seen, _ = hooked_step(model, base_of(model).vit.layers[1].get_submodule(place))
    assert len(seen) == 4
    assert stock_halves(model) == {}


@pytest.mark.parametrize("lean", ["exact", "max"])
def test_hooks_see_all_tokens_of_the_last_block(lean):
    models = [make("vit", level, keep_rate=1.0) for level in (lean, "off")]
    assert models[0].base_model.plan().blocks[3].lean.num_queries == 1
    places = ["vit.layers.3", "vit.layers.3.attention.o_proj", "vit.layernorm", "vit"]
    for place, kind in [(place, kind) for place in places for kind in ("forward", "pre", "backward")]:
        (found, result), (seen, outcome) = [
            hooked_step(m, base_of(m).get_submodule(place), kinds=[kind]) for m in models
        ]
        assert_same_sights(found, seen, place)
        assert_alike(result, outcome)
        assert stock_halves(models[0]) == {"3 class token only": f"the hook Hooks.{kind} reads its output"}
        assert f"class token only runs stock: the hook Hooks.{kind}" in models[0].base_model.explain()
    step(models[0])
    assert stock_halves(models[0]) == {}


def test_the_warning_comes_once_and_says_why():
    model = make("vit", "exact")
    handle = base_of(model).vit.layers[2].mlp.register_forward_hook(lambda *_: None)
    with pytest.warns(LeanBlockWarning) as found:
        step(model)
        step(model)
    assert len(found) == 1
    said = str(found[0].message)
    assert said.startswith(
        "block 2 runs its mlp half as stock modules and keeps more for backward than planned: the hook"
    )
    assert "test_the_warning_comes_once_and_says_why.<locals>.<lambda> looks at its modules" in said
    assert "`model.base_model.explain()` lists all blocks" in said
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)


@pytest.mark.parametrize("keep_rate", [0.7, 1.0])
def test_nothing_is_said_where_nothing_was_planned_or_kept(keep_rate):
    """Frozen leading blocks, evaluation, no gradients, `lean="off"`, and the class token only."""
    lean, off = make("vit", "exact", keep_rate=keep_rate), make("vit", "off", keep_rate=keep_rate)
    base_of(lean).vit.layers[0].mlp.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(lean)
        for model in (lean, off):
            base_of(model).vit.layers[3].mlp.register_forward_hook(lambda *_: None)
        step(off)
        lean.eval()(**batch_of(lean))
        with torch.no_grad():
            lean.train()(**batch_of(lean))
    assert stock_halves(lean) == {}


def from_library(module):
    """A hook as a library would write it."""

    def hook(*_):
        return None

    hook.__module__ = module
    return hook


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        ("torch.distributed.fsdp._fully_shard", False),
        ("accelerate.hooks", False),
        ("accelerate", False),
        ("accelerated_study.probes", True),
        ("torch.nn.utils.prune", True),
    ],
)
def test_hooks_that_move_weights_do_not_count(module, counts):
    model = make("vit", "exact")
    base_of(model).vit.layers[1].mlp.fc1.register_forward_pre_hook(from_library(module))
    step(model)
    assert bool(stock_halves(model)) is counts


def test_hooks_for_gradients_of_embeddings_do_not_count():
    model = make("vit", "exact", keep_rate=1.0)
    base_of(model).enable_input_require_grads()
    step(model)
    assert stock_halves(model) == {}


def test_a_hook_that_takes_the_place_of_one_that_does_not_count_is_seen():
    models, results = [make("vit", lean) for lean in ("exact", "off")], []
    for model in models:
        linear = base_of(model).vit.layers[1].mlp.fc1
        handle = linear.register_forward_hook(from_library("accelerate.hooks"))
        step(model)
        handle.remove()
        linear.register_forward_hook(lambda _m, _a, output: output * 1.5)
        results.append(step(model))
    assert_alike(*results)


def test_hooks_of_tensors_and_parameters_fire():
    counts, results = [], []
    for lean in ("exact", "max", "off"):
        model, seen = make("vit", lean), []
        weight = base_of(model).vit.layers[1].mlp.fc1.bsr_params["default"].weight
        weight.register_hook(lambda gradient: gradient * 2)
        weight.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        results.append(step(model))
        counts.append(len(seen))
        assert stock_halves(model) == {}
    assert counts == [1, 1, 1]
    assert_alike(results[0], results[2])
    assert_alike(results[1], results[2])


@pytest.mark.parametrize("asked", [["output_hidden_states"], ["output_attentions", "output_hidden_states"]])
@pytest.mark.parametrize("lean", ["exact", "max"])
def test_captured_outputs_are_the_same_tuples(lean, asked):
    models, captured = [make("vit", level, keep_rate=1.0) for level in (lean, "off")], []
    for model in models:
        base_of(model).set_attn_implementation("eager")
        step(model)
        output = model(**batch_of(model), **dict.fromkeys(asked, True))
        captured.append([t for name in asked for t in output[name.removeprefix("output_")]])
    assert len(captured[1]) >= 4
    assert_same_sights(*[[[t.detach() for t in tensors]] for tensors in captured], "captured")
    step(models[0])
    assert stock_halves(models[0]) == {}, "lean again, although transformers' hooks stay"
    assert any(m._forward_hooks for m in base_of(models[0]).vit.layers[1].attention.modules())


def test_gradients_cross_captured_outputs():
    results = []
    for lean in ("exact", "off"):
        model = make("vit", lean, keep_rate=1.0)
        base_of(model).set_attn_implementation("eager")
        output = model(**batch_of(model), output_hidden_states=True, output_attentions=True)
        (output.hidden_states[3].square().sum() + output.attentions[3].square().sum() * 9).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_alike(*results)


def test_a_forward_set_on_a_module_runs():
    """Some libraries wrap `forward` instead of adding hooks."""
    models = [make("vit", lean) for lean in ("exact", "off")]
    places = ["mlp.fc1", "mlp.fc1.bsr_params.default", "mlp.activation_fn", "layernorm_after", "mlp", "dropout"]
    for place in [*places, "attention.o_proj"]:
        results = []
        for model in models:
            module = base_of(model).vit.layers[1].get_submodule(place)
            run = module.forward
            module.forward = lambda *args, run=run: run(*args) * 1.5
            results.append(step(model))
            reasons = stock_halves(models[0])
            del module.forward
        assert_alike(*results, about=place)
        expected = f"another `forward` was set on its {type(module).__name__}"
        assert set(reasons.values()) == (set() if place == "attention.o_proj" else {expected})
    step(models[0])
    assert stock_halves(models[0]) == {}
