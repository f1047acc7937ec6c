"""PEFT's behaviour for every method, part 2: merged, disabled, deleted and copied adapters, and half precision."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_bsr import AdapterError, ReductionNotMergedWarning

pytestmark = pytest.mark.sampled(2)

LABELS = torch.tensor([0, 1])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture
def two(model, method):
    """A model with the active adapter "default", and "other" on other blocks."""
    torch.manual_seed(1)
    model.add_adapter("other", method.config(**method.other))
    return model.eval()


@pytest.fixture
def merges(method):
    if not method.merges:
        pytest.skip("a side network cannot be merged, which another test checks")


def adapter_parameters(model, method) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{method.container}." in name}


def test_several_adapters_are_added_switched_saved_and_deleted(model, method, make_vit, images, run, tmp_path):
    outputs = {"default": run(model, images)}
    for seed, (name, settings) in enumerate({"second": method.other, "third": {}}.items()):
        torch.manual_seed(seed)
        model.add_adapter(name, method.config(**settings))
        model.set_adapter(name)
        outputs[name] = run(model.eval(), images)
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == 3
    for name, expected in outputs.items():
        model.set_adapter(name)
        method.assert_same(run(model, images), expected)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if f".{method.container}.{name}." in n}
    model.save_pretrained(tmp_path)
    for name, expected in outputs.items():
        folder = tmp_path if name == "default" else tmp_path / name
        method.assert_same(run(PeftModel.from_pretrained(make_vit(), folder).eval(), images), expected)
    model.delete_adapter("second")
    method.assert_same(run(model, images), outputs["third"])
    with pytest.warns(UserWarning, match="'third' was active and is deleted; 'default' is active now"):
        model.delete_adapter("third")
    method.assert_same(run(model, images), outputs["default"])
    assert model.get_model_status().active_adapters == ["default"]
    method.assert_same(run(model.unload(), images), run(make_vit(), images))


def test_deleting_an_inactive_an_unknown_and_the_last_adapter(two, method, make_vit, images, run):
    output = run(two, images)
    two.delete_adapter("other")
    method.assert_same(run(two, images), output)
    assert list(two.peft_config) == ["default"]
    assert not any(".other" in name for name, _ in two.named_parameters())
    with pytest.raises(ValueError, match="unknown does not exist"):
        two.delete_adapter("unknown")
    two.delete_adapter("default")
    method.assert_same(run(two.base_model.model, images), run(make_vit(), images))
    assert two.active_adapters == []


def test_mixed_batches_and_two_active_adapters_are_refused(two, images):
    with pytest.raises(AdapterError, match="asks for several adapters in one batch") as error:
        two(pixel_values=images, adapter_names=["default", "__base__"])
    assert "`adapter_names=['default', '__base__']`" in str(error.value)
    with pytest.raises(AdapterError, match=r"Cannot activate \['default', 'other'\] together"):
        two.base_model.set_adapter(["default", "other"])
    assert two.active_adapters == ["default"]


def test_disabled_and_unloaded_it_is_the_base_model(model, make_vit, images, run, snapshot):
    stock = make_vit()
    for p in stock.parameters():
        p.requires_grad_(False)
    before, expected = snapshot(stock), run(stock, images)
    assert not torch.allclose(run(model, images), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model, images), expected)
        assert torch.equal(run(model.train(), images), expected)
        assert all(m.training for m in model.get_base_model().vit.layers[0].children())
    unloaded = model.eval().unload()
    assert torch.equal(run(unloaded, images), expected)
    found = snapshot(unloaded)["modules"]
    assert {n: state[:4] for n, state in found.items()} == {n: state[:4] for n, state in before["modules"].items()}
    assert list(unloaded.state_dict()) == list(stock.state_dict())


def test_a_training_step_changes_the_adapter_alone(model, method, make_vit, images, run):
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapter_parameters(model, method).values(), lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(2):
        model(pixel_values=images, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], tensor) for n, tensor in frozen.items())
    assert sum(not torch.equal(parameters[n], tensor) for n, tensor in start.items()) > len(start) / 3
    with model.disable_adapter():
        assert torch.equal(run(model.eval(), images), run(make_vit(), images))


def test_merging_and_unmerging(model, merges, images, run):
    output = run(model, images)
    stock = {n: p.clone() for n, p in model.named_parameters() if ".bsr_params." not in n}
    model.merge_adapter()
    torch.testing.assert_close(run(model, images), output, atol=1e-6, rtol=1e-5)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(run(model, images), output)
    assert all(torch.equal(p, stock[n]) for n, p in model.named_parameters() if n in stock)


def test_merge_and_unload_gives_a_plain_model(model, method, merges, make_vit, images, run):
    output = run(model, images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = model.merge_and_unload()
    assert sum(issubclass(w.category, ReductionNotMergedWarning) for w in caught) == method.reduces
    if not method.reduces:
        torch.testing.assert_close(run(plain, images), output, atol=1e-6, rtol=1e-5)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in make_vit().named_modules()]


@HALF
def test_merging_in_half_precision(method, merges, make_vit, images, run, dtype):
    model = method.attach(make_vit().to(dtype), **({"keep_rate": 1.0} if method.reduces else {}))
    output = run(model, images.to(dtype)).float()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(model, images.to(dtype)).float(), output, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_nan_and_changes_nothing(model, method, merges, call):
    with torch.no_grad():
        list(adapter_parameters(model, method).values())[-1].view(-1)[0] = torch.nan
    base = {n: p.clone() for n, p in model.named_parameters() if ".bsr_params." not in n}
    with pytest.raises(AdapterError, match="NaN or infinite; nothing was merged"):
        getattr(model, call)(safe_merge=True)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_two_is_refused(two, merges, call, images, run):
    output = run(two, images)
    with pytest.raises(AdapterError, match=r"Cannot merge \['default', 'other'\] together"):
        getattr(two, call)(adapter_names=["default", "other"])
    assert torch.equal(run(two, images), output)


def test_saving_while_merged_and_unloading(model, merges, make_vit, images, run, tmp_path):
    output = run(model, images)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(make_vit(), tmp_path).eval(), images), output)
    assert torch.equal(run(model.unload(), images), run(make_vit(), images))


def test_deepcopy_is_independent(model, images, run, make_vit):
    output = run(model, images)
    reference = copy.deepcopy(model)
    assert torch.equal(run(reference, images), output)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.zero_()
    assert torch.equal(run(model, images), output)
    assert torch.equal(run(copy.deepcopy(model).unload(), images), run(make_vit(), images))
    assert torch.equal(run(model, images), output)


def test_deepcopy_goes_on_switching_and_deleting(two, method):
    plans = {name: two.base_model.plan(name).trained_blocks for name in ("default", "other")}
    reference = copy.deepcopy(two)
    reference.set_adapter("other")
    assert two.active_adapters == ["default"]
    assert {layer.active_adapters[0] for layer in two.get_layer_status()} == {"default"}
    reference.delete_adapter("default")
    assert list(two.peft_config) == ["default", "other"]
    assert two.base_model.plan().trained_blocks == plans["default"]
    assert reference.base_model.plan().trained_blocks == plans["other"]


@pytest.mark.parametrize("through", ["pickle", "torch"])
def test_pickle(model, images, run, make_vit, tmp_path, through):
    if through == "pickle":
        reference = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        reference = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(reference, images), run(model, images))
    assert reference.base_model.plan() == model.base_model.plan()
    assert torch.equal(run(reference.unload(), images), run(make_vit(), images))


@pytest.mark.sampled(3)
@HALF
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_base(method, make_vit, images, tmp_path, dtype, autocast_adapter_dtype):
    def trained_dtypes(model):
        return {p.dtype for p in adapter_parameters(model, method).values()}

    settings = {"autocast_adapter_dtype": autocast_adapter_dtype}
    expected_dtype = torch.float32 if autocast_adapter_dtype else dtype
    model = get_peft_model(make_vit().to(dtype), method.config(), **settings)
    assert trained_dtypes(model) == {expected_dtype}
    assert {p.dtype for n, p in model.named_parameters() if f".{method.container}." not in n} == {dtype}
    inputs = images.to(dtype)
    output = model.train()(pixel_values=inputs, labels=LABELS)
    assert output.logits.dtype == dtype
    output.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == expected_dtype for p in trained)
    model.add_adapter("second", method.config(), **settings)
    assert trained_dtypes(model) == {expected_dtype}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit().to(dtype), tmp_path, **settings).eval()
    assert trained_dtypes(loaded) == {expected_dtype}
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=inputs).logits, model.eval()(pixel_values=inputs).logits)


@pytest.mark.sampled(2)
@HALF
def test_half_precision_is_near_full(method, make_vit, images, run, dtype):
    settings = {"keep_rate": 1.0} if method.reduces else {}  # rounding may choose other tokens
    half = method.attach(make_vit().to(dtype), **settings)
    whole = method.attach(make_vit(), **settings)
    whole.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in half.state_dict().items()})
    found = run(half, images.to(dtype)).float()
    torch.testing.assert_close(found, run(whole.eval(), images), atol=5e-2, rtol=5e-2)


def test_autocast(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(pixel_values=images, labels=LABELS)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("seed", [0, 1])
def test_init_weights(method, make_vit, images, run, seed):
    if method.is_synqt:
        pytest.skip("SynQT's head takes the classifier's place: it does not start as the base model")
    stock = run(make_vit(), images)
    torch.manual_seed(seed)
    away = get_peft_model(make_vit(), method.config()).eval()
    start = get_peft_model(make_vit(), method.start_config()).eval()
    assert not torch.allclose(run(away, images), stock, atol=1e-2)
    assert torch.equal(run(start, images), stock) == (not method.reduces)
    if method.is_lora:
        updates = {name: p for name, p in start.named_parameters() if "lora_" in name}
        assert all((p.abs().sum() == 0) == ("lora_B" in name) for name, p in updates.items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(method, make_vit, images, use_reentrant, when):
    settings = {"dropout": 0.0, "drop_path": 0.0} if method.is_synqt else {}
    gradients = []
    for checkpointing in (False, True):
        base = make_vit()
        torch.manual_seed(2)
        if checkpointing and when == "before":
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = method.attach(base, **settings)
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()(pixel_values=images, labels=LABELS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-4, msg=name)


def test_two_forwards_before_a_backward(method, make_vit, images):
    settings = {"dropout": 0.0, "drop_path": 0.0} if method.is_synqt else {}
    model = method.attach(make_vit(), **settings).train()
    halves = [images, images.flip(0) * 2]
    sum(model(pixel_values=x, labels=LABELS).loss for x in halves).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for x in halves:
        model(pixel_values=x, labels=LABELS).loss.backward()
    assert together
    for name, expected in together.items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, atol=1e-6, rtol=1e-4, msg=name)


def test_merging_a_side_network_is_refused_with_the_reason_and_changes_nothing(
    model, method, images, run, snapshot, assert_unchanged
):
    if method.merges:
        pytest.skip("this method can be merged")
    before, expected = snapshot(model), run(model, images)
    for call in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(AdapterError, match=r"cannot be merged: its .* compute in addition to the backbone"):
            getattr(model, call)()
    assert_unchanged(model, before)
    assert torch.equal(run(model, images), expected)
