"""`verify_trainability`: passes what trains, names what does not, and leaves no trace."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from peft_bsr import (
    AdapterError,
    ALaSTConfig,
    BSRConfig,
    MoEConfig,
    RoundedUpdatesWarning,
    SynQTConfig,
    TrainabilityCallback,
    TrainabilityError,
    UnsupportedModelError,
    verify_trainability,
)
from tests.training.test_trainer import make_trainer

pytestmark = pytest.mark.sampled(2)

CONFIGS = {
    "bsr": BSRConfig(trainable_blocks=[2, 3], reduction_blocks=[1]),
    "lora": BSRConfig(trainable_blocks=[1, 3], trainable="lora", saved_activations="int8", lean="max"),
    "dense": BSRConfig(trainable_blocks=[2], reduction_blocks=[], lean="off"),
    "moe": BSRConfig(trainable_blocks=[1, 3], tasks={"a": 3, "b": 2}, moe=MoEConfig(num_experts=4, top_k=1)),
    "tasks": BSRConfig(trainable_blocks=[1, 3], tasks={"a": 3, "b": 2, "c": 4}),
    "alast": ALaSTConfig(trainable_blocks_per_step=2, selection="sample"),
    "alast_paper": ALaSTConfig(trainable_blocks_per_step=1, preset="paper"),
    "synqt": SynQTConfig(keep_rate=0.5),
    "synqt_one_query": SynQTConfig(num_queries=1),  # its softmax over one query has no gradient
}


@pytest.fixture(params=sorted(CONFIGS))
def method(request):
    return request.param


def build(make_model, method: str = "bsr", **settings) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(make_model(**settings), copy.deepcopy(CONFIGS[method]))


def optimizer_of(model, kind=torch.optim.AdamW, **settings):
    return kind([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-3, **settings})


REFUSED = {("alast_paper", "vit_bare"): "`modules_to_save` cannot name 'embeddings'"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["bsr", "alast", "alast_paper"])
def test_what_trains_in_any_family_passes(make_model, family, method):
    """All but the listed ones are accepted; whoever refuses another must list it."""
    if (method, family) in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[method, family]):
            build(make_model, method, family=family)
        return
    model = build(make_model, method, family=family)
    verify_trainability(model, optimizer_of(model))


def traces(model, optimizer) -> dict:
    """All that a verification must leave bit for bit; tensors are copied."""
    schedules = [s for m in model.modules() for s in getattr(m, "schedules", {}).values()]
    return copy.deepcopy(
        {
            "weights": {n: p.detach() for n, p in model.named_parameters()},
            "asking": {n: p.requires_grad for n, p in model.named_parameters()},
            "gradients": {n: p.grad for n, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "modes": {n: m.training for n, m in model.named_modules()},
            "random": (torch.get_rng_state(), random.getstate()),
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "state": list(optimizer.state.values()),
            "schedules": [
                {k: v for k, v in vars(s).items() if not k.startswith(("_blocks", "_others"))} for s in schedules
            ],
        }
    )


def same(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_what_trains_passes_and_nothing_changes(make_model, method, kind, images):
    model = build(make_model, method)
    settings = {"fused": True} if kind is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = optimizer_of(model, kind, **settings)
    for steps in range(2):  # fresh, and with a state and gradients
        before = traces(model, optimizer)
        verify_trainability(model, optimizer)
        after = traces(model, optimizer)
        assert {name: same(after[name], before[name]) for name in before} == dict.fromkeys(before, True), steps
        model.train()
        named = {"task_ids": [0, 1]} if method in ("moe", "tasks") else {}
        output = model(pixel_values=images, **named).logits
        loss = sum(t.square().sum() for t in output.values()) if named else output.square().sum()
        loss.backward()
        optimizer.step()


def test_every_family_passes(family, make_model):
    model = build(make_model, family=family)
    verify_trainability(model, optimizer_of(model))


def test_a_batch_of_the_users_and_the_models_own_loss(make_model, images):
    model = build(make_model)
    verify_trainability(model, optimizer_of(model), {"pixel_values": images, "labels": torch.tensor([0, 1])})
    with pytest.raises(TrainabilityError, match="`batch` holds no images"):
        verify_trainability(model, batch={"pixel_values": images[:0]})
    with pytest.raises(TrainabilityError, match="the loss is nan"):
        verify_trainability(model, batch={"pixel_values": images * float("nan")})


def test_as_accelerate_prepares_it_and_with_a_warm_up(make_model, method):
    model = build(make_model, method)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # begins at 0
    model, optimizer, _ = Accelerator(cpu=True, mixed_precision="bf16").prepare(model, optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == 0
    verify_trainability(model, optimizer)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(make_model, use_reentrant):
    model = build(make_model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    verify_trainability(model, optimizer_of(model))


def test_a_classifier_that_begins_at_zero_hides_nothing(make_model):
    base = make_model()
    torch.nn.init.zeros_(base.classifier.weight)
    model = get_peft_model(base, BSRConfig(trainable_blocks=[2, 3]))
    verify_trainability(model, optimizer_of(model))


def refused(model, optimizer=None, batch=None) -> str:
    with pytest.raises(TrainabilityError) as error:
        verify_trainability(model, optimizer, batch)
    return str(error.value)


BLOCK = "base_model.model.vit.layers.{}.mlp.fc1"


def test_a_tensor_that_the_optimizer_does_not_hold(make_model, method):
    model = build(make_model, method)
    held = [p for p in model.parameters() if p.requires_grad]
    text = refused(model, torch.optim.SGD(held[:-1], lr=0.1))
    last = [name for name, p in model.named_parameters() if p is held[-1]]
    assert text.startswith(
        f"PeftModel: {last[0]!r} are meant to train, but the optimizer does not hold them. Create the"
    )


def test_a_tensor_that_asks_for_no_gradient(make_model):
    model = build(make_model)
    optimizer = optimizer_of(model)
    weight = model.get_submodule(BLOCK.format(2)).bsr_params["default"].weight.requires_grad_(False)
    assert (
        f"'{BLOCK.format(2)}.bsr_params.default.weight' are meant to train, but have `requires_grad=False`"
        in refused(model, optimizer)
    )
    assert not weight.requires_grad


def test_all_of_it_frozen(make_model):
    model = build(make_model)
    model.requires_grad_(False)
    text = refused(model)
    assert "the loss does not depend on a parameter that requires gradients" in text
    assert "more are meant to train, but have `requires_grad=False`" in text


def test_a_tensor_that_gets_no_gradient(make_model):
    model = build(make_model)
    head = model.get_submodule("base_model.model.classifier")
    head.forward = lambda tokens: head.base_layer(tokens)  # a wrapper that goes past the trained copy
    assert "'base_model.model.classifier.bsr_params.default.weight' are meant to train, but get no gradient" in refused(
        model, optimizer_of(model)
    )


@pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning")  # of the hook
def test_a_gradient_of_zeros_and_one_that_is_not_a_number(make_model):
    model = build(make_model)
    layer = model.get_submodule(BLOCK.format(3))
    layer.register_forward_hook(lambda m, args, output: output * 0.0)
    assert f"'{BLOCK.format(3)}.bsr_params.default.weight' get a gradient of zeros only" in refused(model)
    model = build(make_model)
    weight = model.get_submodule(BLOCK.format(3)).bsr_params["default"].weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    assert f"'{BLOCK.format(3)}.bsr_params.default.weight' get a gradient that is NaN or infinite" in refused(model)


def test_a_step_that_changes_nothing(make_model):
    model = build(make_model)
    assert "are not changed by the optimizer's step" in refused(model, optimizer_of(model, lr=0.0))
    tiny = build(make_model).to(torch.bfloat16)
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter)  # away from zero, which any step would leave
    text = refused(tiny, optimizer_of(tiny, lr=1e-9))  # lost in rounding
    assert "are not changed by the optimizer's step" in text


@pytest.mark.parametrize("rate", [1e-2, 1e-5])
def test_updates_that_low_precision_rounds_away(make_model, rate):
    """The shares are those of a literal step of SGD; above a half there is a warning that names the module."""
    model = build(make_model).to(torch.bfloat16)
    optimizer = optimizer_of(model, torch.optim.SGD, lr=rate)
    generator = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).bfloat16(), "labels": torch.tensor([0, 1])}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RoundedUpdatesWarning)
        shares = verify_trainability(model, optimizer, batch)
    model.train()(**batch).loss.backward()
    for name, share in shares.items():
        lost = changed = 0
        for weight in (p for n, p in model.named_parameters() if n.rpartition(".")[0] == name):
            moved = (weight.float() - rate * weight.grad.float() != weight) & (weight.grad != 0)
            lost += int((moved & (weight - rate * weight.grad == weight)).sum())
            changed += int(moved.sum())
        assert share == pytest.approx(lost / changed, abs=0.01)
    assert shares.keys() == {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert min(shares.values()) < 0.5 if rate == 1e-2 else max(shares.values()) > 0.9
    worst = max(shares, key=lambda name: shares[name])
    assert [worst in str(w.message) for w in caught] == ([True] if shares[worst] > 0.5 else [])


def test_no_updates_are_rounded_away_in_float32_or_with_stochastic_rounding(make_model):
    model = build(make_model)
    assert verify_trainability(model, optimizer_of(model, lr=1e-6)) == {} == verify_trainability(model)
    model = model.to(torch.bfloat16)
    optimizer = optimizer_of(model, lr=1e-3)
    optimizer.bf16_stochastic_round = True  # as torchao's optimizers have it
    assert verify_trainability(model, optimizer) == {}


def test_a_frozen_tensor_that_would_change_or_decay(make_model):
    model = build(make_model)
    name = "base_model.model.vit.layers.2.mlp.fc1.base_layer.weight"
    head = "base_model.model.vit.layers.0.mlp.fc1.weight"
    model.get_parameter(head).requires_grad_(True)
    assert f"'{head}' are frozen in the plan, but require gradients" in refused(model, optimizer_of(model))
    model.get_parameter(head).requires_grad_(False)
    everything = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert "are frozen, but the optimizer holds them with weight decay" in refused(model, everything)
    verify_trainability(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0))
    model = build(make_model, "dense")  # lean blocks do not call their layers
    layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
    layer.forward = lambda tokens: layer.bsr_params["default"](tokens) + layer.base_layer(tokens)
    layer.base_layer.weight.requires_grad_(True)
    assert f"'{name}' are frozen in the plan, but the optimizer's step would change them" in refused(
        model, optimizer_of(model, torch.optim.SGD)
    )


def test_a_frozen_block_in_the_graph(make_model):
    model = build(make_model, "dense")
    block = model.base_model.model.vit.layers[1]
    block.layernorm_before.register_forward_pre_hook(lambda m, args: (args[0].detach().requires_grad_(),))
    assert "'vit.layers.1 (" in refused(model)
    assert "are outside of the graph in the plan, but keep activations for backward" in refused(model)


def test_a_model_without_an_adapter_or_with_a_disabled_one(make_model):
    with pytest.raises(AdapterError, match="has no adapter of peft_bsr"):
        verify_trainability(make_model())
    model = build(make_model)
    with model.disable_adapter(), pytest.raises(AdapterError, match="the adapter is disabled"):
        verify_trainability(model)


def test_an_adapter_loaded_for_use(make_model, method, tmp_path):
    build(make_model, method).save_pretrained(tmp_path)
    assert "use `is_trainable=True`" in refused(PeftModel.from_pretrained(make_model(), tmp_path))
    model = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    verify_trainability(model, optimizer_of(model))


def test_the_trainer_stops_before_the_first_step(make_model, tmp_path):
    model = build(make_model)
    trainer = make_trainer(model, tmp_path, max_steps=2, save_strategy="no", eval_strategy="no")
    trainer.add_callback(TrainabilityCallback())
    model.get_submodule(BLOCK.format(2)).bsr_params["default"].weight.requires_grad_(False)
    with pytest.raises(TrainabilityError, match=r"layers\.2\.mlp\.fc1.* have `requires_grad=False`"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_trainer_takes_the_same_steps_with_the_callback(make_model, tmp_path):
    ends = []
    for callbacks in ([], [TrainabilityCallback()]):
        model = build(make_model, "alast")
        trainer = make_trainer(model, tmp_path, max_steps=3, save_strategy="no", eval_strategy="no", warmup_steps=2)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        ends.append(model.state_dict())
    assert same(ends[1], ends[0])


def test_ddp_takes_no_part(make_model, tmp_path):
    """Its own forward would begin to reduce gradients, in one process perhaps alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(build(make_model))
        wrapped.forward = lambda **_: pytest.fail("DDP's forward was called")
        verify_trainability(wrapped, optimizer_of(wrapped))
    finally:
        dist.destroy_process_group()
