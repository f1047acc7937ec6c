"""Inputs of users: other image sizes, one image, half precision, another attention implementation, padding masks."""

from __future__ import annotations

import re

import pytest
import torch
from checks import assert_same, attach, check_masking, outputs
from families import SUPPORTED, VIT, run_batch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from peft_bsr import ConfigError, UnsupportedModelError, record_routes, set_image_size
from peft_bsr.backbones import native_size, resized_tables

pytestmark = pytest.mark.sampled(2)

INTERPOLATED = {"interpolate_pos_encoding": True}
SIZES = {  # family -> (height, width), further arguments
    "vit": ((48, 32), INTERPOLATED),
    "deit": ((48, 32), INTERPOLATED),
    "vit_msn": ((48, 32), INTERPOLATED),
    "ijepa": ((32, 48), INTERPOLATED),
    "clip_bare": ((48, 32), INTERPOLATED),
    "siglip": ((32, 48), INTERPOLATED),
    "dinov2": ((48, 64), {}),
    "dinov2_registers": ((32, 64), {}),
    "dinov3": ((48, 32), {}),
    "beit": ((48, 48), INTERPOLATED),
    "data2vec": ((48, 48), INTERPOLATED),
    "blip": ((48, 32), INTERPOLATED),
    "mlcd": ((48, 32), {}),
}


def images(height: int, width: int, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["compact", "full_view"])
@pytest.mark.parametrize("family", SIZES)
def test_other_image_sizes(family, mode):
    """The adapter was attached at 32 x 32; the number of kept tokens is a rate of the tokens of the input."""
    size, arguments = SIZES[family]
    batch = {"pixel_values": images(*size), **arguments}
    check_masking(family, mode, batch)
    stock = SUPPORTED[family]()
    assert_same(outputs(attach(family, mode, keep_rate=1.0), batch), outputs(stock, batch))


RESIZED = ["vit", "vit_bare", "vit_mim", "deit", "deit_teacher", "deit_mim", "vit_msn", "vit_mae", "ijepa", "clip"]
RESIZED += ["clip_bare", "clip_projection", "metaclip2", "owlvit", "owlv2", "chinese_clip", "siglip", "siglip_pooling"]
RESIZED += ["blip"]
ANY_SIZE = ["dinov2", "dinov2_registers", "dinov3", "beit", "beit_no_bias", "data2vec", "pixio", "internvl", "yolos"]


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("family", RESIZED)
def test_a_resized_model_is_the_stock_one_that_interpolates(family, side):
    stock, resized = SUPPORTED[family](), SUPPORTED[family]()
    stock.config = resized.config  # like models created from the same configuration
    set_image_size(resized, side)
    assert native_size(stock.config) == (32, 32)
    assert native_size(resized.config) == (side, side)
    assert sum(name in resized_tables(resized) for name, _ in resized.named_parameters()) == 1
    batch = {"pixel_values": images(side, side)}
    assert_same(outputs(resized, batch), outputs(stock, batch | INTERPOLATED))
    again = type(resized)(resized.config).eval()  # the configuration has the new size
    again.load_state_dict(resized.state_dict())
    assert_same(outputs(again, batch), outputs(resized, batch))


@pytest.mark.parametrize("family", ANY_SIZE)
def test_a_model_of_any_size_keeps_its_weights(family):
    stock, model = SUPPORTED[family](), SUPPORTED[family]()
    set_image_size(model, 64)
    assert not resized_tables(model)
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), model.parameters(), strict=True))
    assert_same(outputs(model, {"pixel_values": images(64, 64)}), outputs(stock, {"pixel_values": images(64, 64)}))


@pytest.mark.parametrize(
    ("family", "size", "error", "message"),
    [
        ("vit", 36, ConfigError, "patches of 8 px, so each side must be a multiple of 8. Use 32 or 40."),
        ("vit", 4, ConfigError, "Use 8."),
        ("clip", (48, 64), UnsupportedModelError, "takes images of 32 x 32 px only, not of 48 x 64: TypeError"),
        ("aimv2", 64, UnsupportedModelError, "nothing interpolates its `embeddings.position_embedding.weight`"),
        ("videomae", 32, UnsupportedModelError, "its forward refuses them"),
        ("vivit", 32, UnsupportedModelError, "`vivit.embeddings.interpolate_pos_encoding` failed with"),
    ],
)
def test_a_size_that_a_model_does_not_take_changes_nothing(family, size, error, message):
    model = SUPPORTED[family]()
    before = [p.clone() for p in model.parameters()]
    config = model.config.to_dict()
    with pytest.raises(error, match=re.escape(message)):
        set_image_size(model, size)
    assert model.config.to_dict() == config
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_images_that_are_not_square():
    stock, resized = SUPPORTED["vit"](), SUPPORTED["vit"]()
    set_image_size(resized, (48, 64))
    batch = {"pixel_values": images(48, 64)}
    assert_same(outputs(resized, batch), outputs(stock, batch | INTERPOLATED))


def test_a_size_of_its_own_that_patches_do_not_fill_is_kept():
    config = SiglipVisionConfig(**VIT | {"image_size": 33})  # like google/siglip-so400m-patch14-384
    model = SiglipVisionModel(config)
    set_image_size(model, 33)
    assert model.config.image_size == 33


def test_the_size_is_set_before_the_adapter():
    with pytest.raises(ConfigError, match="already has an adapter"):
        set_image_size(attach("vit", None), 64)


def test_sizes_may_change_from_batch_to_batch():
    model = attach("dinov3", "compact", reduction_blocks=[1], fuse_dropped=False)
    for height, width in ((32, 32), (48, 32), (64, 64), (32, 32)):
        with record_routes(model) as routes:
            model(images(height, width))
        assert routes[0][1].num_tokens == 3 + height * width // 64 // 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", SUPPORTED)
def test_one_image_gives_what_it_gives_in_a_batch(family):
    if family == "vit_mae":
        pytest.skip("a masked autoencoder draws its masks for the batch")
    model = attach(family, None)
    batch = run_batch(model.base_model.model)
    whole = outputs(model, batch)
    single = outputs(model, {name: value[:1] for name, value in batch.items()})
    assert len(single) == len(whole) or family == "smolvlm", "it lists the features of each image"
    for one, several in zip(single, whole, strict=False):
        # similarities of dual encoders are to fewer texts
        own = tuple(map(slice, one.shape)) if family.endswith("_dual") else slice(len(one))
        torch.testing.assert_close(one, several[own], atol=2e-5, rtol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family", ["vit", "dinov2", "dinov3", "beit", "data2vec", "siglip", "siglip2", "vjepa2", "mlcd"]
)
def test_half_precision(family, dtype):
    """Attach, forward and backward in half precision; keep_rate 1.0 equals the base model bit for bit."""
    from peft import get_peft_model

    from peft_bsr import BSRConfig

    base = SUPPORTED[family]().to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in run_batch(base).items()}
    expected = outputs(base, batch)
    model = get_peft_model(base, BSRConfig(keep_rate=1.0), autocast_adapter_dtype=False).eval()
    assert_same(outputs(model, batch), expected)
    config = BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[0, 1, 2])
    model = get_peft_model(SUPPORTED[family]().to(dtype), config).train()
    first = next(t for t in _tensors(model(**batch)) if t.requires_grad)
    first.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit", "siglip", "siglip2", "clip", "videomae", "vjepa2", "mlcd"])
def test_the_attention_implementation_may_be_switched_afterwards(family):
    model = attach(family, None, keep_rate=0.7)
    base = model.base_model.model
    batch = run_batch(base)
    found = []
    for implementation in ("sdpa", "eager", "sdpa"):
        base.set_attn_implementation(implementation)
        assert base.config._attn_implementation == implementation
        with record_routes(model) as routes:
            found.append((outputs(model, batch), [route.origins for _, route in routes]))
    assert_same(found[0][0], found[2][0])
    for (values, origins), (expected, expected_origins) in zip(found[1:], found[:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(origins, expected_origins, strict=True))
        for a, b in zip(values, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_of_siglip2_is_never_kept_before_a_real_patch(implementation):
    model = attach("siglip2", None, reduction_blocks=[1], keep_rate=0.75)
    model.base_model.model.set_attn_implementation(implementation)
    with record_routes(model) as routes:
        model(**run_batch(model.base_model.model))
    assert routes[0][1].alive()[1].nonzero().flatten().tolist() == list(range(12))


def test_hidden_states_keep_their_length_in_full_view():
    model = attach("vit", "full_view")
    states = model(**run_batch(model.base_model.model), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 17, 32)] * 5


def test_dropped_tokens_keep_the_value_they_had_in_full_view():
    model = attach("vit_bare", "full_view", reduction_blocks=[1])
    blocks = model.base_model.model.layers
    seen: dict[int, torch.Tensor] = {}
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda _m, _a, out, index=index: seen.update({index: out}))
    with record_routes(model) as routes, torch.no_grad():
        model(**run_batch(model.base_model.model))
    is_dropped = ~routes[0][1].alive()
    for later in (2, 3):
        assert torch.equal(seen[later][:, 1:][is_dropped], seen[1][:, 1:][is_dropped])
        assert not torch.equal(seen[later][:, 1:][~is_dropped], seen[1][:, 1:][~is_dropped])


def _tensors(output: object) -> list[torch.Tensor]:
    from peft_bsr.backbones import tensors_of

    return tensors_of(output)


def test_a_grid_head_sees_the_grid_in_its_order():
    """DPT's feature maps have the dropped patches at their own places, not their neighbours.

    The reduction keeps nine tokens, which this head would take for a 3 x 3 image.
    """
    model = attach("dpt", None, reduction_blocks=[3])
    assert model.peft_config["default"].mode == "full_view"
    base = SUPPORTED["dpt"]()
    batch = run_batch(base)
    seen: list[torch.Tensor] = []
    for owner in (base, model.base_model.model):
        neck: nn.Module = owner.neck
        neck.register_forward_pre_hook(lambda _m, args: seen.append(args[0][-1]))
        outputs(owner, batch)
    stock, reduced = seen
    with record_routes(model) as routes:
        outputs(model, batch)
    alive = routes[0][1].alive()
    torch.testing.assert_close(reduced[:, 1:][alive], stock[:, 1:][alive], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(reduced[:, 1:][~alive], stock[:, 1:][~alive], atol=1e-3), "dropped patches skip the MLP"
