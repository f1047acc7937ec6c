"""On a CUDA card: compiled models and CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from peft_bsr import BSRConfig, record_routes
from tests.gpu.setting import LEVELS, METHODS, ON_A_CARD, REDUCED, assert_near, batch, compiled, gradients, make

pytestmark = ON_A_CARD


@pytest.mark.parametrize(  # each takes a compiler's 10 to 20 seconds: the lane has four minutes
    ("settings", "mode"),
    [(LEVELS[0], "reduce-overhead"), (LEVELS[1], None), (LEVELS[2], "reduce-overhead"), ({"lean": "off"}, None)],
    ids=str,
)
def test_bsr(settings, mode):
    model = make(BSRConfig(**REDUCED, **settings))
    expected = gradients(model)
    run = compiled(model, mode)
    for _ in range(3):  # CUDA graphs are recorded in the second run
        assert_near(gradients(model, run), expected, 1e-5)


def test_synqt():
    model = make(METHODS["synqt"]())
    expected = gradients(model)
    run = compiled(model, "reduce-overhead")
    for _ in range(3):
        assert_near(gradients(model, run), expected, 1e-5)


def test_experts():
    model, inputs = make(METHODS["experts"]()), batch() | {"task": "a"}
    expected = gradients(model, **inputs)
    assert_near(gradients(model, compiled(model), **inputs), expected, 1e-5)


@pytest.mark.parametrize("method", ["bsr", "synqt"])
def test_routes_are_recorded_over_many_replays_of_cuda_graphs(method):
    model = make(METHODS[method]()).eval()
    batches = [batch(seed=seed)["pixel_values"] for seed in range(4)]
    with torch.no_grad(), record_routes(model) as expected:
        outputs = [model(pixel_values=images).logits for images in batches]
    run = compiled(model, "reduce-overhead")
    with torch.no_grad(), record_routes(model) as found:
        for images, output in zip(batches, outputs, strict=True):
            torch.testing.assert_close(run(pixel_values=images).logits.clone(), output, rtol=1e-4, atol=1e-4)
    assert [index for index, _ in found] == [index for index, _ in expected] == [1] * (4 if method == "bsr" else 0)
    for (_, route), (_, own) in zip(found, expected, strict=True):
        assert torch.equal(route.origins, own.origins)
