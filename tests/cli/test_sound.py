"""Models of sound: commands that read images say so before they read anything, the others run."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import ASTConfig, PreTrainedConfig, Wav2Vec2Config, WhisperConfig

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
WHISPER = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
MODELS = {
    "ASTForAudioClassification": ASTConfig(**TINY, max_length=64, num_mel_bins=32),
    "WhisperForAudioClassification": WhisperConfig(**WHISPER, num_mel_bins=16, max_source_positions=64),
    "Wav2Vec2ForSequenceClassification": Wav2Vec2Config(**TINY, layerdrop=0.0),
}


def save(config: PreTrainedConfig, architecture: str, folder: Path) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_training_is_refused_before_anything_is_read(run, name, tmp_path):
    model = save(MODELS[name], name, tmp_path / "model")
    for command in (["train", "--model", model, "--output", tmp_path / "out"], ["compare", model]):
        code, out, error = run(*command, "--dataset", tmp_path / "no such folder")
        assert (code, out) == (2, "")
        assert "is a model of sound, and this command reads images. Train it in Python" in " ".join(error.split())
        assert "examples/sound.py" in error
    assert not (tmp_path / "out").exists()
    code, out, _ = run("inspect", model)
    assert code == 0 and "bsr" in out


def test_plans_say_where_their_options_go(run, tmp_path):
    model = save(MODELS["ASTForAudioClassification"], "ASTForAudioClassification", tmp_path / "model")
    code, _, notes = run("plan", model, "--memory", "1GB", "--limit", "1")
    assert code == 0 and "in Python, as in examples/sound.py" in " ".join(notes.split())
