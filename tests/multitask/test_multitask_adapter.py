"""PEFT's promises for adapters with tasks: files, names, switching, removal, refusals, tasks that come and go."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_bsr import AdapterError, BSRConfig, ConfigError, MoEConfig, TaskConfig
from peft_bsr.cost import estimate
from peft_bsr.multitask import MultitaskOutput

NAMES = ["zoo", "digits", "clothes"]


def every_task(model, images, run):
    return [run(model, images, task=task) for task in NAMES]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_config_round_trips_with_the_order_of_tasks(make_config, tmp_path):
    config = make_config(task_weights={"zoo": 0.5}, preset="paper", moe={"balance_weight": 0.01})
    assert BSRConfig(**json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    for loader in (PeftConfig, BSRConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded == config
        assert [task.name for task in loaded.tasks] == NAMES
        assert isinstance(loaded.moe, MoEConfig)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["other", "zoo", "experts", "classifier", "gates"])
def test_save_and_load_under_any_name(model, make_vit, images, run, tmp_path, name):
    expected = every_task(model, images, run)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert not any("default" in key or "base_layer" in key for key in keys)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(make_vit(), tmp_path, adapter_name=name, low_cpu_mem_usage=low).eval()
        assert equal(every_task(loaded, images, run), expected)
    loaded.save_pretrained(tmp_path / "again")
    folder = tmp_path / "again" / name
    assert set(load_file(folder / "adapter_model.safetensors")) == keys


def test_disable_and_unload_are_the_base_model(model, make_vit, images, run):
    stock = run(make_vit(), images)
    with model.disable_adapter():
        assert torch.equal(run(model, images), stock)
        assert torch.equal(run(model, images, task="zoo"), stock)
    before = every_task(model, images, run)
    assert equal(before, every_task(model, images, run))
    base = model.unload()
    assert torch.equal(run(base, images), stock)
    assert not base._forward_hooks and not base._forward_pre_hooks
    assert [name for name, _ in base.named_modules()] == [name for name, _ in make_vit().named_modules()]


@pytest.mark.parametrize("second", ["moe", "dense", "plain"])
def test_a_second_adapter_beside(model, make_config, make_vit, images, run, second, tmp_path):
    first = every_task(model, images, run)
    settings = {
        "moe": make_config(tasks={"other": 2}, trainable_blocks=[0, 3]),
        "dense": BSRConfig(tasks={"other": 2}, trainable_blocks=[3], init_weights=False),
        "plain": BSRConfig(trainable_blocks=[2], init_weights=False),
    }
    model.add_adapter("second", settings[second])
    assert equal(every_task(model, images, run), first)
    model.set_adapter("second")
    found = run(model, images)  # one task, or none: it need not be named
    assert found.shape == (6, 3 if second == "plain" else 2)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path / "second").eval()
    assert torch.equal(run(loaded, images), found)
    model.set_adapter("default")
    assert equal(every_task(model, images, run), first)
    model.delete_adapter("default")
    assert torch.equal(run(model, images), found)
    assert torch.equal(run(model.unload(), images), run(make_vit(), images))


def test_an_adapter_with_tasks_after_one_without(make_vit, make_config, images, run):
    model = get_peft_model(make_vit(), BSRConfig(trainable_blocks=[1, 3], init_weights=False)).eval()
    first = run(model, images)
    with pytest.raises(AdapterError, match="no adapter of this model has tasks"):
        model(pixel_values=images, task="zoo")
    torch.manual_seed(3)
    model.add_adapter("tasks", make_config())
    model.set_adapter("tasks")
    stock = make_vit()
    torch.manual_seed(3)
    alone = get_peft_model(stock, make_config()).eval()
    assert equal(every_task(model, images, run), every_task(alone, images, run))
    model.set_adapter("default")
    assert torch.equal(run(model, images), first)


def test_merging_is_refused_and_changes_nothing(model, images, run):
    before = every_task(model, images, run)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"Adapter 'default' cannot be merged: .* and mixtures of experts"):
            merge()
    assert equal(every_task(model, images, run), before)


def test_copies_and_pickles_are_independent(model, make_vit, images, run):
    expected = every_task(model, images, run)
    for reference in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(every_task(reference, images, run), expected)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.zero_()
        assert equal(every_task(model, images, run), expected)


def test_what_trains(model):
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("bsr_params" in name for name in trained)
    assert sum("gates" in name for name in trained) == 2
    assert sum("heads" in name for name in trained) == 6
    is_full = model.peft_config["default"].moe.expert_type == "full"
    assert any("mlp.fc1.bsr_params" in name for name in trained) != is_full


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(make_vit, make_config, images, dtype, expert_type):
    config = make_config(moe={"expert_type": expert_type})
    model = get_peft_model(make_vit().to(dtype), config).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(pixel_values=images.to(dtype), task="digits", labels=torch.tensor([0, 1, 2, 3, 0, 1]))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_autocast(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(pixel_values=images, task_ids=[0, 1, 2, 0, 1, 2], labels=torch.tensor([0] * 6))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_losses_are_weighted_means_over_images(make_vit, make_config, images):
    model = get_peft_model(make_vit(), make_config(task_weights={"digits": 3.0})).eval()
    ids, labels = torch.tensor([0, 1, 1, 2, 1, 0]), torch.tensor([0, 1, 2, 1, 3, 4])
    output = model(pixel_values=images, task_ids=ids, labels=labels)
    assert isinstance(output, MultitaskOutput)
    assert output.task == NAMES
    expected = torch.zeros(())
    for index, (task, weight) in enumerate(zip(NAMES, (1.0, 3.0, 1.0), strict=True)):
        rows = (ids == index).nonzero().flatten()
        assert torch.equal(output.rows[task], rows)
        loss = torch.nn.functional.cross_entropy(output.logits[task], labels[rows], reduction="sum")
        torch.testing.assert_close(output.task_losses[task], loss / len(rows))
        expected = expected + weight * loss / 6
    torch.testing.assert_close(output.loss, expected)
    by_name = model(
        pixel_values=images,
        task=[NAMES[i] for i in ids],
        labels={task: labels[ids == index] for index, task in enumerate(NAMES)},
    )
    torch.testing.assert_close(by_name.loss, output.loss)
    alone = model(pixel_values=images, task="clothes", labels=torch.zeros(6, dtype=torch.long))
    assert (alone.task, alone.task_losses, alone.rows) == ("clothes", None, None)
    assert list(alone) == ["loss", "logits"]  # what the Trainer sees is what a classifier returns


CALLS = [
    (
        {},
        r"No task was given, but this adapter has several: \['zoo', 'digits', 'clothes'\].",
    ),
    ({"task": "cars"}, r"`task` has 'cars', but the tasks of this adapter are \['zoo', 'digits', 'clothes'\]\."),
    ({"task_ids": [0, 1, 2, 3, 0, 1]}, r"`task_ids` has 3, but the tasks of this adapter are .* \(0 to 2\)"),
    ({"task_ids": [0, 1]}, "2 tasks were given for 6 images"),
    ({"task": "zoo", "task_ids": [0] * 6}, "were both given"),
    ({"task": "zoo", "labels": torch.zeros(4)}, "Task 'zoo' has 6 images in this batch, but `labels` for it have the"),
    ({"task_ids": [0, 1, 2, 0, 1, 2], "labels": {"zoo": [0, 1]}}, r"the batch has images of \['digits', 'clothes'\]"),
]


@pytest.mark.parametrize(("kwargs", "text"), CALLS, ids=[text[:25] for _, text in CALLS])
def test_wrong_calls_say_what_to_do_and_leave_nothing(model, images, run, kwargs, text):
    before = run(model, images, task="zoo")
    with pytest.raises(AdapterError, match=text):
        model(pixel_values=images, **kwargs)
    assert model.base_model.model.vit.layers[0].token_router.context.now.call is None
    assert torch.equal(run(model, images, task="zoo"), before)


CONFIGS = [
    ({"tasks": {}}, "must name at least one task"),
    ({"tasks": {"a": 0}}, "task 'a': `num_outputs=0` must be an integer from 1 to 262144"),
    ({"tasks": {"a": {"num_outputs": 2, "kind": "ranking"}}}, "`kind='ranking'` is unknown"),
    ({"tasks": [TaskConfig("a", 2), TaskConfig("a", 3)]}, r"`tasks` names \['a'\] more than once"),
    ({"moe": MoEConfig()}, "`moe` routes by task, but there are no `tasks`"),
    ({"tasks": {"a": 2}, "moe": {"experts": 3}}, r"unknown settings \['experts'\]"),
    ({"tasks": {"a": 2}, "moe": {"top_k": 20}}, "`top_k=20` must not be larger than `num_experts=16`"),
    ({"tasks": {"a": 2}, "task_weights": {"b": 1.0}}, "`task_weights={'b': 1.0}` must give numbers"),
    ({"tasks": {"a": 2}, "preset": "paper"}, "`preset='paper'` is for mixtures of experts"),
    ({"tasks": {"a": 2}, "preset": "mine"}, "`preset='mine'` is unknown"),
    (
        {"tasks": {"a": {"num_outputs": 2, "kind": "segmentation"}}, "mode": "compact"},
        r"the tasks \['a'\] need",
    ),
    ({"tasks": {"a": 2}, "task_type": "SEQ_CLS"}, "`task_type='SEQ_CLS'` would make PEFT train"),
]


@pytest.mark.parametrize(("settings", "text"), CONFIGS, ids=[text[:25] for _, text in CONFIGS])
def test_configs_that_cannot_be(settings, text):
    with pytest.raises(ConfigError, match=text):
        BSRConfig(**settings)


def test_every_wrong_number_of_a_mixture_is_named():
    with pytest.raises(ConfigError) as error:
        MoEConfig(0, 2.5, 1, "half", 0, -1, -1.0, "much", 1.0)
    assert str(error.value).count("\n  - ") == 9


def test_a_model_without_a_classifier_is_refused(make_vit):
    with pytest.raises(ValueError, match="the heads of `tasks` take the place of the classifier"):
        get_peft_model(make_vit().vit, BSRConfig(tasks={"a": 2}))


def test_only_the_mixtures_may_train(make_vit, make_config, images):
    model = get_peft_model(make_vit(), make_config(exclude_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "layers" in name]
    blocks = {name.split("layers.")[1].split(".bsr")[0] for name in trained}
    assert blocks == {f"{i}.{name}" for i in (1, 3) for name in ("token_router", "layernorm_before", "layernorm_after")}
    only = get_peft_model(make_vit(), make_config(target_modules=["fc1"]))
    output = only.train()(pixel_values=images, task="zoo", labels=torch.tensor([0] * 6))
    output.loss.backward()
    assert all(p.grad is not None for p in only.parameters() if p.requires_grad)


def test_costs_that_are_not_predicted_are_refused(make_vit, make_config, images):
    with pytest.raises(ConfigError, match="What an adapter with `tasks` costs is not predicted"):
        estimate(make_vit(), make_config(), batch_size=2)


def test_a_deleted_adapters_heads_are_forgotten(make_vit):
    """Under the same name a plain copy is one module again, which lean parts may look up."""
    model = get_peft_model(make_vit(), BSRConfig(trainable_blocks=[3], tasks={"a": 2}), adapter_name="first")
    model.add_adapter("second", BSRConfig(trainable_blocks=[3]))
    model.set_adapter("second")
    model.delete_adapter("first")
    model.add_adapter("first", BSRConfig(trainable_blocks=[3]))
    model.set_adapter("first")
    classifier = model.base_model.model.classifier
    assert classifier.active_module() == (classifier.bsr_params["first"], None)
