"""Forwards that end in the middle, parts of a model called without the rest, copies made while a forward runs."""

from __future__ import annotations

import copy
import gc
import io
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_bsr import MoEConfig, SynQTConfig, TaskConfig, record_routes
from peft_bsr.engine import LivingBytes, run_until
from peft_bsr.errors import ForwardError

sys.path.insert(0, str(Path(__file__).parent))

from pairs import SUPPORTED, assert_alike, base_of, batch_of, make, step

pytestmark = [pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning"), pytest.mark.sampled(2)]


def with_synqt():
    torch.manual_seed(3)
    return get_peft_model(SUPPORTED["vit"]().double(), SynQTConfig(layers=[0, 1, 3])).train()


MAKERS = {"bsr": lambda: make("vit", "exact"), "last": lambda: make("vit", "max", keep_rate=1.0), "synqt": with_synqt}


def left_behind(model):
    context = model.base_model.controllers[0].context.now
    names = ("owner", "route", "running", "reading", "call", "resume_point")
    return {name: type(getattr(context, name)).__name__ for name in names if getattr(context, name) is not None}


def fail(model, place, error, run=None):
    """Run a forward that a pre-hook on a module ends; returns weak references to the hook's tensors."""
    seen = []

    def stop(module, args):
        seen.extend(weakref.ref(t) for t in args if isinstance(t, torch.Tensor))
        raise error("in the middle")

    handle = base_of(model).get_submodule(place).register_forward_pre_hook(stop)
    try:
        with pytest.raises(error, match="in the middle"):
            run() if run else model(**batch_of(model))
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_left_wherever_a_forward_ends(name, error):
    model = MAKERS[name]()
    expected = step(model)
    inside = ["layers.2", "layers.2.mlp", "layers.3.attention", "layers.1.attention.v_proj", "layers.0"]
    for place in [*(f"vit.{part}" for part in inside), "vit.embeddings", "vit.layernorm", "vit", "classifier", ""]:
        if name == "synqt" and place.startswith("vit.layers.3."):
            continue  # it does not run
        seen = fail(model, place, error)
        assert left_behind(model) == {}, place
        assert all(reference() is None for reference in seen), (
            f"{place}: the graph is gone without a garbage collection"
        )
        assert_alike(step(model), expected, 0.0, about=place)


TASKS = {
    "tasks": [TaskConfig("parts", 4, "segmentation")],
    "moe": MoEConfig(num_experts=2, top_k=1, balance_weight=0.1),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ends", [False, True], ids=["whole", "interrupted"])
@pytest.mark.parametrize("settings", [{}, TASKS], ids=["bsr", "tasks"])
def test_a_checkpointed_forward_without_a_backward_is_freed(settings, ends):
    """A checkpoint holds the call of its block, so the call must not hold what has the checkpoint in its graph."""
    model = make("vit", "exact", trainable_blocks=[1, 2, 3], reduction_blocks=[2], **settings)
    base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(model)
    with LivingBytes() as living:
        if ends:
            fail(model, "vit.layernorm", ValueError, lambda: model(**batch))
        else:
            model(**batch)
    assert living.bytes() == 0


def test_a_failed_forward_without_hooks_of_the_model_leaves_nothing():
    """The blocks are called without hooks of the model: by `forward`, or in a loop over the blocks."""
    model = make("vit", "exact")
    vit, batch = base_of(model).vit, batch_of(model)
    fail(model, "vit.layers.2.mlp", ValueError, lambda: vit.forward(**batch))
    assert left_behind(model) == {}
    with pytest.raises(ForwardError, match="ran outside of the model's forward"):
        vit.layers[3](torch.randn(2, 17, 32).double())
    assert left_behind(model) == {}


def test_a_block_alone_after_a_forward_that_was_interrupted_is_refused():
    model = make("vit", "exact")
    fail(model, "vit.layers.3", KeyboardInterrupt)
    for index in (1, 2, 3):
        with pytest.raises(ForwardError, match="ran outside of the model's forward"):
            base_of(model).vit.layers[index](torch.randn(2, 17, 32).double())
    assert left_behind(model) == {}


@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_forward_that_stops_on_purpose_leaves_nothing(index):
    model = make("vit", "exact", trainable_blocks=[3])
    expected = step(model)
    resume_point = run_until(model, index, batch_of(model))
    assert resume_point.tokens.shape[2] == 32
    assert left_behind(model) == {}
    assert_alike(step(model), expected, 0.0)


@pytest.mark.parametrize("keep_rate", [1.0, 0.7])
def test_parts_of_a_model_give_all_their_tokens_in_training(keep_rate):
    """The last block computes only the class token only if nothing else can read its output."""
    results = {}
    for lean in ("off", "exact", "max"):
        model = make("vit", lean, keep_rate=keep_rate)
        vit, batch = base_of(model).vit, batch_of(model)
        states = vit.embeddings(batch["pixel_values"])
        for layer in vit.layers:
            states = layer(states)
        results[lean] = {
            "output backbone": vit(**batch).last_hidden_state,
            "output forward": vit.forward(**batch).last_hidden_state,
            "output loop": states,
        }
        if keep_rate == 1:
            results[lean]["output alone"] = vit.layers[3](torch.ones(2, 17, 32).double())
        assert left_behind(model) == {}
        model(**batch)
        assert ("1 tokens only" in model.base_model.explain()) is (lean != "off")
        assert "class token only runs stock" not in model.base_model.explain()
    assert results["off"]["output backbone"].shape[1] > 1
    for lean in ("exact", "max"):
        assert_alike(results[lean], results["off"])


def test_a_forward_of_another_model_in_a_hook():
    outer, inner = make("vit", "exact"), make("deit", "max")
    expected = [step(outer), step(inner)]
    found = []
    handle = base_of(outer).vit.layers[2].mlp.register_forward_hook(lambda *_: found.append(step(inner)) and None)
    assert_alike(step(outer), expected[0])
    handle.remove()
    assert_alike(found[0], expected[1], 0.0)
    assert left_behind(outer) == left_behind(inner) == {}


def test_a_forward_of_the_same_model_in_a_hook_is_refused_not_wrong():
    model = make("vit", "exact")
    expected, batch, inside = step(model), batch_of(model), [True]

    def again(*_):
        if inside:
            inside.clear()
            model(**batch)

    handle = base_of(model).vit.layers[1].register_forward_hook(again)
    with pytest.raises(ForwardError, match="ran outside of the model's forward"):
        model(**batch)
    handle.remove()
    assert left_behind(model) == {}
    assert_alike(step(model), expected, 0.0)


def test_a_copy_made_while_a_forward_runs_is_a_model_of_its_own():
    model = make("vit", "exact")
    expected, copies = step(model), []
    model.zero_grad()

    def duplicate(*_):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.extend([copy.deepcopy(model), torch.load(buffer, weights_only=False)])

    handle = base_of(model).vit.layers[2].mlp.register_forward_pre_hook(HOOK.set(duplicate))
    model(**batch_of(model))
    handle.remove()
    for other in copies:
        base_of(other).vit.layers[2].mlp._forward_pre_hooks.clear()
        assert left_behind(other) == {}
        assert_alike(step(other), expected)
        assert other.base_model.controllers[0].context is not model.base_model.controllers[0].context
    assert all(p.grad is None for p in model.parameters())


class Hook:
    """A hook that can be pickled: the function it runs is an attribute of the class."""

    run = None

    def set(self, run):
        Hook.run = staticmethod(run)
        return self

    def __call__(self, *args):
        run, Hook.run = Hook.run, None
        return run and run(*args)


HOOK = Hook()


def replicate(model):
    """The replica that `nn.DataParallel` makes per device, on the CPU: parameters are plain tensors."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        replica._modules.update({name: copies[child] for name, child in module._modules.items() if child is not None})
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
    return copies[model]


@pytest.mark.parametrize("lean", ["exact", "max"])
@pytest.mark.parametrize("keep_rate", [1.0, 0.7])
def test_replicas_in_threads_train_as_one_model(keep_rate, lean):
    models, results, gone = [make("vit", level, keep_rate=keep_rate) for level in (lean, "off")], [], []
    for model in models:
        found = {}

        def run(replica, i, batch, found=found):
            images = batch["pixel_values"]
            found[i] = replica(pixel_values=images + i).logits

        step(model)
        model.zero_grad()
        replicas = [replicate(model) for _ in range(2)]
        batch = batch_of(model)
        threads = [threading.Thread(target=run, args=(r, i, batch)) for i, r in enumerate(replicas)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (found[0].square().mean() + found[1].square().mean()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({f"output {i}": logits.detach() for i, logits in found.items()} | gradients)
        gone += [weakref.ref(module) for replica in replicas for module in replica.modules()]
        del replicas, found, threads, run
    assert len(results[0]) > 10
    assert_alike(*results)
    gc.collect()
    assert all(reference() is None for reference in gone), "the model holds no replica"


def test_hooks_on_replicas_see_all_tokens():
    model, seen = make("vit", "exact", keep_rate=1.0), []
    step(model)
    base_of(model).vit.layernorm.register_forward_hook(lambda m, args, output: seen.append(output.shape[1]))
    replicate(model)(**batch_of(model))
    assert seen == [17]


def test_recorded_routes_of_threads_and_of_forwards_that_fail():
    model = make("vit", "exact", reduction_blocks=[1, 2])
    with record_routes(model) as outer:
        fail(model, "vit.layers.2", ValueError)
        with record_routes(model) as inner:
            step(model)
        thread = threading.Thread(target=step, args=(model,))
        thread.start()
        thread.join()
    assert [index for index, _ in inner] == [1, 2]
    assert [index for index, _ in outer] == [1, 1, 2]
    assert model.base_model.controllers[0].context.now.recorders == []
