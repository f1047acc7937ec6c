"""Merging, switching, disabling and deleting, in both modes, with and without reduction."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_bsr import AdapterError, BSRConfig, ReductionNotMergedWarning
from peft_bsr.backbones import ScoringConfig
from peft_bsr.engine import BlockController

pytestmark = pytest.mark.sampled(2)


@pytest.fixture
def two(model, make_config, make_vit):
    """Adapters "default" (blocks 1 and 3) and "other" (blocks 2 and 3, other reductions, a head of its own)."""
    model.add_adapter("other", make_config(trainable_blocks=[2, 3], reduction_blocks=[0], keep_rate=0.3))
    return model


def test_merging_changes_no_output(model, images, run):
    output = run(model, images)
    stock = {n: p.clone() for n, p in model.named_parameters() if ".bsr_params." not in n}
    model.merge_adapter()
    torch.testing.assert_close(run(model, images), output, atol=1e-6, rtol=1e-5)
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    assert torch.equal(run(model, images), output)
    assert all(torch.equal(p, stock[n]) for n, p in model.named_parameters() if n in stock)


def test_merged_full_weights_are_the_copies_themselves(make_vit, images, run):
    model = get_peft_model(make_vit(), BSRConfig(trainable_blocks=[1], init_weights=False, keep_rate=1.0)).eval()
    output = run(model, images)
    model.merge_adapter()
    assert torch.equal(run(model, images), output)


def test_merging_again_and_saving_while_merged(model, make_vit, images, run, tmp_path):
    output = run(model, images)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(make_vit(), tmp_path).eval(), images), output)


def test_merge_and_unload_gives_a_plain_model(model, keep_rate, make_vit, images, run):
    output = run(model, images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = model.merge_and_unload()
    found = [w for w in caught if issubclass(w.category, ReductionNotMergedWarning)]
    assert len(found) == (keep_rate < 1)
    if keep_rate == 1:
        torch.testing.assert_close(run(plain, images), output, atol=1e-6, rtol=1e-5)
    assert not torch.equal(run(plain, images), run(make_vit(), images))
    assert_is_stock(plain, make_vit())


def assert_is_stock(model, stock) -> None:
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    assert not any(
        isinstance(m, BlockController) or isinstance(getattr(m, "config", None), ScoringConfig) for m in model.modules()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(model.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("prepare", ["nothing", "merge", "disable"])
def test_unload_gives_the_base_model_back(model, prepare, make_vit, images, run):
    if prepare == "merge":
        model.merge_adapter()
    elif prepare == "disable":
        model.base_model.disable_adapter_layers()
    plain = model.unload()
    assert torch.equal(run(plain, images), run(make_vit(), images))
    assert_is_stock(plain, make_vit())


def test_an_unloaded_model_takes_a_new_adapter(model, make_config, images, run):
    output = run(model, images)
    again = get_peft_model(model.unload(), make_config()).eval()
    assert not torch.equal(run(again, images), output), "init_weights=False draws new weights"
    assert again.base_model.plan() is not None


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_nan_and_changes_nothing(model, call, images, run, make_vit):
    last = [p for n, p in model.named_parameters() if ".bsr_params." in n][-1]
    with torch.no_grad():
        last.view(-1)[0] = torch.nan
    base = {n: p.clone() for n, p in model.named_parameters() if ".bsr_params." not in n}
    with pytest.raises(AdapterError, match="NaN or infinite; nothing was merged"):
        getattr(model, call)(safe_merge=True)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert model.get_model_status().merged_adapters == []
    assert model.base_model.plan().trained_blocks == [1, 3]


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_two_is_refused(two, call, images, run):
    output = run(two, images)
    with pytest.raises(AdapterError, match=r"Cannot merge \['default', 'other'\] together"):
        getattr(two, call)(adapter_names=["default", "other"])
    assert torch.equal(run(two, images), output)


def test_merging_an_inactive_adapter(two, images, run):
    two.set_adapter("other")
    other = run(two, images)
    two.set_adapter("default")
    two.merge_adapter(adapter_names=["other"])
    two.unmerge_adapter()
    two.set_adapter("other")
    assert torch.equal(run(two, images), other)


def test_disabling_gives_the_base_model(model, make_vit, images, run):
    output, stock = run(model, images), run(make_vit(), images)
    with model.disable_adapter():
        assert torch.equal(run(model, images), stock)
        assert torch.equal(run(model.train(), images), stock)
    assert torch.equal(run(model.eval(), images), output)


def test_disabling_unmerges(model, make_vit, images, run):
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, images), run(make_vit(), images))


def test_switching_changes_blocks_rates_and_head(two, images, run):
    first = run(two, images)
    assert two.base_model.plan().trained_blocks == [1, 3]
    two.set_adapter("other")
    second = run(two, images)
    assert not torch.allclose(first, second, atol=1e-3)
    plan = two.base_model.plan()
    assert plan.trained_blocks == [2, 3]
    assert [i for i, b in enumerate(plan.blocks) if b.reduction] == [0]
    trained = {n for n, p in two.named_parameters() if p.requires_grad}
    assert trained
    assert all(".other" in name for name in trained)
    assert not any("layers.1." in name for name in trained)
    two.set_adapter("default")
    assert torch.equal(run(two, images), first)


def test_a_second_adapter_starts_at_the_base_even_while_the_first_is_merged(make_vit, images, run):
    model = get_peft_model(make_vit(), BSRConfig(trainable_blocks=[1, 3], init_weights=False, keep_rate=1.0)).eval()
    model.merge_adapter()
    model.add_adapter("fresh", BSRConfig(trainable_blocks=[1, 3], keep_rate=1.0))
    model.unmerge_adapter()
    model.set_adapter("fresh")
    assert torch.equal(run(model, images), run(make_vit(), images))


def test_a_refused_second_adapter_leaves_the_first_alone(model, make_config, images, run, snapshot, assert_unchanged):
    before, output = snapshot(model), run(model, images)
    with pytest.raises(ValueError, match="asks for block 7, but this model has 4 blocks"):
        model.add_adapter("bad", make_config(trainable_blocks=[7]))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model, images), output)


def test_activating_two_is_refused(two):
    with pytest.raises(AdapterError, match="Cannot activate"):
        two.base_model.set_adapter(["default", "other"])
    assert two.active_adapters == ["default"]


def test_deleting_an_inactive_adapter(two, images, run):
    output = run(two, images)
    two.delete_adapter("other")
    assert torch.equal(run(two, images), output)
    assert list(two.peft_config) == ["default"]
    assert not any(".other" in name for name, _ in two.named_parameters())


def test_deleting_the_active_adapter_activates_the_other_everywhere(two, images, run):
    two.set_adapter("other")
    other = run(two, images)
    two.set_adapter("default")
    with pytest.warns(UserWarning, match="'other' is active now"):
        two.delete_adapter("default")
    assert two.active_adapters == ["other"]
    assert torch.equal(run(two, images), other)
    assert two.get_model_status().active_adapters == ["other"]
    assert all(p.requires_grad for n, p in two.named_parameters() if ".other" in n)


def test_deleting_the_last_adapter_gives_the_base_model(model, make_vit, images, run):
    model.delete_adapter("default")
    assert torch.equal(run(model.base_model.model, images), run(make_vit(), images))
    assert model.active_adapters == []


def test_deleting_an_unknown_adapter(model):
    with pytest.raises(ValueError, match="unknown does not exist"):
        model.delete_adapter("unknown")


@pytest.mark.parametrize("requested_before", [True, False])
def test_hidden_states_are_those_that_leave_each_block(make_vit, images, requested_before):
    vit = make_vit()
    if requested_before:  # transformers installs its capture hooks on the first request
        assert [h.shape[1] for h in vit(images, output_hidden_states=True).hidden_states] == [17] * 5
    model = get_peft_model(vit, BSRConfig(reduction_blocks=[1, 2])).eval()
    states = model(images, output_hidden_states=True).hidden_states
    assert [h.shape[1] for h in states] == [17, 17, 10, 7, 7]
    with model.disable_adapter():
        assert [h.shape[1] for h in model(images, output_hidden_states=True).hidden_states] == [17] * 5


def test_nothing_but_the_adapter_changes_in_training(model, images):
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    model.train()
    for _ in range(2):
        model(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_training_the_base_while_disabled_is_left_to_the_user(model, images):
    with model.disable_adapter():
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".bsr_params." in n)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".bsr_params." in n)
