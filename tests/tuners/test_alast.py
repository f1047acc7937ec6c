"""ALaST: what a step trains, how budgets move, and that nothing of it is lost or left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipForImageClassification

from peft_bsr import ALaSTConfig, ConfigError, TrainabilityError, UnsupportedModelError
from peft_bsr.cost import saved_activations
from peft_bsr.engine import record_routes
from tests.reference.alast import importance, new_budget, token_counts

pytestmark = pytest.mark.sampled(2)

LABELS = torch.tensor([0, 2])


def attach(make_vit: Any, depth: int = 4, **settings: Any) -> PeftModel:
    papers = {"selection": "sample", "token_multiple": 1}
    return get_peft_model(make_vit(depth), ALaSTConfig(**papers | settings)).train()


def optimizer_of(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **settings})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> float:
    loss = model(pixel_values=images, labels=LABELS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "bsr_params" in name}


def blocks_in(names: Any) -> list[int]:
    return sorted({int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name})


@pytest.mark.parametrize("lean", ["off", "exact", "max"])
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_just_the_drawn_blocks_train(lean, trainable, make_vit, images):
    model = attach(make_vit, 6, lean=lean, trainable=trainable, trainable_blocks_per_step=2)
    optimizer = optimizer_of(model, weight_decay=0.5)
    seen = set()
    for _ in range(6):
        before = weights(model)
        model(pixel_values=images, labels=LABELS).loss.backward()
        drawn = model.base_model.schedule().selected
        assert blocks_in(n for n, p in model.named_parameters() if p.grad is not None) == drawn
        optimizer.step()
        optimizer.zero_grad()
        changed = [name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])]
        assert blocks_in(changed) == drawn and len(drawn) == 2
        assert any("classifier" in name for name in changed) and any("vit.layernorm" in name for name in changed)
        seen |= set(drawn)
    assert seen == set(range(6))


def test_gradients_equal_those_of_a_model_frozen_by_hand(make_vit, images):
    """All tokens kept, so that nothing but the freezing is at work."""
    model = attach(make_vit, initial_budget=1.0, budget_range=(1.0, 1.0), trainable_blocks_per_step=2)
    loss = model(pixel_values=images, labels=LABELS).loss
    loss.backward()
    drawn = model.base_model.schedule().selected
    plain = make_vit().train()
    for name, parameter in plain.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_("layers" not in parts or int(parts[2]) in drawn)
    expected = plain(pixel_values=images, labels=LABELS).loss
    expected.backward()
    assert torch.equal(loss, expected)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None and "embeddings" not in name:
            module, _, kind = name.rpartition(".")
            found = model.get_parameter(f"base_model.model.{module}.bsr_params.default.{kind}").grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["relative", "paper", "mean"])
def test_budgets_follow_the_blocks(reduction, make_vit, images):
    alpha = 0.002 if reduction == "paper" else 0.3
    model = attach(make_vit, initial_budget=0.9, delta_reduction=reduction, alpha=alpha)
    optimizer, schedule = optimizer_of(model, lr=0.05), model.base_model.schedule()
    seen: list[list[float]] = []

    def watch(block: nn.Module, args: Any, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        seen[-1].append(importance(args[0][:, 0].detach().numpy(), tokens[:, 0].detach().numpy(), reduction))

    for block in model.base_model.model.vit.layers:
        block.register_forward_hook(watch)
    budgets = [0.9] * 4
    for number in range(5):
        seen.append([])
        with record_routes(model) as routes:
            step(model, optimizer, images)
        assert schedule.budgets == pytest.approx(budgets, abs=1e-6)
        expected = token_counts([*schedule.budgets, 1.0], 17)[1:]
        found = dict.fromkeys(range(4), 17) | {index: route.num_tokens for index, route in routes}
        assert [found[i] for i in range(4)] == expected
        if number:
            budgets = [
                new_budget(b, n, o, alpha, 0.5, 1.0) for b, n, o in zip(budgets, seen[-1], seen[-2], strict=True)
            ]
    assert max(abs(b - 0.9) for b in budgets) > 0.01


def test_the_class_token_stays_and_dropped_patches_are_the_least_attended(make_vit, images):
    model = attach(make_vit, initial_budget=0.8, lean="off")
    model.set_attn_implementation("eager")  # gives its weights [B, H, N, N] back
    attended: list[Tensor] = []
    for block in model.get_base_model().vit.layers:
        block.attention.register_forward_hook(lambda _m, _a, output: attended.append(output[1][:, :, 0, 1:].mean(1)))
    with record_routes(model) as routes:
        model(pixel_values=images, labels=LABELS)
    assert [route.num_tokens for _, route in routes] == token_counts([0.8] * 5, 17)[1:]
    assert all(route.num_prefix == 1 for _, route in routes)
    alive = torch.arange(16).expand(2, -1)
    for (index, route), scores in zip(routes, attended, strict=True):
        kept = (alive[:, :, None] == route.origins[:, None]).any(2)
        assert kept.sum(1).tolist() == [route.num_tokens - 1] * 2, f"block {index} keeps what it did not get"
        assert all((scores[i][kept[i]].min() > scores[i][~kept[i]].max()) for i in range(2)), index
        alive = route.origins


def test_evaluation_is_the_plain_model_and_moves_nothing(make_vit, images, run):
    plain, model = make_vit(), attach(make_vit).eval()
    before = model.base_model.schedule().pack()
    assert torch.equal(run(model, images), run(plain, images))
    assert torch.equal(model.base_model.schedule().pack(), before)
    optimizer = optimizer_of(model.train())
    step(model, optimizer, images)
    before = model.base_model.schedule().pack()
    trained = run(model.eval(), images)
    assert torch.equal(model.base_model.schedule().pack(), before)
    merged = model.merge_and_unload()
    assert torch.equal(run(merged, images), trained)
    assert {k for k, _ in merged.named_modules()} == {k for k, _ in plain.named_modules()}
    assert type(merged.vit.layers[0]) is type(plain.vit.layers[0])


def test_disable_and_unload_give_the_base_model(make_vit, images, run):
    plain, model = make_vit(), attach(make_vit)
    step(model, optimizer_of(model), images)
    with model.disable_adapter():
        assert torch.equal(run(model.eval(), images), run(plain, images))
        model.train()
        torch.testing.assert_close(model(pixel_values=images, labels=LABELS).loss, plain.train()(images, LABELS).loss)
    assert torch.equal(run(model.unload().eval(), images), run(plain.eval(), images))


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    return [
        step(model, optimizer, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
        for seed in seeds
    ]


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_resumed_run_is_bit_equal(trainable, make_vit, tmp_path):
    settings = {"trainable_blocks_per_step": 2, "trainable": trainable, "seed": 3}
    torch.manual_seed(1)
    model = attach(make_vit, **settings)
    optimizer = optimizer_of(model)
    run_steps(model, optimizer, range(4))
    model.save_pretrained(tmp_path)
    moments = copy.deepcopy(optimizer.state_dict())
    expected = run_steps(model, optimizer, range(4, 8))

    resumed = PeftModel.from_pretrained(make_vit(), tmp_path, is_trainable=True, adapter_name="again").train()
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(moments)
    assert run_steps(resumed, optimizer, range(4, 8)) == expected
    assert resumed.base_model.schedule().pack().equal(model.base_model.schedule().pack())
    found, wanted = weights(resumed), weights(model)
    assert all(torch.equal(found[n.replace(".default.", ".again.")], tensor) for n, tensor in wanted.items())


def test_the_file_holds_weights_and_one_state(make_vit, images, tmp_path):
    model = attach(make_vit)
    step(model, optimizer_of(model), images)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert [k for k in keys if "bsr_params" not in k] == ["base_model.model.vit.layers.0.token_router.bsr_state"]
    half = PeftModel.from_pretrained(make_vit().half(), tmp_path).half()
    assert half.base_model.schedule().budgets == model.base_model.schedule().budgets


def test_the_selection_holds_when_adapters_are_enabled_in_the_middle_of_a_step(make_vit, images):
    """PEFT unfreezes all of an adapter that it enables or makes active."""
    model = attach(make_vit, trainable_blocks_per_step=2)

    def trained() -> list[int]:
        model(pixel_values=images, labels=LABELS).loss.backward()
        return blocks_in(name for name, p in model.named_parameters() if p.grad is not None)

    drawn = trained()
    assert drawn == model.base_model.schedule().selected
    with model.disable_adapter():
        model(pixel_values=images)
    assert trained() == drawn
    model.set_adapter("default")
    assert trained() == drawn


def test_accumulated_batches_share_a_draw_and_count_as_one(make_vit):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    states = []
    for parts in (1, 2):
        model = attach(make_vit, trainable_blocks_per_step=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # Adam makes much of rounding in tiny gradients
        for _ in range(3):
            drawn = []
            for pixels, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                (model(pixel_values=pixels, labels=targets).loss / parts).backward()
                drawn.append(model.base_model.schedule().selected)
            assert all(d == drawn[0] for d in drawn)
            optimizer.step()
            optimizer.zero_grad()
        states.append((model.base_model.schedule(), weights(model)))
    (whole, one), (split, two) = states
    assert (whole.step, whole.selected) == (split.step, split.selected)
    assert split.budgets == pytest.approx(whole.budgets, abs=1e-5)
    assert all(torch.allclose(tensor, two[name], atol=1e-5) for name, tensor in one.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, make_vit, images):
    losses = []
    for checkpointing in (False, True):
        model = attach(make_vit, trainable_blocks_per_step=2)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = optimizer_of(model)
        losses.append([step(model, optimizer, images) for _ in range(5)])
        assert model.base_model.schedule().step == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_leading_frozen_blocks_leave_the_graph(make_vit, images):
    kept = {}
    for selection in ("prefix", "sample"):
        model = attach(make_vit, 6, selection=selection, trainable_blocks_per_step=2, lean="off", seed=2)
        kept[selection] = saved_activations(model, lambda m=model: m(pixel_values=images, labels=LABELS).loss)
        drawn = model.base_model.schedule().selected
        assert [b.in_graph for b in model.base_model.plan().blocks] == [i >= drawn[0] for i in range(6)]
    assert model.base_model.schedule().selected[0] < 4
    assert kept["prefix"] < 0.6 * kept["sample"]


def test_an_optimizer_that_misses_blocks_is_told(make_vit, images):
    model = attach(make_vit, trainable_blocks_per_step=1, selection="sample")
    model(pixel_values=images, labels=LABELS).loss.backward()  # one block asks for gradients now
    optimizer = optimizer_of(model)
    with pytest.raises(TrainabilityError, match=r"blocks \[\d\] were to train in step \d"):
        for _ in range(20):
            step(model, optimizer, images)


def test_the_learning_rate_as_step_size(make_vit, images):
    model = attach(make_vit, preset="paper")
    assert model.peft_config["default"].alpha == "lr"
    optimizer, schedule = optimizer_of(model), model.base_model.schedule()
    step(model, optimizer, images)
    step(model, optimizer, images)  # the first change of importance is known behind this one
    with pytest.raises(ConfigError, match="`alpha='lr'` updates budgets by the learning rate, which is not set"):
        step(model, optimizer, images)
    schedule.learning_rate = 1e-2
    step(model, optimizer, images)


def test_the_papers_preset_trains_the_embeddings(make_vit, images, tmp_path):
    model = attach(make_vit, preset="paper", alpha=0.0)
    optimizer = optimizer_of(model)
    before = model.get_base_model().vit.embeddings.modules_to_save["default"].cls_token.clone()
    for _ in range(3):
        step(model, optimizer, images)
        assert all(block.in_graph for block in model.base_model.plan().blocks)
    after = model.get_base_model().vit.embeddings.modules_to_save["default"].cls_token
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert torch.equal(loaded(pixel_values=images).logits, model.eval()(pixel_values=images).logits)


def test_sequence_lengths_are_multiples(make_vit, images):
    model, lengths = attach(make_vit, token_multiple=4, budget_range=[0.2, 1.0]), set()
    optimizer = optimizer_of(model)
    for _ in range(6):
        with record_routes(model) as routes:
            step(model, optimizer, images)
        lengths |= {route.num_tokens for _, route in routes}
    assert lengths <= {4, 8, 12, 16, 17} and len(lengths) > 1


def test_alpha_zero_keeps_the_budgets(make_vit, images):
    model = attach(make_vit, alpha=0.0)
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer, images)
    assert model.base_model.schedule().budgets == [0.95] * 4
    assert attach(make_vit, preset="paper").base_model.schedule().budgets == [0.9] * 4


def test_base_weights_are_parked_and_adapters_live_side_by_side(make_vit, images, run):
    model = attach(make_vit)
    model.add_adapter("second", ALaSTConfig(trainable_blocks_per_step=1, init_weights=False, selection="topk"))
    optimizer = optimizer_of(model)
    step(model, optimizer, images)
    assert (model.base_model.schedule("default").step, model.base_model.schedule("second").step) == (1, 0)
    first = run(model.eval(), images)
    model.set_adapter("second")
    assert not torch.equal(run(model, images), first)
    model.train()
    step(model, optimizer_of(model), images)
    assert model.base_model.schedule("second").step == 1
    model.set_adapter("default")
    assert torch.equal(run(model.eval(), images), first)
    model.delete_adapter("second")
    assert torch.equal(run(model, images), first)


def test_a_copy_has_a_state_of_its_own(make_vit, images):
    model = attach(make_vit)
    optimizer = optimizer_of(model)
    step(model, optimizer, images)
    reference = copy.deepcopy(model)
    assert reference.base_model.schedule().pack().equal(model.base_model.schedule().pack())
    first = step(model, optimizer, images)
    assert reference.base_model.schedule().step == 1
    assert step(reference, optimizer_of(reference), images) == first


def test_an_adapter_loaded_for_use_draws_nothing(make_vit, images, tmp_path):
    model = attach(make_vit)
    step(model, optimizer_of(model), images)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path).train()
    loaded(pixel_values=images, labels=LABELS)
    assert loaded.base_model.schedule().step == 1
    assert not any(p.requires_grad for p in loaded.parameters())


def test_models_without_a_class_token():
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = SiglipConfig(vision_config={**vision, "image_size": 32, "patch_size": 8}, num_labels=3)
    model = get_peft_model(SiglipForImageClassification(config), ALaSTConfig(trainable_blocks_per_step=1)).train()
    optimizer = optimizer_of(model)
    pixels = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        model(pixel_values=pixels).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.base_model.schedule().step == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_blocks_per_step": 0}, "`trainable_blocks_per_step=0` must be an integer of at least 1"),
        ({"initial_budget": 0.4}, r"`initial_budget=0.4` must lie in `budget_range=\[0.5, 1.0\]`"),
        ({"budget_range": (0.9, 0.5)}, r"`budget_range=\[0.9, 0.5\]` must lie in \(0, 1\], the smallest budget first"),
        ({"budget_range": 0.5}, "`budget_range=0.5` must be two numbers"),
        ({"alpha": -1}, "`alpha=-1` must be a number from 0 to"),
        ({"alpha": "rate"}, "`alpha='rate'` must be a number"),
        ({"delta_reduction": "sum"}, "`delta_reduction='sum'` is unknown. Use one of 'relative', 'paper', 'mean'"),
        ({"selection": "best"}, "`selection='best'` is unknown. Use one of 'prefix', 'sample', 'topk'"),
        ({"token_multiple": 0}, "`token_multiple=0` must be an integer from 1 to 65536, or None"),
        ({"train_embeddings": 1}, "`train_embeddings=1` must be True, False or None"),
        ({"seed": 0.5}, "`seed=0.5` must be an integer"),
        ({"preset": "release"}, "`preset='release'` is unknown. Use 'paper' or None"),
        ({"lean": "yes"}, "`lean='yes'` is unknown"),
    ],
)
def test_bad_values(settings, message):
    with pytest.raises(ConfigError, match=message):
        ALaSTConfig(**settings)


def test_what_the_model_does_not_allow_changes_nothing(make_vit, snapshot, assert_unchanged):
    model = make_vit()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"asks for more than this model's 4 blocks\. Use at most 4"):
        get_peft_model(model, ALaSTConfig(trainable_blocks_per_step=5))
    assert_unchanged(model, before)
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="has parameters of its own"):
        get_peft_model(model, ALaSTConfig(train_embeddings=True))
    assert_unchanged(model, before)


def test_the_config_survives_a_round_trip(tmp_path):
    config = ALaSTConfig(preset="paper", trainable_blocks_per_step=3, seed=7)
    config.save_pretrained(tmp_path)
    again = ALaSTConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.alpha, again.delta_reduction, again.train_embeddings) == ("lr", "paper", True)
    assert (again.selection, ALaSTConfig().selection) == ("sample", "prefix")


def test_autocast_trains_in_half_precision(make_vit, images):
    model = attach(make_vit, trainable_blocks_per_step=2)
    optimizer, schedule = optimizer_of(model, lr=1e-3), model.base_model.schedule()
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixel_values=images, labels=LABELS).loss
        loss.backward()
        assert blocks_in(n for n, p in model.named_parameters() if p.grad is not None) == schedule.selected
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert schedule.step == 8 and all(delta == delta for delta in schedule.deltas)


@pytest.mark.slow
def test_blocks_compiled_one_by_one_take_the_same_steps(make_vit, images):
    losses = []
    for compiled in (False, True):
        model = attach(make_vit, trainable_blocks_per_step=2)
        if compiled:
            for block in model.get_base_model().vit.layers:
                block.compile(backend="eager")
        optimizer = optimizer_of(model, lr=1e-3)
        losses.append([step(model, optimizer, images) for _ in range(4)])
        assert model.base_model.schedule().step == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_skipped_step_draws_nothing(make_vit, images):
    """As a gradient scaler does when it finds an overflow."""
    model = attach(make_vit)
    optimizer, schedule = optimizer_of(model), model.base_model.schedule()
    step(model, optimizer, images)
    model(pixel_values=images, labels=LABELS).loss.backward()
    optimizer.zero_grad()
    model(pixel_values=images, labels=LABELS)
    assert schedule.step == 2
