"""What `model.base_model.explain()` says of each block: the plan, what is active, and why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_bsr import ALaSTConfig, BSRConfig, SynQTConfig

sys.path.insert(0, str(Path(__file__).parent))

from pairs import SUPPORTED, base_of, batch_of, make, step

pytestmark = pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning")
FROZEN = "    {}  frozen, outside of the graph"
NO_PLAN = "No plan is active: adapters are off, or plans are for training alone and its first forward makes one."


def explain(model):
    return model.base_model.explain().splitlines()


def test_the_plan_of_each_block():
    assert explain(make("vit", "exact")) == [
        "block  planned",
        FROZEN.format(0),
        "    1  trained, keeps 0.7 of the tokens (mid_block), attention and MLP lean (exact)",
        "    2  frozen, attention and MLP lean (exact)",
        "    3  trained, attention and MLP lean (exact), for the first 1 tokens only",
    ]
    packed = make("vit", "max", keep_rate=1.0, saved_activations="int8")
    assert explain(packed)[2] == "    1  trained, attention and MLP lean (max), activations in 8 bits"
    assert "lean" not in "".join(explain(make("vit", "off")))


def test_evaluation():
    model = make("vit", "exact")
    planned = explain(model)
    model.eval()
    assert explain(model) == [*planned, "nothing runs lean now: the model is in evaluation mode"]
    model(**batch_of(model))
    model.train()
    assert explain(model) == planned
    assert explain(make("vit", "off").eval()) == explain(make("vit", "off"))


def test_adapters_that_are_off():
    model = make("vit", "exact")
    planned = explain(model)
    with model.disable_adapter():
        assert explain(model)[0].startswith(NO_PLAN)
    assert explain(model) == planned


def test_alast_has_a_plan_from_its_first_step_on_in_training():
    model = get_peft_model(SUPPORTED["vit"](), ALaSTConfig()).train()
    assert explain(model)[0].startswith(NO_PLAN)
    model(**batch_of(model))
    assert explain(model)[0] == "block  planned"
    assert sum("keeps 0." in line for line in explain(model)) == 4
    assert any("attention and MLP lean (exact)" in line for line in explain(model))
    assert explain(model.eval())[0].startswith(NO_PLAN)


def test_synqt_reads_frozen_blocks():
    model = get_peft_model(SUPPORTED["vit"](), SynQTConfig())
    assert explain(model) == ["block  planned", *(FROZEN.format(i) for i in range(4))]


def test_what_the_test_at_attach_left_out():
    model = get_peft_model(SUPPORTED["wav2vec2"](), BSRConfig()).train()
    assert explain(model)[4].endswith("MLP lean (exact)") and "attention" not in explain(model)[4]
    assert explain(model)[5] == "left out when the adapter was attached:"
    assert explain(model)[6].startswith("  lean attention: the block is not taken apart")
    model = get_peft_model(SUPPORTED["vit"](hidden_act="sigmoid"), BSRConfig())
    assert explain(model)[-1] == "  lean mlp: the derivative of Sigmoid is not known"
    model = make("vit", "exact", {"attention_probs_dropout_prob": 0.2}, keep_rate=1.0)
    assert explain(model)[-1].startswith("  special tokens only in the last block: it differs")


def test_reasons_of_modules_come_without_a_forward_and_go_again():
    model = make("vit", "exact")
    planned, block = explain(model), base_of(model).vit.layers[2]
    gelu, block.mlp.activation_fn = block.mlp.activation_fn, nn.Softplus()
    handle = block.attention.q_proj.register_forward_hook(lambda *_: None)
    block.attention.v_proj = nn.Sequential(nn.Linear(32, 32).double())
    assert explain(model) == [
        *planned[:4],
        "       attention runs stock: Sequential runs in the place of a Linear",
        "       mlp runs stock: the derivative of Softplus is not known",
        planned[4],
    ]
    step(model)
    handle.remove()
    block.mlp.activation_fn, block.attention.v_proj = gelu, nn.Linear(32, 32).double()
    step(model)
    assert explain(model) == planned


def test_reasons_of_a_forward_come_with_it():
    model = make("vit", "exact", keep_rate=1.0)
    planned = explain(model)
    base_of(model).vit(**batch_of(model))
    assert explain(model) == [*planned, "       class token only runs stock: a part of the model was called by itself"]
    base_of(model).set_attn_implementation("eager")
    model(**batch_of(model), output_attentions=True)
    assert explain(model).count("       attention runs stock: attention weights are captured") == 3
    step(model)
    assert explain(model) == planned


def test_weights_in_another_dtype_run_lean():
    """PEFT holds adapters of a model in bfloat16 in fp32."""
    model = get_peft_model(SUPPORTED["vit"]().bfloat16(), BSRConfig()).train()
    model(**batch_of(model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert "runs stock" not in "".join(explain(model))
