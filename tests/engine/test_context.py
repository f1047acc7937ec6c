"""The running forward: opened and closed by hooks of the model, whatever happens in the middle."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref

import pytest
import torch
from peft import get_peft_model

from peft_bsr import ALaSTConfig, BSRConfig, SynQTConfig, record_routes
from peft_bsr.errors import ForwardError

METHODS = {
    "bsr": lambda: BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1, 2]),
    "alast": ALaSTConfig,
    "synqt": lambda: SynQTConfig(layers=[1, 2, 3]),
}


def context_of(model):
    return model.base_model.controllers[0].context.now


def assert_empty(context):
    assert context.owner is None and context.route is None and context.running is None and context.reading is None


@pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning")  # of the hook
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_after_an_exception(method, error, make_model, images):
    model = get_peft_model(make_model(), METHODS[method]()).train()
    reference = copy.deepcopy(model)
    base = model.base_model.model
    seen = []

    def stop(module, args):
        seen.append(weakref.ref(args[0]))
        raise error("in the middle")

    handle = base.vit.layers[2].mlp.register_forward_pre_hook(stop)
    with pytest.raises(error, match="in the middle"):
        model(pixel_values=images)
    handle.remove()
    interrupted = error is KeyboardInterrupt  # torch calls no hooks then; the next forward starts fresh all the same
    if not interrupted:
        assert_empty(context_of(model))
    if method == "bsr" and not interrupted:
        with pytest.raises(ForwardError, match="ran outside of the model's forward"):
            base.vit.layers[2](torch.randn(2, 17, 32))
    torch.manual_seed(0)
    found = model(pixel_values=images).logits
    torch.manual_seed(0)
    expected = reference(pixel_values=images).logits
    if method != "alast":  # its budgets have seen one more part of a forward
        assert torch.equal(found, expected)
    assert_empty(context_of(model))
    assert seen[0]() is None, "the graph of the forward that failed is gone"


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_leaves_nothing(method, make_model, images):
    model = get_peft_model(make_model(), METHODS[method]())
    for training in (True, False):
        model.train(training)(pixel_values=images)
        assert_empty(context_of(model))


def test_the_backbone_may_be_called_by_itself(make_model, images):
    model = get_peft_model(make_model(), METHODS["bsr"]()).eval()
    base, lengths = model.base_model.model, []
    base.vit.register_forward_hook(lambda m, a, output: lengths.append(output.last_hidden_state.shape[1]))
    model(pixel_values=images)
    base.vit(images)
    assert lengths[0] == lengths[1] < 17
    assert_empty(context_of(model))


def test_a_forward_inside_of_another_models_forward(make_model, images):
    outer, inner = (get_peft_model(make_model(seed=i), METHODS["bsr"]()).eval() for i in range(2))
    expected = [model(pixel_values=images).logits for model in (outer, inner)]
    found = []
    block = outer.base_model.model.vit.layers[2]
    handle = block.register_forward_hook(lambda *_: found.append(inner(pixel_values=images).logits) and None)
    assert torch.equal(outer(pixel_values=images).logits, expected[0])
    handle.remove()
    assert torch.equal(found[0], expected[1])


def test_threads_have_their_own_forward(make_model, images):
    model = get_peft_model(make_model(), METHODS["bsr"]()).eval()
    batches = [images[:1], images, torch.cat([images, images])]
    expected = [model(pixel_values=batch).logits for batch in batches]
    found: dict[int, list[bool]] = {}

    def run(i):
        found[i] = [torch.equal(model(pixel_values=batches[i]).logits, expected[i]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(found[i]) for i in range(3))


def test_recorders_are_taken_off_whatever_happens(make_model, images):
    model = get_peft_model(make_model(), METHODS["bsr"]()).eval()
    with record_routes(model) as outer:
        with pytest.raises(ZeroDivisionError), record_routes(model) as inner:
            model(pixel_values=images)
            raise ZeroDivisionError
        model(pixel_values=images)
    model(pixel_values=images)
    assert (len(inner), len(outer)) == (2, 4)
    assert context_of(model).recorders == []


@pytest.mark.parametrize("method", ["bsr", "synqt"])
def test_copies_and_pickles_run_by_themselves(method, make_model, images, tmp_path):
    model = get_peft_model(make_model(), METHODS[method]()).train()
    torch.manual_seed(1)  # SynQT has dropout
    expected = model(pixel_values=images).logits
    reference = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (reference, torch.load(tmp_path / "model.pt", weights_only=False)):
        torch.manual_seed(1)
        assert torch.equal(other(pixel_values=images).logits, expected)
        other(pixel_values=images).logits.sum().backward()
        assert context_of(other) is not context_of(model)
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_of_a_compiled_block_runs_its_own_weights(make_model, images):
    model = get_peft_model(make_model(), METHODS["bsr"]()).eval()
    expected, block = model(pixel_values=images).logits, model.get_base_model().vit.layers[3]
    block.compile(backend="eager")
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert all(torch.equal(other(pixel_values=images).logits, expected) for other in copies)
