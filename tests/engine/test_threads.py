"""What docs/guides/threads.md says of threads and forks. Threads with forwards of their own: test_context.py."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from peft import get_peft_model

from peft_bsr import BSRConfig


def two_adapters(make_model):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks=[1, 3], init_weights=False))
    model.add_adapter("other", BSRConfig(trainable_blocks=[1, 3], init_weights=False))
    return model.eval()


@torch.no_grad()
def outputs(model, images):
    found = []
    for name in ("default", "other"):
        model.set_adapter(name)
        found.append(model(pixel_values=images).logits)
    return found


def test_an_adapter_that_is_set_in_the_middle_of_a_forward_gives_neither(make_model, images):
    """The other thread runs while the forward is in block 2."""
    model = two_adapters(make_model)
    default, other = outputs(model, images)
    model.set_adapter("default")
    block = model.base_model.model.vit.layers[2]

    def change(*_):
        thread = threading.Thread(target=model.set_adapter, args=("other",))
        thread.start()
        thread.join()

    handle = block.register_forward_hook(change)
    with torch.no_grad():
        mixed = model(pixel_values=images).logits
    handle.remove()
    assert not torch.allclose(mixed, default) and not torch.allclose(mixed, other)
    assert [torch.equal(a, b) for a, b in zip(outputs(model, images), (default, other), strict=True)] == [True, True]


def test_with_a_lock_each_thread_gets_its_adapter(make_model, images):
    model, lock = two_adapters(make_model), threading.Lock()
    expected = dict(zip(("default", "other"), outputs(model, images), strict=True))
    found = {name: [] for name in expected}

    def serve(name):
        for _ in range(5):
            with lock, torch.no_grad():
                model.set_adapter(name)
                found[name].append(torch.equal(model(pixel_values=images).logits, expected[name]))

    threads = [threading.Thread(target=serve, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [True] * 5 for name in expected}


def test_training_in_threads_gives_each_its_gradients(make_model, images):
    """One model, one loss per thread: gradients add up as in sequence."""
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[2])).train()
    batches = [images, images.flip(3), torch.cat([images, images])]

    def step(batch):
        model(pixel_values=batch).logits.square().sum().backward()

    for batch in batches:
        step(batch)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    threads = [threading.Thread(target=step, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_forked_child_predicts_and_trains_by_itself(make_model, images):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[2])).train()
    with torch.no_grad():
        expected = model(pixel_values=images).logits
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            same = torch.allclose(model(pixel_values=images).logits, expected, atol=1e-5)
            model(pixel_values=images).logits.sum().backward()
            status = 0 if same else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(p.grad is None for p in model.parameters())
