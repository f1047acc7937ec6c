"""What the runner promises: identity at keep_rate 1.0, reduction equal to masking, the paper's block, true scores."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_bsr import BSRConfig, Reduction, probe_model, record_routes
from peft_bsr.core import BlockCall
from peft_bsr.engine import Plan, bound
from peft_bsr.errors import UnsupportedModelError
from peft_bsr.selftest import verify_plan

pytestmark = pytest.mark.sampled(2)

EVERY_BLOCK = {"trainable_blocks": [1, 3], "reduction_blocks": [0, 1, 2, 3]}


def outputs(model: nn.Module, images: torch.Tensor, **kwargs: object) -> list[torch.Tensor]:
    return [value for value in model(pixel_values=images, **kwargs).to_tuple() if isinstance(value, torch.Tensor)]


def reduced_model(make_model, family: str, **config: object) -> nn.Module:
    return get_peft_model(make_model(family), BSRConfig(mode="compact", **{**EVERY_BLOCK, **config})).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keep_rate_one_is_the_untouched_model_bit_for_bit(family, implementation, make_model, images):
    base = make_model(family, attn_implementation=implementation)
    expected = outputs(base, images)
    model = get_peft_model(base, BSRConfig(keep_rate=1.0)).eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, images), expected, strict=True))


@pytest.mark.parametrize("position", ["mid_block", "after_block"])
def test_the_composed_block_is_the_stock_block_bit_for_bit(family, position, make_model, images):
    """Here the blocks do run through our forward, with a reduction that happens to keep everything."""
    model = make_model(family)
    spec = probe_model(model)
    plan = Plan.static(4, [1], {i: Reduction(0.5, position=position) for i in range(4)})
    assert verify_plan(model, spec, plan) == plan


@pytest.mark.parametrize("reduce_at", ["mid_block", "after_block"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_reduction_equals_masking_the_dropped_keys_afterwards(family, implementation, reduce_at, make_model, images):
    base = make_model(family, attn_implementation=implementation)
    model = reduced_model(make_model, family, fuse_dropped=False, keep_rate=0.7, reduce_at=reduce_at)
    model.base_model.model.set_attn_implementation(implementation)
    spec = model.base_model.spec
    last = {}
    blocks = [base.get_submodule(name) for name in spec.blocks]
    stop = model.get_submodule(f"base_model.model.{spec.blocks[-1]}").register_forward_hook(
        lambda _m, _a, out: last.update(reduced=out)
    )
    with torch.no_grad(), record_routes(model) as routes:
        model(pixel_values=images)
    stop.remove()

    def mask_dropped(index: int):
        def hook(_block, args, kwargs):
            behind = [route for block, route in routes if block < index]
            if not behind:
                return None
            visible = torch.cat([torch.ones(2, spec.num_prefix, dtype=torch.bool), behind[-1].alive()], dim=1)
            mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
            return (args[0], mask[:, None, None].expand(-1, -1, visible.shape[1], -1)), {}

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(mask_dropped(index), with_kwargs=True)
    blocks[-1].register_forward_hook(lambda _m, _a, out: last.update(masked=out))
    with torch.no_grad():
        base(pixel_values=images)
    origins = routes[-1][1].origins
    assert origins.shape[1] < 16
    alive = torch.cat([torch.arange(spec.num_prefix).expand(2, -1), spec.num_prefix + origins], dim=1)
    expected = last["masked"].gather(1, alive[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(last["reduced"], expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("keep_rate", [0.3, 0.5, 0.7])
def test_the_block_equals_its_numpy_twin(fuse, keep_rate, make_model):
    path = Path(__file__).parents[1] / "reference" / "bsr_block.py"
    spec = importlib.util.spec_from_file_location("bsr_block", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)

    model = make_model("vit").double()
    for name, parameter in model.named_parameters():  # biases and norms start at constants that hide mistakes
        if "layers.1." in name:
            nn.init.normal_(parameter, std=0.3)
    weights = {name: tensor.numpy() for name, tensor in model.vit.layers[1].state_dict().items()}
    peft = get_peft_model(
        model,
        BSRConfig(trainable_blocks=[3], reduction_blocks=[1], keep_rate=keep_rate, fuse_dropped=fuse),
        autocast_adapter_dtype=False,
    ).eval()
    seen = {}
    block = model.vit.layers[1]
    block.register_forward_pre_hook(lambda _m, args: seen.update(entering=args[0]))
    block.register_forward_hook(lambda _m, _a, out: seen.update(leaving=out))
    peft(pixel_values=torch.randn(2, 3, 32, 32, dtype=torch.float64))
    for entering, leaving in zip(seen["entering"].detach().numpy(), seen["leaving"].detach().numpy(), strict=True):
        expected = reference.bsr_block(entering, weights, 4, model.config.layer_norm_eps, 1, keep_rate, fuse)
        assert leaving.shape == expected.shape
        np.testing.assert_allclose(leaving, expected, atol=1e-10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_being_scored_changes_nothing_for_the_attention(family, implementation, make_model):
    model = reduced_model(make_model, family)
    model.base_model.model.set_attn_implementation(implementation)
    spec = model.base_model.spec
    block = model.get_submodule(f"base_model.model.{spec.blocks[1]}")
    attention = block.get_submodule(spec.attention)
    tokens = torch.randn(2, spec.num_tokens, 32)
    expected = attention(tokens, attention_mask=None)
    block.token_router.context.now.running = run = BlockCall(block.token_router.start_route(tokens), score="class")
    found = attention(tokens, attention_mask=None)
    block.token_router.context.now.running = None
    assert torch.equal(found[0], expected[0])
    assert run.token_scores.shape == (2, spec.num_tokens)
    if implementation == "eager":
        torch.testing.assert_close(run.token_scores, expected[1][:, :, 0].mean(dim=1), atol=1e-6, rtol=1e-5)


def test_dropout_on_attention_does_not_touch_the_scores(make_model, images):
    model = reduced_model(make_model, "vit", keep_rate=0.5, reduction_blocks=[1])
    model.base_model.model.set_attn_implementation("eager")
    kept = []
    for training in (False, True):
        model.base_model.model.vit.layers[1].attention.attention_dropout = 0.5
        model.base_model.model.vit.layers[1].attention.train(training)
        with record_routes(model) as routes:
            model(pixel_values=images)
        kept.append(routes[0][1].origins)
    assert torch.equal(*kept)


def test_a_wrong_score_is_refused_at_attach(make_model, monkeypatch):
    from peft_bsr.selftest import reduction

    true_scores = reduction.token_scores
    monkeypatch.setattr(reduction, "token_scores", lambda *args: true_scores(*args).roll(1, -1))
    model = make_model("vit")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match="token scores of block 1 differ by"):
        get_peft_model(model, BSRConfig())
    assert [type(module) for module in model.modules()] == classes


def test_a_block_that_computes_something_else_is_refused(make_model, monkeypatch):
    model = make_model("vit")
    block_class = type(model.vit.layers[0])
    stock = block_class.forward
    monkeypatch.setattr(block_class, "forward", lambda *args, **kwargs: stock(*args, **kwargs) * 2)
    with pytest.raises(UnsupportedModelError, match="compute something other"):
        get_peft_model(model, BSRConfig())


def test_a_block_whose_forward_was_replaced_is_refused(make_model):
    model = make_model("vit")
    block = model.vit.layers[2]
    block.forward = block.forward
    with pytest.raises(UnsupportedModelError, match=r"replaced the `forward` of 'vit.layers.2'"):
        get_peft_model(model, BSRConfig())


def test_a_head_that_needs_the_grid_gets_the_full_view(make_model):
    model = make_model("vit_bare")
    norm = model.layernorm
    norm.register_forward_hook(lambda _m, _a, out: out + out.reshape(len(out), 17, 32))
    with pytest.raises(UnsupportedModelError, match=r"needs the whole grid.*Use `mode='full_view'`"):
        get_peft_model(model, BSRConfig(mode="compact"))
    assert get_peft_model(model, BSRConfig()).peft_config["default"].mode == "full_view"


def test_two_forwards_before_a_backward_keep_their_own_tokens(make_model, images):
    """Every route is carried by its call: a second forward must not change what the first one recomputes."""
    gradients = []
    for checkpointing in (False, True):
        model = reduced_model(make_model, "dinov2").train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable()
        first, second = (model(pixel_values=x).logits.square().sum() for x in (images, images.flip(0, 3) * 2))
        (first + second).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_the_whole_model_compiles_as_one_graph(make_model, images):
    model = reduced_model(make_model, "vit")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images).logits, model(images).logits)


def test_routes_are_recorded_in_grid_coordinates(make_model, images):
    model = reduced_model(make_model, "deit", reduction_blocks=[1, 2])
    with record_routes(model) as routes:
        model(pixel_values=images)
    assert [block for block, _ in routes] == [1, 2]
    first, second = (route for _, route in routes)
    assert first.alive().sum(dim=1).tolist() == [8, 8]
    assert (first.origins[:, -1] == 16).all(), "the fused token stands last and is no patch"
    assert (first.origins.diff() > 0).all(), "positions stay sorted"
    assert (first.alive() | ~second.alive()).all(), "what was dropped does not come back"


def test_recording_ends_with_its_block(make_model, images):
    model = reduced_model(make_model, "vit")
    with record_routes(model) as routes:
        model(pixel_values=images)
    seen = len(routes)
    model(pixel_values=images)
    assert len(routes) == seen == 4


def test_recording_without_an_adapter_says_so(make_model):
    with pytest.raises(ValueError, match="has no adapter of peft_bsr"), record_routes(make_model()):
        pass


def test_an_attention_mask_follows_the_route(make_model, images):
    """Masking a patch from the start equals masking it in the stock model, also after a reduction."""
    model = reduced_model(make_model, "vit", reduction_blocks=[1], keep_rate=0.9, fuse_dropped=False)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 5:9] = False
    with record_routes(model) as routes:
        masked = model(pixel_values=images, attention_mask=mask).logits
    assert not torch.allclose(masked, model(pixel_values=images).logits)
    kept = routes[0][1].alive()
    dropped_visible = (~kept & mask[:, 1:]).sum()
    if dropped_visible == 0:  # only masked patches were dropped: nothing that counts is gone
        expected = make_model("vit")(pixel_values=images, attention_mask=mask).logits
        torch.testing.assert_close(masked, expected, atol=1e-6, rtol=1e-5)
    assert (~kept & ~mask[:, 1:]).sum() == 2, "a masked patch has no score, so it goes first"


def test_nothing_is_left_over_from_a_forward(make_model, images):
    model = reduced_model(make_model, "vit")
    controller = model.base_model.model.vit.layers[0].token_router
    model(pixel_values=images)
    assert controller.context.now.route is None


def test_forward_reducing_names_no_family(make_model):
    import inspect

    source = inspect.getsource(bound).lower()
    assert not any(family in source for family in ("dino", "clip", "deit"))
