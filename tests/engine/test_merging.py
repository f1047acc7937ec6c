"""Models that merge tokens: the contract of those that drop them, without scores, and with every patch at the end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, SynQTConfig, UnsupportedModelError, record_routes
from peft_bsr.backbones import probe_model, tensors_of
from peft_bsr.engine import Plan, Reduction
from peft_bsr.selftest import verify_plan
from peft_bsr.tuners.base.description import describe_reductions

sys.path.insert(0, str(Path(__file__).parent))

from pairs import SUPPORTED, assert_alike, base_of, batch_of, make, step

pytestmark = pytest.mark.sampled(2)

MERGE = {"reduction": "merge", "reduction_blocks": [0, 2], "keep_rate": 0.5}
SOME = ("vit", "dinov3", "beit", "siglip2", "yolos", "vjepa2", "dpt")  # one of each kind of side input, head and score
FAMILIES = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in SUPPORTED]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_merges_and_lean_blocks_give_the_same_gradients(family):
    models = {lean: make(family, lean, **MERGE) for lean in ("off", "exact", "max")}
    expected = step(models["off"])
    for lean in ("exact", "max"):
        with record_routes(models[lean]) as routes:
            assert_alike(step(models[lean]), expected, about=lean)
    plan, spec = models["max"].base_model.plan(), models["max"].base_model.spec
    assert plan.merges and not models["max"].peft_config["default"].fuse_dropped
    counts = [
        mlp
        for block, (_, mlp) in zip(plan.blocks, plan.token_counts(spec.num_tokens, spec.num_special), strict=True)
        if block.reduction
    ]
    assert [route.num_tokens for _, route in routes] == counts
    merged = routes[-1][1]
    assert [sorted(set(row.tolist())) for row in merged.merged] == merged.origins.tolist()


@pytest.mark.parametrize(("family", "mode"), [("vit", "compact"), ("vit_bare", "full_view")])
def test_keeping_all_is_the_base_model_bit_for_bit(family, mode):
    for rate in (1.0, 0.999):
        base = SUPPORTED[family]().eval()
        torch.manual_seed(0)
        batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
        with torch.no_grad():
            expected = tensors_of(base(**batch))
            model = get_peft_model(base, BSRConfig(reduction="merge", keep_rate=rate, mode=mode)).eval()
            assert all(torch.equal(a, b) for a, b in zip(tensors_of(model(**batch)), expected, strict=True))


def test_in_full_view_each_patch_leaves_with_the_value_of_its_token():
    model = make("vit_bare", "off", **MERGE, mode="full_view").eval()
    last = base_of(model).get_submodule(model.base_model.spec.blocks[-1])
    seen = []
    last.register_forward_hook(lambda _m, _a, output: seen.append(tensors_of(output)[0]))
    with record_routes(model) as routes, torch.no_grad():
        model(**batch_of(model))
    merged = routes[-1][1].merged
    patches = seen[0][:, 1:]
    assert torch.equal(patches, patches.gather(1, merged[..., None].expand_as(patches)))
    assert patches.shape[1] == routes[-1][1].num_patches
    assert len({tuple(patch.tolist()) for patch in patches[0]}) == routes[-1][1].origins.shape[1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    expected = step(make("vit", "exact", **MERGE))
    model = make("vit", "exact", **MERGE)
    base_of(model).gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_alike(step(model), expected)


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_models_merge_alike_in_one_graph(trains):
    models = [make("vit", "exact", **MERGE).train(trains) for _ in range(2)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(models[1], fullgraph=True, backend=backend)
    batch = batch_of(models[0])
    for _ in range(2):
        with torch.set_grad_enabled(trains):
            torch.testing.assert_close(compiled(**batch).logits, models[0](**batch).logits)
        batch = {name: torch.randn_like(value) if value.is_floating_point() else value for name, value in batch.items()}
    assert len(graphs) == 1, "which tokens merge is no part of the graph"
    if trains:
        found, expected = (step(model) for model in (compiled, models[0]))
        assert_alike({name.replace("_orig_mod.", ""): value for name, value in found.items()}, expected)


def test_models_without_scores_are_served():
    model = SUPPORTED["vit"]().eval()
    spec = replace(probe_model(model), scores_from=None)
    dropping = Plan.static(4, [3], {1: Reduction(0.5)})
    with pytest.raises(UnsupportedModelError, match=r"Use `reduction='merge'`"):
        verify_plan(model, spec, dropping)
    merging = Plan.static(4, [3], {1: Reduction(0.5, fuse=False, score=None)})
    assert verify_plan(model, spec, merging) == merging


def test_an_adapter_is_saved_and_one_from_before_drops(tmp_path):
    model = make("vit", "exact", **MERGE).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    loaded = PeftModel.from_pretrained(SUPPORTED["vit"]().double(), tmp_path, is_trainable=True).eval()
    batch = batch_of(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    config = loaded.peft_config["default"]
    assert (config.reduction, config.score, config.fuse_dropped) == ("merge", None, False)
    assert BSRConfig.from_peft_type(peft_type="BSR", keep_rate=0.7).reduction == "drop"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "mix"}, r"`reduction='mix'` is unknown. Use one of 'drop', 'merge'"),
        ({"reduction": "merge", "fuse_dropped": True}, r"`fuse_dropped=True` applies to dropped tokens"),
        ({"reduction": "merge", "score": "class"}, r"`score='class'` applies to dropped tokens"),
    ],
)
@pytest.mark.parametrize("config", [BSRConfig, SynQTConfig])
def test_what_has_no_meaning_is_refused(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_alast_has_no_such_field():
    with pytest.raises(TypeError, match="reduction"):
        ALaSTConfig(reduction="merge")


def test_synqt_reads_merged_tokens():
    settings = {"keep_rate": 0.5, "reduction": "merge", "reduction_blocks": [1], "mode": "compact"}
    model = get_peft_model(SUPPORTED["vit"](), SynQTConfig(num_queries=2, **settings)).train()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.arange(2)}
    with record_routes(model) as routes:
        model(**batch).loss.backward()
    assert routes[0][1].merged is not None and model.base_model.plan().merges


def test_it_is_said_in_words():
    model = make("vit", "exact", **MERGE)
    words = describe_reductions(model.base_model.spec, model.base_model.plan())
    assert words[0].startswith(
        "At blocks 0 and 2, the most similar patches are averaged until 50% of the tokens are left"
    )
    assert "similar tokens merged" in model.base_model.plan().describe(17, 1)
    assert "merges tokens down to 0.5" in model.base_model.explain()
