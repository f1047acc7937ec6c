"""Adapters on the vision model inside a larger one, alone and beside a LoRA on the language model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OwlViTConfig,
    OwlViTForObjectDetection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SamConfig,
    SamModel,
    ViTConfig,
    ViTModel,
)

import peft_bsr
from peft_bsr import (
    AdapterError,
    ALaSTConfig,
    BSRConfig,
    ConfigError,
    ExportError,
    LoSAConfig,
    UnsupportedModelError,
    probe_model,
)
from peft_bsr.backbones import tensors_of
from peft_bsr.cost import estimate, saved_activations
from peft_bsr.engine import saved_by_module
from peft_bsr.errors import FeatureCacheError, TrainabilityError
from peft_bsr.training import FeatureCache, param_groups, verify_trainability
from peft_bsr.viz import saved_by_block

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")

VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
VIT |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT |= {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER = "model.vision_tower"
TRAINED = {"trainable_blocks": [1, 2], "init_weights": False}


def make_llava(**settings: Any) -> LlavaForConditionalGeneration:
    """A tiny LLaVA whose language model reads the patches after block 2 of 4, as real ones do."""
    torch.manual_seed(0)
    vision, text = CLIPVisionConfig(**VIT), LlamaConfig(**TEXT)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=59, **settings)
    return LlavaForConditionalGeneration(config).eval()


def make_clip() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(vision_config=VIT, text_config=TEXT)).eval()


def lora(model: nn.Module, **settings: Any) -> PeftModel:
    """A LoRA on the language model, with weights that change its output."""
    targets = r".*language_model.*\.(q_proj|v_proj)"
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, **settings)).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 59, (2, 24), generator=generator)
    words[:, 1:17] = 59
    return {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "labels": words,
    }


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(**batch))


def is_same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def test_the_part_is_found_and_written_down(batch, tmp_path):
    model = get_peft_model(make_llava(), BSRConfig())
    assert model.base_model.part == model.peft_config["default"].part == TOWER
    assert model.base_model.explain().startswith(f"part: {TOWER}\n")
    assert probe_model(make_llava()).part == TOWER
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["part"] == TOWER
    assert f"Blocks are those of `{TOWER}`" in (tmp_path / "README.md").read_text()
    assert all(f".{TOWER}." in name for name, p in model.named_parameters() if p.requires_grad)


def test_blocks_are_counted_up_to_the_last_that_the_language_model_reads(batch):
    model = get_peft_model(make_llava(), BSRConfig(keep_rate=1.0)).train()
    assert model.base_model.spec.last_read == 2
    assert model.base_model.plan().trained_blocks == [2]
    verify_trainability(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), batch)
    assert "runs stock" not in model.base_model.explain(), "hidden states are captured, and no attention weights"
    with pytest.raises(ConfigError, match=r"`part='model\.vision_tower'` of .*block 3 would train without effect"):
        get_peft_model(make_llava(), BSRConfig(trainable_blocks=[3]))


def test_settings_of_the_larger_model_do_not_count():
    model = make_llava()
    for outer in (
        "image_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "num_channels",
    ):
        setattr(model.config, outer, 999)
    spec = probe_model(model)
    assert (spec.depth, spec.width, spec.num_heads, spec.image_shape) == (4, 32, 4, (3, 32, 32))


def test_what_the_larger_model_reads_decides_the_mode():
    assert get_peft_model(make_clip(), BSRConfig()).peft_config["default"].mode == "compact"
    assert get_peft_model(make_llava(), BSRConfig()).peft_config["default"].mode == "full_view"
    with pytest.raises(UnsupportedModelError, match=r"in mode 'compact', .*\(16, 32\) to .*Use `mode='full_view'`"):
        get_peft_model(make_llava(), BSRConfig(mode="compact"))
    # a detector reads the patches, although the dual encoder inside it has image features of the class token
    config = OwlViTConfig(vision_config=VIT, text_config=TEXT, projection_dim=32)
    detector = get_peft_model(OwlViTForObjectDetection(config), BSRConfig())
    assert detector.base_model.part == "owlvit.vision_model"
    assert detector.peft_config["default"].mode == "full_view"


def test_losa_leaves_a_dual_encoder_all_the_tokens_that_it_returns():
    """In training, too: a model with the head inside passes on what its head reads."""
    model = get_peft_model(make_clip(), LoSAConfig()).train()
    output = model(input_ids=torch.arange(12).view(2, 6), pixel_values=torch.randn(2, 3, 32, 32))
    assert output.vision_model_output.last_hidden_state.shape == (2, 17, 32)


def test_tokens_that_a_dual_encoder_returns_have_their_gradients():
    """Its image features read the class token alone, but its output holds the patches, too."""
    found = []
    for lean in ("off", "exact"):
        torch.manual_seed(3)
        config = BSRConfig(trainable_blocks=[3], keep_rate=1.0, lean=lean)
        model = get_peft_model(make_clip(), config).train()
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        output = model(input_ids=torch.arange(12).view(2, 6), pixel_values=images)
        output.vision_model_output.last_hidden_state.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    largest = max(float(stock.abs().max()) for stock in found[0])
    for stock, lean in zip(*found, strict=True):
        torch.testing.assert_close(lean, stock, rtol=1e-5, atol=1e-6 * largest)


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = ViTModel(ViTConfig(**VIT)), ViTModel(ViTConfig(**VIT))
        self.head = nn.Linear(64, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        pairs = ((self.left, left), (self.right, right))
        return self.head(torch.cat([model(images).last_hidden_state[:, 0] for model, images in pairs], dim=1))


def test_of_several_vision_models_one_has_to_be_named():
    model = _Pair().eval()
    with pytest.raises(ConfigError, match=r"2 vision models: `left`, `right`\. Name the one .* `part='left'`"):
        get_peft_model(model, BSRConfig())
    images = torch.randn(2, 3, 32, 32)
    adapted = get_peft_model(model, BSRConfig(part="right", modules_to_save=["head"]))
    adapted(images, images).sum().backward()
    trained = {
        n.removeprefix("base_model.model.").split(".")[0] for n, p in adapted.named_parameters() if p.requires_grad
    }
    assert trained == {"right", "head"}
    with pytest.raises(AdapterError, match="on another part than `left`"):
        get_peft_model(adapted.base_model.model, BSRConfig(part="left"))


def test_a_model_that_an_image_alone_does_not_run_names_the_vision_model_inside():
    model = SamModel(
        SamConfig(
            vision_config={
                **VIT,
                "output_channels": 16,
                "window_size": 2,
                "global_attn_indexes": [1, 3],
                "mlp_dim": 64,
            },
            prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        )
    )
    with pytest.raises(UnsupportedModelError, match=r"name it: `part='vision_encoder'`"):
        get_peft_model(model, BSRConfig(keep_rate=1.0))
    adapted = get_peft_model(model, BSRConfig(keep_rate=1.0, part="vision_encoder"))
    assert adapted.base_model.plan().trained_blocks == [3]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "model.vision_towr",
            r"no module of that name\. Near names: `model\.vision_tower`.*vision models: `model\.vis",
        ),
        ("vision_tower", r"Near names: `model\.vision_tower`"),
        ("model.multi_modal_projector", "is not supported: it has no list of equal blocks"),
        ("model.language_model", "LlamaModel is not supported"),
        ("", "must be a module's name"),
        (3, "must be a module's name"),
    ],
)
def test_a_wrong_part_is_one_error_before_anything_changes(part, message):
    model = make_llava()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        get_peft_model(model, BSRConfig(part=part))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("names", [("default", "vision"), ("default", "default")], ids=["two names", "one name"])
def test_beside_a_lora_together_and_apart(batch, tmp_path, names):
    with_lora = lora(make_llava())
    expected_lora = outputs(with_lora, batch)
    model = get_peft_model(with_lora, BSRConfig(**TRAINED), adapter_name=names[1]).eval()
    expected = outputs(model, batch)
    assert not is_same(expected, expected_lora) and is_same(outputs(with_lora, batch), expected)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[3] for n in trained} == {"language_model", "vision_tower"}
    model.train()(**batch).loss.backward()
    assert not [name for name, p in trained.items() if p.grad is None]
    model.eval()

    place = tmp_path / "vision" / ("" if names[1] == "default" else names[1])
    with_lora.save_pretrained(tmp_path / "language")
    model.save_pretrained(tmp_path / "vision")
    for folder, own, other in ((place, "bsr_params", "lora_"), (tmp_path / "language", "lora_", "bsr_params")):
        keys = load_file(folder / "adapter_model.safetensors").keys()
        assert keys and all(own in key and other not in key for key in keys)
    alone = PeftModel.from_pretrained(make_llava(), tmp_path / "language", is_trainable=True).eval()
    assert is_same(outputs(alone, batch), expected_lora)
    both = PeftModel.from_pretrained(alone, place, names[1], is_trainable=True).eval()
    assert is_same(outputs(both, batch), expected)
    vision = PeftModel.from_pretrained(make_llava(), place, is_trainable=True).eval()
    apart = get_peft_model(make_llava(), BSRConfig(**TRAINED)).eval()
    apart.load_adapter(place, "again", is_trainable=True)
    apart.set_adapter("again")
    assert is_same(outputs(vision, batch), outputs(apart, batch))

    base = outputs(make_llava().requires_grad_(False), batch)
    with model.disable_adapter():  # its own alone
        assert is_same(outputs(model, batch), expected_lora)
    with with_lora.disable_adapter():  # PEFT's switch turns off every adapter in the model
        assert is_same(outputs(model, batch), base)
    assert is_same(outputs(model, batch), expected)
    model.unload()
    assert is_same(outputs(with_lora, batch), expected_lora)
    assert is_same(outputs(with_lora.unload().requires_grad_(False), batch), base)


def test_beside_a_lora_only_its_own_adapters_are_switched_merged_and_deleted(batch):
    with_lora = lora(make_llava(), modules_to_save=["lm_head"])
    settings = {**TRAINED, "keep_rate": 1.0}
    model = get_peft_model(with_lora, BSRConfig(**settings), adapter_name="first").eval()
    model.add_adapter("second", BSRConfig(**settings))
    first = outputs(model, batch)
    model.set_adapter("second")
    assert {name for name, p in model.named_parameters() if p.requires_grad and ("lora_" in name or "lm_head" in name)}
    model.delete_adapter("second")
    assert list(with_lora.peft_config) == ["default"] and list(model.peft_config) == ["first"]
    assert is_same(outputs(model, batch), first)
    model.merge_adapter()
    assert all(layer.merged_adapters in ([], ["first"]) for layer in with_lora.get_layer_status())
    model.unmerge_adapter()
    for found, expected in zip(outputs(model, batch), first, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_names_of_modules_may_be_given_in_full(batch):
    config = BSRConfig(trainable_blocks=[2], exclude_modules=[f"{TOWER}.encoder.layers.2.mlp.fc1"])
    trained = {name for name, p in get_peft_model(make_llava(), config).named_parameters() if p.requires_grad}
    assert any("fc2" in name for name in trained) and not any("fc1" in name for name in trained)
    config = BSRConfig(trainable_blocks=[2], modules_to_save=[f"{TOWER}.embeddings"])
    with pytest.raises(ConfigError, match="which no gradient reaches"):
        get_peft_model(make_llava(), config)


def test_other_adapters_where_this_one_goes_are_refused():
    on_tower = get_peft_model(make_llava(), LoraConfig(target_modules=r".*(q_proj|v_proj)"))
    with pytest.raises(AdapterError, match=r"`model\.vision_tower\..*` has an adapter of another method"):
        get_peft_model(on_tower, BSRConfig())
    with pytest.raises(AdapterError, match="named 'default' as well"):
        get_peft_model(lora(make_llava(), modules_to_save=["lm_head"]), BSRConfig())
    with pytest.raises(AdapterError, match="already has adapters"):
        get_peft_model(get_peft_model(make_llava(), BSRConfig()), BSRConfig())


def test_nothing_is_kept_before_the_first_trained_block(batch):
    """Also if a hook puts the embeddings into the graph, as training with checkpointing does."""

    def kept(model: nn.Module) -> int:
        return saved_activations(model.train(), lambda: model(**batch).loss)

    frozen = lora(make_llava())
    alone = kept(frozen)
    assert sum(saved_by_tower(frozen, batch).values()) == 0
    frozen.enable_input_require_grads()
    in_graph = kept(frozen)
    adapted = get_peft_model(lora(make_llava()), BSRConfig(trainable_blocks=[2], keep_rate=1.0), adapter_name="vision")
    adapted.enable_input_require_grads()
    assert alone < kept(adapted) < (alone + in_graph) / 2 + 1
    sizes = saved_by_tower(adapted, batch)
    assert not [name for name in sizes if ".layers.0" in name or ".layers.1" in name]
    assert [name for name in sizes if ".layers.2" in name]


def saved_by_tower(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, int]:
    found = saved_by_module(model.train(), lambda: model(**batch).loss)
    return {name: size for name, size in found.items() if "vision_tower" in name and size}


@pytest.mark.parametrize("config", [ALaSTConfig(), LoSAConfig()], ids=lambda config: type(config).__name__)
def test_other_methods(batch, tmp_path, config):
    model = get_peft_model(make_llava(vision_feature_layer=-1), config)
    model.train()(**batch).loss.backward()
    assert [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    expected = outputs(model.eval(), batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llava(vision_feature_layer=-1), tmp_path, is_trainable=True).eval()
    assert is_same(outputs(again, batch), expected)


def test_packed_patches_train_without_token_reduction():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1, 3], "window_size": 32}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, image_token_id=59)
    with pytest.raises(UnsupportedModelError, match=r"`part='model\.visual'` .*Use `keep_rate=1.0`"):
        get_peft_model(Qwen2_5_VLForConditionalGeneration(config), BSRConfig())
    model = get_peft_model(Qwen2_5_VLForConditionalGeneration(config), BSRConfig(keep_rate=1.0))
    assert model.base_model.plan().blocks[3].lean.mlp


def test_loaded_with_its_larger_model(batch, tmp_path):
    make_llava().save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, BSRConfig(**TRAINED)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_bsr.load(tmp_path / "adapter", is_trainable=True).eval()
    assert type(loaded.get_base_model()) is LlavaForConditionalGeneration
    assert is_same(outputs(loaded, batch), outputs(model, batch))


def test_what_needs_images_alone_says_so(batch, tmp_path):
    model = get_peft_model(make_llava(), BSRConfig(trainable_blocks=[2]))
    with pytest.raises(TrainabilityError, match="Give a batch"):
        verify_trainability(model)
    with pytest.raises(FeatureCacheError, match=f"is on `{TOWER}`"):
        FeatureCache.build(model, [batch], tmp_path)
    with pytest.raises(ExportError, match=f"is on `{TOWER}`"):
        peft_bsr.export(model, "onnx", tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match=f"a part .`{TOWER}`.*not predicted"):
        estimate(make_llava(), BSRConfig())


def test_parts_of_pictures_and_groups_are_those_of_the_tower(batch):
    """Blocks of the text model have the same names inside it, and are not taken for the tower's."""
    config = BSRConfig(trainable_blocks=[2], modules_to_save=["visual_projection", "text_model.encoder.layers.1"])
    clip = get_peft_model(make_clip(), config)
    groups = param_groups(clip, learning_rate=1.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in clip.named_parameters() if id(p) in rates}
    assert {rate for name, rate in names.items() if "vision_model.encoder.layers.2" in name} == {0.25}
    assert {rate for name, rate in names.items() if "text_model" in name or "projection" in name} == {1.0}
    sizes = saved_by_block(get_peft_model(make_llava(), BSRConfig(trainable_blocks=[2])).train(), batch)
    assert sizes["1"] == 0 < sizes["2"]


def test_generation_and_features_run_through_the_part(batch):
    model = get_peft_model(make_llava(), BSRConfig(**TRAINED)).eval()
    words = model.generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=3, do_sample=False)
    assert words.shape == (2, 27)
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    with model.disable_adapter():
        stock = model.get_image_features(batch["pixel_values"]).pooler_output
    assert features[0].shape == stock[0].shape == (16, 32) and not torch.equal(features[0], stock[0])


def test_transformers_own_methods(batch):
    model = make_llava()
    base = outputs(model.requires_grad_(False), batch)
    model.add_adapter(BSRConfig(**TRAINED), "vision")
    changed = outputs(model, batch)
    model.disable_adapters()
    assert is_same(outputs(model, batch), base) and not is_same(changed, base)
    model.enable_adapters()
    assert is_same(outputs(model, batch), changed)
