"""Wrong models, wrong calls: one clear error of our own, and the model bit for bit as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from peft_bsr import (
    AdapterError,
    ALaSTConfig,
    BSRConfig,
    ConfigError,
    FeatureCache,
    FeatureCacheError,
    ForwardError,
    InputError,
    SynQTConfig,
    TrainabilityError,
    UnsupportedModelError,
    add_task,
    export_task,
    record_routes,
    record_usage,
    verify_trainability,
)
from peft_bsr.training import ALaSTCallback, TaskBatchSampler, TaskDataset
from tests.bad_input.conftest import make_adapter, make_vit
from tests.tuners.conftest import assert_same_state, state_of

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def broken_vit() -> nn.Module:
    model = make_vit()
    model.vit.layers[1].mlp.fc1.weight.data[0, 0] = float("nan")
    return model


def meta_vit() -> nn.Module:
    with torch.device("meta"):
        return make_vit()


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(**sizes, vocab_size=50))


def swin() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    return SwinForImageClassification(SwinConfig(**sizes, window_size=4))


def resnet() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))


MODELS: list[tuple[Callable[[], nn.Module], Any, type[Exception], str]] = [
    (
        lambda: nn.Linear(3, 3),
        BSRConfig(),
        UnsupportedModelError,
        "Linear is not supported: it has no list of equal blocks with query, key and value projections. Use PEFT's "
        "LoRA for it; docs/compatibility.md lists the models that are supported.",
    ),
    (
        nn.Module,
        BSRConfig(),
        UnsupportedModelError,
        "Module is not supported: it has no list of equal blocks with query, key and value projections. Use PEFT's "
        "LoRA for it; docs/compatibility.md lists the models that are supported.",
    ),
    (
        bert,
        BSRConfig(),
        UnsupportedModelError,
        "BertModel is not supported: it takes text, not images. Use PEFT's LoRA for it; docs/compatibility.md lists "
        "the models that are supported.",
    ),
    (
        bert,
        ALaSTConfig(),
        UnsupportedModelError,
        "BertModel is not supported: it takes text, not images. Use PEFT's LoRA for it; docs/compatibility.md lists "
        "the models that are supported.",
    ),
    (
        swin,
        BSRConfig(gradient_tokens=0.5),
        UnsupportedModelError,
        "SwinForImageClassification has no token reduction: block 0 maps (1, 64, 16) to (1, 16, 32), so not all "
        "blocks have the same tokens. It is needed for `keep_rate=0.5` and `gradient_tokens=0.5`. Use "
        "`keep_rate=1.0`, `gradient_tokens=1.0`: the blocks that you choose then train, whole or low-rank, the "
        "gradient is cut before them, and halves run lean.",
    ),
    (
        swin,
        SynQTConfig(),
        UnsupportedModelError,
        "SwinForImageClassification is not supported: block 0 maps (1, 64, 16) to (1, 16, 32), so not "
        "all blocks have the same tokens. Use PEFT's LoRA for it; docs/compatibility.md lists the models that are "
        "supported.",
    ),
    (
        resnet,
        ALaSTConfig(),
        UnsupportedModelError,
        "ResNetForImageClassification is not supported: it has no list of equal blocks with query, key and value "
        "projections. Use PEFT's LoRA for it; docs/compatibility.md lists the models that are supported.",
    ),
    (
        meta_vit,
        BSRConfig(),
        UnsupportedModelError,
        "ViTForImageClassification is not supported: its weights are on the meta device. Load them first: "
        "the probe runs the model once.",
    ),
    (
        meta_vit,
        SynQTConfig(),
        UnsupportedModelError,
        "ViTForImageClassification is not supported: its weights are on the meta device. Load them first: "
        "the probe runs the model once.",
    ),
    (
        broken_vit,
        BSRConfig(),
        UnsupportedModelError,
        "ViTForImageClassification is not supported: its output for a random image is NaN or infinite. "
        "Check its weights.",
    ),
    (
        broken_vit,
        ALaSTConfig(),
        UnsupportedModelError,
        "ViTForImageClassification is not supported: its output for a random image is NaN or infinite. "
        "Check its weights.",
    ),
    (
        broken_vit,
        SynQTConfig(),
        UnsupportedModelError,
        "ViTForImageClassification is not supported: its output for a random image is NaN or infinite. "
        "Check its weights.",
    ),
    (
        lambda: make_vit().vit,
        SynQTConfig(),
        UnsupportedModelError,
        "ViTModel: the head of SynQT takes the place of the classifier, but none of [] gives the model's "
        "`logits` [images, classes] by itself.",
    ),
    (
        lambda: make_vit().vit,
        BSRConfig(tasks={"a": 2}),
        UnsupportedModelError,
        "ViTModel: the heads of `tasks` take the place of the classifier, but none of [] gives the model's "
        "`logits` [images, classes] by itself.",
    ),
    (
        make_vit,
        BSRConfig(trainable_blocks=[4]),
        ConfigError,
        "BSRConfig: `trainable_blocks=[4]` asks for block 4, but this model has 4 blocks (0 to 3). Use "
        'indices up to 3 or "last:1".',
    ),
    (
        make_vit,
        BSRConfig(trainable_blocks="last:5"),
        ConfigError,
        "BSRConfig: `trainable_blocks='last:5'` asks for block -1, but this model has 4 blocks (0 to 3). Use "
        'indices up to 3 or "last:4".',
    ),
    (
        make_vit,
        BSRConfig(reduction_blocks=[1, 7]),
        ConfigError,
        "BSRConfig: `reduction_blocks=[1, 7]` asks for block 7, but this model has 4 blocks (0 to 3). Use "
        "indices up to 3.",
    ),
    (
        make_vit,
        BSRConfig(keep_rate=[0.5]),
        ConfigError,
        "BSRConfig: `keep_rate=[0.5]` has 1 rates, but this model reduces at the 3 blocks [1, 2, 3]. Give "
        "one rate, or one for each block.",
    ),
    (
        make_vit,
        BSRConfig(keep_rate=[]),
        ConfigError,
        "BSRConfig: `keep_rate=[]` has 0 rates, but this model reduces at the 3 blocks [1, 2, 3]. Give one "
        "rate, or one for each block.",
    ),
    (
        make_vit,
        BSRConfig(target_modules=["nothing"]),
        ConfigError,
        "BSRConfig: `target_modules=['nothing']` with `exclude_modules=None` leaves nothing to train in "
        "block 3, whose leaf modules are ['attention.q_proj', 'attention.k_proj', 'attention.v_proj', "
        "'attention.o_proj', 'layernorm_before', 'l",
    ),
    (
        make_vit,
        BSRConfig(modules_to_save=["embeddings"]),
        ConfigError,
        "BSRConfig: `modules_to_save='embeddings'` means 'vit.embeddings', which no gradient reaches: it runs before "
        'block 3, the first that trains. Train all blocks with it (`trainable_blocks="every:1"`), or use '
        "`ALaSTConfig(train_embeddings=True)`; or leave it out.",
    ),
    (
        make_vit,
        BSRConfig(trainable_blocks=[3], layout={"blocks.9.x": "y"}),
        ConfigError,
        "BSRConfig: `layout` names ['blocks.9.x'], which this model does not have or this plan does not "
        "train. The adapter was made for another model; to create a new one with this configuration, set "
        "`layout=None`.",
    ),
    (
        make_vit,
        ALaSTConfig(trainable_blocks_per_step=5),
        ConfigError,
        "ALaSTConfig: `trainable_blocks_per_step=5` asks for more than this model's 4 blocks. Use at most 4.",
    ),
    (
        make_vit,
        SynQTConfig(layers=[4]),
        ConfigError,
        "SynQTConfig: `layers=[4]` asks for block 4, but this model has 4 blocks (0 to 3). Use indices up to 3.",
    ),
    (
        make_vit,
        SynQTConfig(reduction_blocks=[9]),
        ConfigError,
        "SynQTConfig: `reduction_blocks=[9]` asks for block 9, but this model has 4 blocks (0 to 3). Use "
        "indices up to 3.",
    ),
    (
        lambda: make_adapter("bsr"),
        BSRConfig(),
        AdapterError,
        "PeftModel already has adapters; add another with `model.add_adapter(name, config)`. "
        "To start from the base model, call `model.unload()` first.",
    ),
    (
        lambda: make_adapter("synqt"),
        SynQTConfig(),
        AdapterError,
        "PeftModel already has adapters; add another with `model.add_adapter(name, config)`. "
        "To start from the base model, call `model.unload()` first.",
    ),
    (
        lambda: make_adapter("synqt").base_model.model,
        BSRConfig(),
        AdapterError,
        "ViTForImageClassification has adapters of another method (SynQTController). Call `unload()` on it "
        "first, or load the base model again.",
    ),
    (
        lambda: make_adapter("bsr").base_model.model,
        ALaSTConfig(),
        AdapterError,
        "ViTForImageClassification has adapters of another method (BSRController). Call `unload()` on it "
        "first, or load the base model again.",
    ),
    (
        lambda: make_adapter("alast").base_model.model,
        SynQTConfig(),
        AdapterError,
        "ViTForImageClassification has adapters of another method (ALaSTController). Call `unload()` on it "
        "first, or load the base model again.",
    ),
]


@pytest.mark.parametrize(
    ("make", "config", "error", "text"), MODELS, ids=[f"{i}-{type(c).__name__}" for i, (_, c, *_) in enumerate(MODELS)]
)
def test_a_model_that_cannot_take_it(make, config, error, text):
    torch.manual_seed(0)
    model = make()
    before = None if any(p.is_meta for p in model.parameters()) else state_of(model)
    with pytest.raises(error) as found:
        get_peft_model(model, config)
    assert str(found.value).startswith(text)
    if before is not None:
        assert_same_state(model, before)


CALLS: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    (
        "bsr",
        lambda m: m(pixel_values=IMAGES[:0]),
        InputError,
        "`pixel_values` is (0, 3, 32, 32): the batch is empty. Call the model with `pixel_values` [images, 3, 32, 32].",
    ),
    (
        "alast",
        lambda m: m(IMAGES[:0], labels=torch.zeros(0)),
        InputError,
        "`pixel_values` is (0, 3, 32, 32): the batch is empty. Call the model with `pixel_values` [images, 3, 32, 32].",
    ),
    (
        "synqt",
        lambda m: m(IMAGES[:0]),
        InputError,
        "`pixel_values` is (0, 3, 32, 32): the batch is empty. Call the model with `pixel_values` [images, 3, 32, 32].",
    ),
    (
        "bsr",
        lambda m: m(),
        InputError,
        "`pixel_values` is NoneType: that is not a tensor. Call the model with `pixel_values` [images, 3, 32, 32].",
    ),
    (
        "synqt",
        lambda m: m(pixel_values=None),
        InputError,
        "`pixel_values` is NoneType: that is not a tensor. Call the model with `pixel_values` [images, 3, 32, 32].",
    ),
    (
        "bsr",
        lambda m: m(pixel_values=[[0.0]]),
        InputError,
        "`pixel_values` is list: that is not a tensor. Call the model with `pixel_values` [images, 3, 32, 32].",
    ),
    (
        "bsr",
        lambda m: m(pixel_values=IMAGES[0]),
        InputError,
        "`pixel_values` is (3, 32, 32): 3 axes instead of 4. Call the model with `pixel_values` [images, 3, 32, 32].",
    ),
    (
        "bsr",
        lambda m: m(pixel_values=IMAGES[:, :1]),
        InputError,
        "`pixel_values` is (2, 1, 32, 32): 1 channels instead of 3. Call the model with `pixel_values` "
        "[images, 3, 32, 32].",
    ),
    (
        "synqt",
        lambda m: m(pixel_values=IMAGES[:, :, :4, :4]),
        InputError,
        "`pixel_values` is (2, 3, 4, 4): less than one patch of 8 x 8 px. Call the model with `pixel_values` "
        "[images, 3, 32, 32].",
    ),
    (
        "bsr",
        lambda m: m(pixel_values=IMAGES, task="zoo"),
        AdapterError,
        "`task='zoo'` was given, but no adapter of this model has tasks. Attach one with "
        "`BSRConfig(tasks={name: number of classes})`, or leave it out.",
    ),
    (
        "alast",
        lambda m: m(pixel_values=IMAGES, task_ids=[0, 0]),
        AdapterError,
        "`task_ids=[0, 0]` was given, but no adapter of this model has tasks. Attach one with "
        "`BSRConfig(tasks={name: number of classes})`, or leave it out.",
    ),
    (
        "bsr",
        lambda m: m(pixel_values=IMAGES, adapter_names=["a", "b"]),
        AdapterError,
        "`adapter_names=['a', 'b']` asks for several adapters in one batch, but each adapter has its own "
        "blocks and token counts. Use `set_adapter` and one batch per adapter.",
    ),
    (
        "synqt",
        lambda m: m(pixel_values=IMAGES, adapter_names=["a", "b"]),
        AdapterError,
        "`adapter_names=['a', 'b']` asks for several adapters in one batch, but each adapter has its own "
        "blocks and token counts. Use `set_adapter` and one batch per adapter.",
    ),
    (
        "tasks",
        lambda m: m(pixel_values=IMAGES),
        AdapterError,
        "No task was given, but this adapter has several: ['zoo', 'digits']. Call the model with "
        "`task='zoo'`, or with `task_ids`, the index of each image's task in this list.",
    ),
    (
        "tasks",
        lambda m: m(pixel_values=IMAGES, task="cars"),
        AdapterError,
        "`task` has 'cars', but the tasks of this adapter are ['zoo', 'digits'].",
    ),
    (
        "tasks",
        lambda m: m(pixel_values=IMAGES, task_ids=[0, 2]),
        AdapterError,
        "`task_ids` has 2, but the tasks of this adapter are ['zoo', 'digits'] (0 to 1).",
    ),
    (
        "tasks",
        lambda m: m(pixel_values=IMAGES, task_ids=[0]),
        AdapterError,
        "1 tasks were given for 2 images. Give one, or one per image.",
    ),
    (
        "tasks",
        lambda m: m(pixel_values=IMAGES, task="zoo", task_ids=[0, 0]),
        AdapterError,
        "`task='zoo'` and `task_ids` were both given. Give one of them.",
    ),
    (
        "tasks",
        lambda m: m(pixel_values=IMAGES, task="zoo", labels=torch.zeros(3)),
        AdapterError,
        "Task 'zoo' has 2 images in this batch, but `labels` for it have the shape (3,). Give one label per "
        "image; with several tasks, a tensor over the whole batch, or a dict of task -> labels.",
    ),
    (
        "bsr",
        lambda m: m.base_model.set_adapter(["a", "b"]),
        AdapterError,
        "Cannot activate ['a', 'b'] together: each adapter has its own weights and plan, which cannot be "
        "combined. Name one adapter.",
    ),
    (
        "bsr",
        lambda m: m.base_model.plan("nope"),
        AdapterError,
        "There is no adapter 'nope'; this model has ['default'].",
    ),
    (
        "alast",
        lambda m: m.base_model.schedule("nope"),
        AdapterError,
        "There is no adapter 'nope'; this model has ['default'].",
    ),
    (
        "bsr",
        lambda m: m.merge_adapter(["nope"]),
        AdapterError,
        "There is no adapter 'nope'; this model has ['default'].",
    ),
    (
        "bsr",
        lambda m: m.merge_adapter(["default", "default"]),
        AdapterError,
        "Cannot merge ['default', 'default'] together: each adapter has its own weights and plan, which "
        "cannot be combined. Name one adapter.",
    ),
    (
        "tasks",
        lambda m: m.merge_and_unload(),
        AdapterError,
        "Adapter 'default' cannot be merged: it has a head for each of its tasks, which the base model has "
        "no place for. Keep the adapter; `export_task` writes one for a single task.",
    ),
    (
        "synqt",
        lambda m: m.merge_adapter(),
        AdapterError,
        "SynQT cannot be merged: its queries and its head compute in addition to the backbone and do not "
        "change its weights. Keep the adapter to use it, or call `unload()` for the base model.",
    ),
    (
        "bsr",
        lambda m: m.add_adapter("second", BSRConfig(trainable_blocks=[9])),
        ConfigError,
        "BSRConfig: `trainable_blocks=[9]` asks for block 9, but this model has 4 blocks (0 to 3). Use "
        'indices up to 3 or "last:1".',
    ),
    (
        "lora",
        lambda m: m.add_adapter("second", BSRConfig(keep_rate=[0.5])),
        ConfigError,
        "BSRConfig: `keep_rate=[0.5]` has 1 rates, but this model reduces at the 3 blocks [1, 2, 3]. Give "
        "one rate, or one for each block.",
    ),
    (
        "bsr",
        lambda m: m.base_model.model.vit.layers[2](torch.zeros(1, 17, 32)),
        ForwardError,
        "a block of a model with an adapter ran outside of the model's forward. Call the model. If this is a "
        "backward pass, gradient checkpointing wraps the block's call (as timm does), so the recomputation has "
        "no route: disable it, or set `kee",
    ),
    (
        "synqt",
        lambda m: m.base_model.model.vit.layers[3](torch.zeros(1, 17, 32)),
        ForwardError,
        "a block that SynQT reads was called outside of the model's forward. Call the model.",
    ),
    (
        "synqt",
        lambda m: m.base_model.model.classifier(torch.zeros(1, 32)),
        ForwardError,
        "the head of SynQT was called without a forward of the model's blocks. Call the model.",
    ),
    (
        "tasks",
        lambda m: m.base_model.model.classifier(torch.zeros(1, 32)),
        ForwardError,
        "a task head was called outside of the model's forward. Call the model.",
    ),
    (
        "bsr",
        lambda m: add_task(m, "zoo", 5),
        AdapterError,
        "Adapter 'default' has no tasks. Train one with `BSRConfig(tasks=...)`.",
    ),
    (
        "tasks",
        lambda m: add_task(m, "zoo", 5),
        AdapterError,
        "Adapter 'default' already has a task 'zoo', among ['zoo', 'digits']. Choose another name.",
    ),
    (
        "tasks",
        lambda m: add_task(m, "cars", 0),
        AdapterError,
        "add_task: `tasks`: task 'cars': `num_outputs=0` must be an integer from 1 to 262144.",
    ),
    (
        "tasks",
        lambda m: export_task(m, "cars", "nowhere"),
        AdapterError,
        "Adapter 'default' has no task 'cars'; its tasks are ['zoo', 'digits'].",
    ),
    (
        "bsr",
        lambda m: export_task(m, "cars", "nowhere"),
        AdapterError,
        "Adapter 'default' has no tasks. Train one with `BSRConfig(tasks=...)`.",
    ),
    (
        "bsr",
        lambda m: record_routes(make_vit()).__enter__(),
        AdapterError,
        "ViTForImageClassification has no adapter of peft_bsr. Call get_peft_model(model, BSRConfig()).",
    ),
    (
        "bsr",
        lambda m: record_usage(make_vit()).__enter__(),
        AdapterError,
        "ViTForImageClassification has no adapter of peft_bsr. Call get_peft_model(model, BSRConfig()).",
    ),
    (
        "bsr",
        lambda m: FeatureCache.build(m, [], "nowhere"),
        FeatureCacheError,
        "`dtype=torch.bfloat16` and 0 samples: tokens are stored as bfloat16, float16 or float32, and there "
        "must be at least one sample.",
    ),
    (
        "alast",
        lambda m: FeatureCache.build(m, [], "nowhere"),
        FeatureCacheError,
        "`dtype=torch.bfloat16` and 0 samples: tokens are stored as bfloat16, float16 or float32, and there "
        "must be at least one sample.",
    ),
    (
        "bsr",
        lambda m: FeatureCache.build(make_vit(), [], "nowhere"),
        FeatureCacheError,
        "`dtype=torch.bfloat16` and 0 samples: tokens are stored as bfloat16, float16 or float32, and there "
        "must be at least one sample.",
    ),
    (
        "bsr",
        lambda m: FeatureCache.open("nowhere"),
        FeatureCacheError,
        "there is no feature cache in 'nowhere'. Use FeatureCache.build.",
    ),
    (
        "bsr",
        lambda m: ALaSTCallback().on_step_end(None, None, None, model=m),
        AdapterError,
        "PeftModel has no active ALaST adapter. Attach one with `get_peft_model(model, ALaSTConfig())`, or "
        "leave `ALaSTCallback` out.",
    ),
    (
        "bsr",
        lambda m: verify_trainability(make_vit()),
        AdapterError,
        "ViTForImageClassification has no adapter of peft_bsr. Attach one with `get_peft_model(model, BSRConfig())`.",
    ),
    (
        "bsr",
        lambda m: verify_trainability(m, batch={"pixel_values": IMAGES[:0]}),
        TrainabilityError,
        "`batch` holds no images: ['pixel_values'] with [(0, 3, 32, 32)]. Give a mapping of the model's "
        "keywords, such as `next(iter(loader))`, or leave it None.",
    ),
    (
        "bsr",
        lambda m: verify_trainability(m, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)),
        TrainabilityError,
        "PeftModel: 'base_model.model.classifier.bsr_params.default.bias', "
        "'base_model.model.classifier.bsr_params.default.weight', "
        "'base_model.model.vit.layernorm.bsr_params.default.bias', "
        "'base_model.model.vit.layernorm.bsr_params.default.weight' and 32 more are meant to train, but the "
        "optimizer does not hold them.",
    ),
    (
        "bsr",
        lambda m: TaskBatchSampler(TaskDataset({"a": []}), batch_size=2),
        ConfigError,
        "every task needs data; there are [0] examples of ['a'].",
    ),
    (
        "bsr",
        lambda m: TaskBatchSampler(TaskDataset({"a": [{}]}), batch_size=0),
        ConfigError,
        "batch_size=0, temperature=2.0 and num_batches=None must be above 0.",
    ),
]


@pytest.mark.parametrize(
    ("method", "call", "error", "text"), CALLS, ids=[f"{i}-{method}" for i, (method, *_) in enumerate(CALLS)]
)
def test_a_call_that_cannot_be(method, call, error, text):
    model = make_adapter(method)
    before = state_of(model)
    with pytest.raises(error) as found:
        call(model)
    assert str(found.value).startswith(text)
    assert_same_state(model, before)
    settings = {"task": "zoo"} if method == "tasks" else {}
    assert model(pixel_values=IMAGES, **settings).logits.isfinite().all()


def test_images_of_another_size_are_told_by_the_model_itself():
    model = make_adapter("bsr")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"Input image size \(40\*40\) doesn't match model \(32\*32\)"):
        model(pixel_values=torch.zeros(1, 3, 40, 40))
    assert_same_state(model, before)
