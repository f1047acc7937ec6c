"""torch.compile keeps what lean promises: bytes for backward, gradients, one graph, no compilation in later steps."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import (
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import peft_bsr
from peft_bsr import AdapterError, BSRConfig, LeanBlockWarning, MemoryBudgetWarning, MoEConfig, SynQTConfig
from peft_bsr.engine import warn_of_budget

PARTITIONED = "aot_eager_decomp_partition"  # eager kernels, and the partitioner that inductor uses
SIZES = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 384}
SIZES |= {"image_size": 112, "patch_size": 16, "num_labels": 5}  # 50 tokens
REDUCED = {"trainable_blocks": [1, 3], "reduction_blocks": [1], "keep_rate": 0.6}
EVERY = {"trainable_blocks": "every:1", "keep_rate": 1.0}
PLANS = {  # settings, and kept bytes to those of eager lean that are allowed
    "exact": (REDUCED | {"lean": "exact"}, 1.02),
    "max": (REDUCED | {"lean": "max"}, 1.05),
    "every block exact": (EVERY | {"lean": "exact"}, 1.02),
    "every block max": (EVERY | {"lean": "max"}, 1.05),
    "low-rank exact": (EVERY | {"lean": "exact", "trainable": "lora"}, 1.06),
    "low-rank max": (EVERY | {"lean": "max", "trainable": "lora"}, 1.05),
}
SOON = ("exact", "max", "low-rank exact")
CASES = [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in PLANS]
IMAGES, LABELS = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(settings, dropout=0.0):
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return get_peft_model(ViTForImageClassification(config), BSRConfig(**settings)).train()


def kept_bytes(loss: torch.Tensor, model: torch.nn.Module) -> int:
    """Bytes of all tensors that the graph behind `loss` holds, each storage once, without weights and images."""
    held: dict[int, int] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved")]
        values += getattr(node, "saved_tensors", ())
        for value in values:
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor):
                    held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    others = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), IMAGES)}
    return sum(size for storage, size in held.items() if storage not in others)


def step(model, run, autocast=False):
    """Bytes kept, loss and gradients of a training step."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = run(pixel_values=IMAGES, labels=LABELS).loss
    kept = kept_bytes(loss, model)
    loss.backward()
    return kept, loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, share=1e-5):
    torch.testing.assert_close(found[1], expected[1], rtol=share, atol=0)
    assert found[2].keys() == expected[2].keys()
    scale = max(float(gradient.abs().max()) for gradient in expected[2].values())
    for name, gradient in expected[2].items():
        torch.testing.assert_close(
            found[2][name], gradient, rtol=0, atol=share * scale, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_model(name):
    settings, allowed = PLANS[name]
    model = make(settings)
    expected = step(model, model)
    compiled = torch.compile(model, backend=PARTITIONED, fullgraph=True)
    found = step(model, compiled)
    assert_same(found, expected)
    assert found[0] <= allowed * expected[0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(step(model, compiled), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lean", ["exact", "max"])
def test_a_bias_of_pairs_on_fewer_tokens(lean):
    """The running block's route gathers the bias. In several image sizes: tests/export/test_compile.py."""
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
    base = Data2VecVisionForImageClassification(
        Data2VecVisionConfig(**SIZES, **rates, use_relative_position_bias=True, layer_scale_init_value=0.1)
    )
    for name, parameter in base.named_parameters():
        if "relative_position_bias" in name:  # zeros would hide a wrong gather
            torch.nn.init.normal_(parameter)
    plan = {"trainable_blocks": [1, 3], "reduction_blocks": [1], "keep_rate": 0.5, "lean": lean}
    model = get_peft_model(base, BSRConfig(**plan)).train()
    expected = step(model, model)
    assert "runs stock" not in model.base_model.explain()
    assert_same(step(model, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)
    kept = [line for line in model.base_model.explain().splitlines() if "attention runs stock: a compiler" in line]
    assert len(kept) == 3 and "scores" in kept[0] and "position biases" in kept[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "max" else pytest.mark.slow) for n in PLANS])
def test_block_by_block(name):
    settings, allowed = PLANS[name]
    model = make(settings)
    expected = step(model, model)
    for block in model.base_model.spec.blocks:
        model.get_base_model().get_submodule(block).compile(backend=PARTITIONED, fullgraph=True)
    found = step(model, model)
    assert_same(found, expected)
    assert found[0] <= allowed * expected[0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(step(model, model), expected)


@pytest.mark.slow
def test_without_regions_a_compiler_keeps_more():
    """The bounds above would fail if lean did nothing under a compiler."""
    model, stock = make(PLANS["max"][0]), make(REDUCED | {"lean": "off"})
    found = step(stock, torch.compile(stock, backend=PARTITIONED, fullgraph=True))
    assert found[0] > 3 * step(model, model)[0]


@pytest.mark.slow
def test_under_autocast():
    model = make(PLANS["exact"][0])
    expected = step(model, model, autocast=True)
    found = step(model, torch.compile(model, backend=PARTITIONED, fullgraph=True), autocast=True)
    assert found[0] <= 1.02 * expected[0]
    assert_same(found, expected, share=2e-2)


@pytest.mark.slow
def test_with_gradient_checkpointing():
    """Blocks that are checkpointed as a whole keep only their inputs."""
    model = make(PLANS["exact"][0])
    expected = step(model, model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = step(model, torch.compile(model, backend=PARTITIONED, fullgraph=True))
    assert_same(found, expected)
    assert found[0] < 0.5 * expected[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_hook_sees_the_half_that_runs_as_stock_modules(part):
    model = make(PLANS["exact"][0])
    expected, sums = step(model, model), []
    half = getattr(model.get_base_model().vit.layers[3], part)
    half.register_forward_hook(
        lambda module, args, output: sums.append((output[0] if isinstance(output, tuple) else output).sum())
    )
    found = step(model, torch.compile(model, backend=PARTITIONED, fullgraph=True))
    assert_same(found, expected)
    assert len(sums) == 1


@pytest.mark.slow
def test_the_last_block_gives_all_tokens_to_a_hook():
    model, shapes = make(PLANS["exact"][0]), []
    model.get_base_model().vit.layers[3].register_forward_hook(
        lambda module, args, output: shapes.append((output[0] if isinstance(output, tuple) else output).shape[1])
    )
    step(model, model)
    step(model, torch.compile(model, backend=PARTITIONED))
    assert len(shapes) == 2 and shapes[0] == shapes[1] > 1


@pytest.mark.slow
def test_another_adapter_is_another_plan():
    model = make(PLANS["exact"][0])
    model.add_adapter("other", BSRConfig(**PLANS["every block exact"][0], init_weights=False))
    compiled = torch.compile(model, backend=PARTITIONED, fullgraph=True)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        expected = step(model, model)
        assert_same(step(model, compiled), expected)


def test_int8_steps_aside_and_says_so():
    model = make(PLANS["exact"][0] | {"saved_activations": "int8"})
    plain = make(PLANS["exact"][0])
    expected = step(plain, plain)
    with pytest.warns(
        LeanBlockWarning, match="block 1 keeps activations in full, not in 8 bits as planned: torch.compile"
    ):
        found = step(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert_same(found, expected)
    assert model.base_model.explain().count("activations are kept in full: torch.compile traces the block") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", pytest.param("every block max", marks=pytest.mark.slow)])
def test_live_dropout_draws_the_same_in_backward(name):
    """By finite differences: the recomputation of a region must not draw new random numbers."""
    model = make(PLANS[name][0], dropout=0.3).double()
    compiled = torch.compile(model, backend=PARTITIONED, fullgraph=True)
    weight = next(p for n, p in model.named_parameters() if p.requires_grad and ".fc1." in n and p.dim() == 2)
    direction = torch.randn_like(weight)

    def loss():
        torch.manual_seed(5)
        return compiled(pixel_values=IMAGES.double(), labels=LABELS).loss

    value = loss()
    torch.manual_seed(6)
    value.backward()
    moved = []
    for change in (1e-4, -1e-4):
        with torch.no_grad():
            weight.add_(direction, alpha=change)
            moved.append(loss().item())
            weight.sub_(direction, alpha=change)
    assert (weight.grad * direction).sum().item() == pytest.approx((moved[0] - moved[1]) / 2e-4, rel=1e-4)


@pytest.mark.slow
def test_a_memory_budget_with_live_dropout_is_warned_of():
    model = make(PLANS["exact"][0], dropout=0.3)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        with pytest.warns(MemoryBudgetWarning, match="draws random numbers in training.*Set the budget to 1"):
            step(model, torch.compile(model, backend="aot_eager", fullgraph=True))
        warn_of_budget(model.eval())  # no random numbers, no warning


def test_regional_compilation():
    """As accelerate does it: a copy of the model around blocks that are compiled one by one."""
    from accelerate.utils import compile_regions

    model = make(PLANS["exact"][0])
    expected = step(model, model)
    regions = compile_regions(model, backend=PARTITIONED, fullgraph=True)
    found = step(model, regions)
    assert_same(found, expected)
    assert found[0] <= 1.02 * expected[0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(step(model, regions), expected)


def test_compile_makes_one_graph_and_leaves_no_trace():
    model, plain = make(PLANS["exact"][0]), make(PLANS["exact"][0])
    expected, state = step(plain, plain), torch.get_rng_state()
    assert peft_bsr.compile(model, inputs={"pixel_values": IMAGES, "labels": LABELS}, backend=PARTITIONED) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    with torch.compiler.set_stance("fail_on_recompile"):
        found = step(model, model)
    assert_same(found, expected)
    assert found[0] <= 1.02 * expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tasks", "synqt"])
def test_compile_of_other_methods(method):
    torch.manual_seed(0)
    tasks = BSRConfig(trainable_blocks=[3], tasks={"a": 3, "b": 2}, moe=MoEConfig(num_experts=4, top_k=1))
    config = tasks if method == "tasks" else SynQTConfig(dropout=0.0, drop_path=0.0)
    model = get_peft_model(ViTForImageClassification(ViTConfig(**SIZES)), config).train()
    batch = {"pixel_values": IMAGES, "labels": LABELS} | ({"task": "a"} if method == "tasks" else {})
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    peft_bsr.compile(model, inputs=batch, backend="aot_eager")
    with torch.compiler.set_stance("fail_on_recompile"):
        model(**batch).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_trainer_compiles(tmp_path):
    losses = {}
    for is_compiled in (False, True):
        model = make(PLANS["exact"][0])
        model.config.problem_type = "single_label_classification"  # else the first loss sets it: another graph
        torch._dynamo.utils.counters.clear()
        settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if is_compiled else {}
        args = TrainingArguments(
            str(tmp_path), max_steps=3, logging_steps=1, save_strategy="no", report_to="none", seed=1, **settings
        )
        rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]
        trainer = Trainer(model, args, train_dataset=rows * 8)
        trainer.train()
        losses[is_compiled] = [
            resume_point["loss"] for resume_point in trainer.state.log_history if "loss" in resume_point
        ]
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1) == is_compiled
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_compile_refuses_what_it_cannot_help():
    base = ViTForImageClassification(ViTConfig(**SIZES))
    with pytest.raises(AdapterError, match="has no adapter of peft_bsr"):
        peft_bsr.compile(base)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", CASES)
def test_inductor(name):
    settings, allowed = PLANS[name]
    model = make(settings)
    expected = step(model, model)
    found = step(model, torch.compile(model, fullgraph=True))
    assert_same(found, expected)
    assert found[0] <= allowed * expected[0]


def test_another_keep_rate_is_no_symbol():
    """A float that differs in the next compilation becomes symbolic, and tokens cannot be counted with a symbol."""
    for rate in (0.6, 0.4):
        model = make(REDUCED | {"keep_rate": rate})
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits)
