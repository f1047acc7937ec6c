"""Encoders of sound, beyond the contract."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_bsr import BSRConfig, UnsupportedModelError, record_routes

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from families import NO_REDUCTION, SUPPORTED, run_batch

BLOCKS = {"trainable_blocks": [1, 3]}


@pytest.mark.parametrize("keep_rate", [0.5, 1.0])
@pytest.mark.parametrize(("family", "name"), [("whisper", "encoder_layerdrop"), ("hubert", "layerdrop")])
def test_blocks_that_are_skipped_at_random_are_refused_with_what_to_do(family, name, keep_rate):
    model = SUPPORTED[family](**{name: 0.1})
    advice = rf"skips whole blocks at random \(LayerDrop, `{name}=0.1`\).*Load it with .*{name}=0.0"
    with pytest.raises(UnsupportedModelError, match=advice):
        get_peft_model(model, BSRConfig(keep_rate=keep_rate))


@pytest.mark.parametrize(("mode", "length"), [("full_view", 24), ("compact", 5)])
def test_a_text_decoder_is_left_alone_and_generates_from_the_reduced_encoder(mode, length):
    base = SUPPORTED["whisper_text"]()
    batch = run_batch(base)
    model = get_peft_model(base, BSRConfig(**BLOCKS, mode=mode))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".model.encoder." in name for name in trained)
    assert any("encoder.layer_norm" in name for name in trained)
    assert not model.base_model.spec.unread
    model(**batch, labels=torch.ones(2, 3, dtype=torch.int64)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    encoded = base.get_encoder()(batch["input_features"])
    assert encoded.last_hidden_state.shape == (2, length, 32)
    torch.testing.assert_close(model(**batch).logits, model(**{**batch, "encoder_outputs": encoded}).logits)
    without_sound = {"encoder_outputs": encoded, "decoder_input_ids": batch["decoder_input_ids"]}
    torch.testing.assert_close(model(**without_sound).logits, model(**batch).logits)
    with record_routes(model) as routes:
        assert len(model.generate(input_features=batch["input_features"], max_new_tokens=3)) == 2
    assert len(routes) == 3, "the encoder ran once"


def test_leading_blocks_draw_no_random_numbers():
    """Whisper's blocks call dropout as a function, with their own flag."""
    base = SUPPORTED["whisper"](activation_dropout=0.5)
    model = get_peft_model(base, BSRConfig(trainable_blocks=[2, 3], keep_rate=1.0)).train()
    block, seen = base.get_submodule(model.base_model.spec.blocks[1]), []
    block.register_forward_hook(lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output))
    logits = [model(**run_batch(base)).logits for _ in range(2)]
    assert torch.equal(*seen)
    assert not torch.equal(*logits), "those that train do"
    assert block.training, "the flag is the model's mode"


def test_padding_is_dropped_first():
    model = get_peft_model(SUPPORTED["wav2vec2_large"](), BSRConfig(**BLOCKS, reduction_blocks=[1], keep_rate=0.7))
    batch = run_batch(model.base_model.model)  # 25 tokens, of which the last sound has 18
    with record_routes(model.eval()) as routes:
        model(**batch)
    assert routes[-1][1].origins[1].tolist() == list(range(18))


def test_weights_that_the_module_around_them_reads_train_with_it():
    model = get_peft_model(NO_REDUCTION["wavlm"](), BSRConfig(**BLOCKS, keep_rate=1.0))
    model(**run_batch(model.base_model.model)).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert any("layers.3.attention.bsr_params.default.q_proj.weight" in name for name in gradients)
