"""Tensors that outlive a forward are not in the memory of CUDA graphs, which the next one overwrites."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, fx
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, MoEConfig, record_routes, record_usage
from peft_bsr.core import Forward, outliving

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 32, "patch_size": 8, "num_labels": 3}
REDUCED = {"trainable_blocks": [2], "reduction_blocks": [0, 1], "keep_rate": 0.5}
BATCHES = torch.randn(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(config):
    torch.manual_seed(0)
    return get_peft_model(ViTForImageClassification(ViTConfig(**SIZES)), config)


def overwriting(graph: fx.GraphModule, _: list[Tensor]):
    """A backend whose outputs share memory between runs, except for operators outside of CUDA graphs."""
    (outputs,) = graph.graph.output_node().args
    pool: dict[int, Tensor] = {}

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = list(graph(*inputs))
        for place, (node, value) in enumerate(zip(outputs, found, strict=True)):
            if torch.Tag.cudagraph_unsafe not in getattr(node.target, "tags", ()):
                found[place] = pool.setdefault(place, torch.empty_like(value)).copy_(value)
        return tuple(found)

    return run


@pytest.fixture(autouse=True)
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["compact", "full_view"])
def test_recorded_routes_share_no_memory_with_the_forward(mode, monkeypatch):
    inside, reduced = [], Forward.reduced
    monkeypatch.setattr(
        Forward, "reduced", lambda now, i, origins, *rest: inside.append(origins) or reduced(now, i, origins, *rest)
    )
    model = make(BSRConfig(**REDUCED, mode=mode)).eval()
    inside.clear()  # forwards at attach
    with record_routes(model) as routes:
        model(pixel_values=BATCHES[0])
    assert len(routes) == len(inside) == 2
    for (_, route), origins in zip(routes, inside, strict=True):
        assert torch.equal(route.origins, origins)
        assert route.origins.untyped_storage().data_ptr() != origins.untyped_storage().data_ptr()
        assert route.call is None, "labels and tokens of the batch are not kept"


@torch.no_grad()
def test_routes_of_compiled_forwards_are_not_overwritten():
    model = make(BSRConfig(**REDUCED)).eval()
    with record_routes(model) as expected:
        for images in BATCHES:
            model(images)
    compiled = torch.compile(model, fullgraph=True, backend=overwriting)
    with record_routes(model) as found:
        for images in BATCHES:
            compiled(images)
    assert len(found) == len(expected) == 6
    assert not torch.equal(expected[0][1].origins, expected[4][1].origins), "images differ, and so do their routes"
    for (index, route), (other, own) in zip(found, expected, strict=True):
        assert index == other and torch.equal(route.origins, own.origins)


@torch.no_grad()
@pytest.mark.slow
def test_usage_of_compiled_forwards_is_not_overwritten():
    model = make(BSRConfig(**REDUCED, tasks={"a": 2}, moe=MoEConfig(3, 1), init_weights=False)).eval()
    compiled, tables = torch.compile(model, fullgraph=True, backend=overwriting), []
    for run in (model, compiled):
        with record_usage(model) as usage:
            for images in BATCHES:
                run(images)
        tables.append(usage)
    assert tables[0].keys() == tables[1].keys() == {2}
    assert torch.equal(tables[0][2], tables[1][2])


def test_totals_of_a_schedule_are_not_overwritten():
    model = make(ALaSTConfig(trainable_blocks_per_step=2)).train()
    schedule = model.base_model.schedule()
    compiled, totals = torch.compile(model, backend=overwriting), []  # its blocks stay out of the graphs
    for run in (model, compiled):
        for images in BATCHES:  # accumulated: no optimizer steps between them
            with torch.no_grad():
                run(images)
        totals.append(schedule._total)
        schedule._total = None
    torch.testing.assert_close(totals[1], totals[0])


def test_a_back_end_that_overwrites_is_seen():
    keep = []
    compiled = torch.compile(lambda x: (x + 1, outliving(x + 1)), fullgraph=True, backend=overwriting)
    for start in (0.0, 1.0):
        keep.append(compiled(torch.full((2,), start)))
    assert keep[0][0][0] == 2 and keep[0][1][0] == 1
