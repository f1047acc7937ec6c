"""The example for sound runs as it is: on tones, and on a folder of WAV files with a tiny wav2vec 2.0."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

from tests.examples.test_short_examples import run

__all__ = ["run"]


def test_tones(run, tmp_path):
    printed = run("sound", "--max-steps", "40", "--output", "out")
    assert float(printed.split("test accuracy ")[1].split()[0]) > 0.8, "of three classes"
    assert "outputs differ by 0e+00" in printed
    names = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "preprocessor_config.json"} <= names


def test_a_folder_of_files(run, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_length": 2}
    config = Wav2Vec2Config(**sizes, conv_dim=[16, 16], conv_stride=[10, 8], conv_kernel=[10, 8])  # layerdrop 0.1
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "model")
    for name, amplitude in (("loud", 9000), ("soft", 900)):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for index in range(5):
            with wave.open(str(tmp_path / "sounds" / name / f"{index}.wav"), "wb") as file:
                file.setparams((2, 2, 8000, 0, "NONE", ""))
                numbers = np.random.default_rng(index).normal(0, amplitude, (2000, 2))
                file.writeframes(numbers.astype(np.int16).tobytes())
    arguments = ("--model", "model", "--max-steps", "2", "--output", "out")
    printed = run("sound", *arguments, "--data", "sounds")
    assert "test accuracy" in printed and "outputs differ by 0e+00" in printed
    with pytest.raises(SystemExit, match="no file folder/class/name"):
        run("sound", *arguments, "--data", "model")
