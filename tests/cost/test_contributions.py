"""What blocks contribute is what autograd says, the model is left as it was, and the search finds the best set."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass

import pytest
import torch
from peft import get_peft_model
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, ConfigError
from peft_bsr.cost import Contributions, Setup, contributions, estimate, plan_for_budget
from peft_bsr.cost.proxy import resolve_narrow
from peft_bsr.cost.selection import _Search, _Tokens, best_set
from peft_bsr.cost.ways import tokens_of
from peft_bsr.tuners.base.layer import find_controllers
from peft_bsr.viz import draw_contributions

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
TINY |= {"image_size": 32, "patch_size": 8, "num_labels": 3}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
CHECK = {"batches": 2, "batch_size": 4, "progress": False}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**TINY)).train()


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(10, 3, 32, 32, generator=generator)
    return [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)]


def batches_of(samples):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:8].tolist()
    for half in (order[:4], order[4:]):
        yield {name: torch.stack([samples[i][name] for i in half]) for name in samples[0]}


def squared(gradient):
    return float(gradient.double().square().sum())


def test_sensitivities_are_the_squares_of_autograd(vit, samples):
    found = contributions(vit, samples, epochs=0, **CHECK)
    expected = [0.0] * 4
    for batch in batches_of(samples):
        vit.zero_grad()
        vit.eval()(**batch).loss.backward()
        for i, block in enumerate(vit.vit.layers):
            expected[i] += sum(squared(p.grad) for p in block.parameters()) / 2
    assert found.of_blocks() == pytest.approx(expected, rel=1e-5)
    assert found.kind == "sensitivity" and found.images == 8
    last = vit.vit.layers[3]
    names = {"attention.output", "attention.query", "mlp.0", "norm2"}
    assert names <= set(found.whole[3]) and names - set(found.low_rank[3]) == {"norm2"}
    before, vit_grad = found.whole[3]["mlp.0"], 0.0
    for batch in batches_of(samples):
        vit.zero_grad()
        vit(**batch).loss.backward()
        vit_grad += sum(squared(p.grad) for p in last.mlp.fc1.parameters()) / 2
    assert before == pytest.approx(vit_grad, rel=1e-5)
    parts = found.of_parts()[3]
    assert sum(parts.values()) == pytest.approx(found.of_blocks()[3]) and set(parts) == {"attention", "mlp"}


def test_a_low_rank_update_counts_with_what_is_expected_over_its_draw(vit, samples):
    found = contributions(vit, samples, epochs=0, **CHECK)
    model = get_peft_model(copy.deepcopy(vit), BSRConfig(trainable_blocks=[1], reduction_blocks=[], trainable="lora"))
    model.eval()
    pairs = [m for _, m in model.named_modules() if hasattr(m, "lora_A")]
    draws, total = 12, 0.0
    for seed in range(draws):
        torch.manual_seed(seed)
        for pair in pairs:
            torch.nn.init.kaiming_uniform_(pair.lora_A, a=5**0.5)
        for batch in batches_of(samples):
            model.zero_grad()
            model(**batch).loss.backward()
            total += sum(squared(pair.lora_B.grad) for pair in pairs) / 2 / draws
            assert all(pair.lora_A.grad is None or not pair.lora_A.grad.any() for pair in pairs)
    assert len(pairs) == len(found.low_rank[1]) == 6
    assert found.of_blocks("lora")[1] == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize("kind", ["sensitivity", pytest.param("trial", marks=pytest.mark.slow)])
def test_the_model_is_bit_for_bit_as_it_was(kind, vit, samples):
    vit.vit.embeddings.requires_grad_(False)
    vit.classifier.weight.grad = torch.ones_like(vit.classifier.weight)
    stepped = []
    vit.classifier.bias.register_post_accumulate_grad_hook(stepped.append)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    asks = {name: p.requires_grad for name, p in vit.named_parameters()}
    forwards = {name: vars(m).get("forward") for name, m in vit.named_modules()}
    state = torch.random.get_rng_state()
    found = contributions(vit, samples, kind=kind, **CHECK)
    assert found.depth == 4 and sum(found.of_blocks()) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    assert {name: p.requires_grad for name, p in vit.named_parameters()} == asks
    assert {name: vars(m).get("forward") for name, m in vit.named_modules()} == forwards
    assert vit.training and not find_controllers(vit) and not stepped
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [n for n, p in vit.named_parameters() if p.grad is not None] == ["classifier.weight"]
    assert torch.equal(vit.classifier.weight.grad, torch.ones_like(vit.classifier.weight))


def test_files_and_pictures(vit, samples, tmp_path):
    found = contributions(vit, samples, epochs=0, **CHECK)
    assert Contributions.load(found.save(tmp_path / "found.json")) == found
    assert draw_contributions(found, tmp_path / "found.png").stat().st_size > 1000
    for text in ("{", "[]", json.dumps({"kind": "sensitivity", "whole": [{}], "low_rank": [], "images": 1})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=r"holds no contributions .* Measure them again"):
            Contributions.load(tmp_path / "bad.json")


def test_numbers_that_are_not_finite_are_refused(vit, samples, tmp_path, monkeypatch):
    text = Contributions("trial", [{"block": "much"}], [{"block": 1.0}], 8)
    with pytest.raises(ConfigError, match="holds no contributions"):
        Contributions.load(text.save(tmp_path / "text.json"))
    wrong = Contributions("trial", [{"block": 1.0}] * 2, [{"block": 1.0}, {"block": float("nan")}], 8)
    with pytest.raises(ConfigError, match="some blocks have no finite number"):
        Contributions.load(wrong.save(tmp_path / "nan.json"))
    monkeypatch.setattr(
        "peft_bsr.cost.block_contributions.gains_of_trials", lambda *a, **k: (wrong.whole, wrong.low_rank)
    )
    with pytest.raises(ConfigError, match="the contributions of block 1 are not finite"):
        contributions(vit, samples, kind="trial", **CHECK)


def test_a_plan_needs_a_gain():
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**{**TINY, "num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match="`contributions` has no gain above 0"):
        plan_for_budget(model, "1GB", contributions=found_of([-1.0, 0.0]))


def test_a_model_without_tokens_is_planned_by_contribution():
    with torch.device("meta"):
        model = SwinForImageClassification(SwinConfig(**SWIN))
    plans = plan_for_budget(model, "1GB", batch_size=2, contributions=found_of([1.0, 2.0, 3.0]))
    assert [plan.config.trainable_blocks for plan in plans] == ["every:1"] * 2
    less = plans[0].estimate.total_bytes
    for plan in plan_for_budget(model, less, batch_size=2, contributions=found_of([1.0, 2.0, 3.0])):
        assert plan.config.reduction_blocks == [] and plan.config.saved_activations == "full"


def test_bad_arguments_are_told_at_once(vit, samples):
    with pytest.raises(ConfigError) as error:
        contributions(vit, samples[:1], batches=0, kind="guess", epochs=True)
    for word in ("`batches=0`", "`epochs=True`", "`kind='guess'`", "1 samples"):
        assert word in str(error.value)
    with pytest.raises(ConfigError, match="gives no loss"):
        contributions(vit, [{"pixel_values": s["pixel_values"]} for s in samples], **CHECK)
    with pytest.raises(ConfigError, match="has an adapter"):
        contributions(get_peft_model(vit, BSRConfig()), samples)


def test_the_knapsack_is_the_best_of_all_sets():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        values = torch.rand(6, generator=generator).tolist()
        weights = torch.randint(0, 5, (6,), generator=generator).tolist()
        capacity = int(torch.randint(0, 14, (1,), generator=generator))
        sets = [s for k in range(7) for s in itertools.combinations(range(6), k)]
        fitting = [s for s in sets if sum(weights[i] for i in s) <= capacity]
        best = max(sum(values[i] for i in s) for s in fitting)
        chosen = best_set(values, weights, capacity)
        assert chosen in fitting and sum(values[i] for i in chosen) == pytest.approx(best)


GAINS = [5.0, 8.0, 9.0, 3.0]


def found_of(gains):
    return Contributions("sensitivity", [{"block": g} for g in gains], [{"block": g} for g in gains], 1)


def every_set(depth):
    return [s for k in range(1, depth + 1) for s in itertools.combinations(range(depth), k)]


@dataclass
class Took:
    """What a search reads of an estimate."""

    total_bytes: float
    saved_bytes: float


def took_of(blocks, tokens):
    """Bytes that are no sum: two blocks side by side, and whatever else the hash says, take up to 1 % more."""
    crossed = sum(10 * tokens.shares[i] for i in range(blocks[0], 6))
    more = sum(3 * tokens.shares[i] for i in blocks)
    odd = (hash(blocks) % 10) / 10
    return Took(100 + crossed + more + 7 * len(blocks) + odd, crossed + more)


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_best_of_all_sets_and_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    gains = (10 * torch.rand(6, generator=generator)).tolist()
    tokens = [_Tokens({}, "", [1.0] * 6), _Tokens({}, "", [1, 1, 0.75, 0.5, 0.5, 0.5]), _Tokens({}, "", [0.3] * 6)]
    capacity = 100 + 110 * float(torch.rand(1, generator=generator))
    tried = []

    def measure(way):
        tried.append(way)
        return took_of(*way)

    choice = _Search(gains, tokens, capacity, lambda blocks, seen: (blocks, seen), measure).run()
    pairs = itertools.product(every_set(6), tokens)
    fitting = [pair for pair in pairs if took_of(*pair).total_bytes <= capacity]
    shares = [sum(gains[i] * seen.shares[i] for i in blocks) / sum(gains) for blocks, seen in fitting]
    if not fitting:
        assert choice is None
        return
    way, share = choice
    assert took_of(*way).total_bytes <= capacity
    assert share == pytest.approx(max(shares))
    assert len(tried) <= 26


@pytest.mark.slow
def test_the_search_finds_the_best_of_all_sets_that_are_run_dry():
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**{**TINY, "hidden_size": 64, "intermediate_size": 256}))
    setup = Setup(batch_size=8, optimizer="adamw_fused")
    rows = []
    for fields, _ in tokens_of(resolve_narrow(model, BSRConfig()).spec):
        for blocks in every_set(4):
            took = estimate(model, BSRConfig(trainable_blocks=list(blocks), lean="max", **fields), setup)
            shares = [sum(pair) / 2 / 17 for pair in took.plan.token_counts(17, 1)]
            rows.append((sum(GAINS[i] * shares[i] for i in blocks) / sum(GAINS), took.total_bytes))
    memory = int(0.6 * max(size for _, size in rows) * 1.05)
    best = max(value for value, size in rows if size * 1.05 <= memory)
    plans = plan_for_budget(model, memory, setup, contributions=found_of(GAINS))
    chosen = [plan for plan in plans if plan.config.trainable == "full"]
    assert max(p.share for p in chosen if p.config.saved_activations == "full") == pytest.approx(best)


def test_plans_by_contribution_fit_and_say_what_they_gain():
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**{**TINY, "num_hidden_layers": 2}))
    plans = plan_for_budget(model, "1GB", batch_size=8, contributions=found_of(GAINS[:2]))
    assert sorted(plan.config.trainable for plan in plans) == ["full", "lora"]
    assert plans[0].estimate.training_flops <= plans[1].estimate.training_flops, "of the same share"
    assert all(plan.config.trainable_blocks == "every:1" and plan.config.lean == "exact" for plan in plans)
    assert [plan.share for plan in plans] == [1.0, 1.0] and "100% of the contributions" in plans[0].describe()
    with pytest.raises(ConfigError, match="`contributions` are of 3 blocks"):
        plan_for_budget(model, "1GB", contributions=found_of(GAINS[:3]))
