"""Sounds with transformers' Trainer: an audio spectrogram transformer, Whisper's encoder or wav2vec 2.0 under BSR.

    python examples/sound.py
    python examples/sound.py --model MIT/ast-finetuned-audioset-10-10-0.4593 --data sounds    # sounds/dog/1.wav, ...

Files are WAV, 16 bits, at the sampling rate of the model; the first channel counts. Without `--data` the classes are
tones in noise, without `--model` a tiny random AST trains.
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import get_peft_model
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    FeatureExtractionMixin,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import peft_bsr
from peft_bsr import BSRConfig, TrainabilityCallback
from peft_bsr.training.scores import compute_accuracy

TONES = {"low": 220, "middle": 880, "high": 3520}  # Hz


def read_sounds(folder: Path, rate: int) -> tuple[list[np.ndarray], list[str]]:
    """Waves and classes of all files, those of one class in one folder."""
    waves, classes = [], []
    for path in sorted(folder.glob("*/*.wav")):
        with wave.open(str(path)) as file:
            if (file.getframerate(), file.getsampwidth()) != (rate, 2):
                raise SystemExit(f"{path}: the model needs 16 bits at {rate} Hz; ffmpeg converts it.")
            numbers = np.frombuffer(file.readframes(file.getnframes()), np.int16)[:: file.getnchannels()]
        waves.append(numbers.astype(np.float32) / 2**15)
        classes.append(path.parent.name)
    if not waves:
        raise SystemExit(f"{folder}: no file folder/class/name.wav")
    return waves, classes


def make_sounds(count: int, rate: int) -> tuple[list[np.ndarray], list[str]]:
    """Tones of half a second in noise, and their classes."""
    random = np.random.default_rng(0)
    classes = [list(TONES)[index % len(TONES)] for index in range(count)]
    times = np.arange(rate // 2) / rate
    phases = random.uniform(0, 2 * np.pi, count)
    clean = [np.sin(2 * np.pi * TONES[name] * times + phase) for name, phase in zip(classes, phases, strict=True)]
    return [(0.3 * tone + random.normal(0, 0.1, len(tone))).astype(np.float32) for tone in clean], classes


def load_base(name: str | None, labels: list[str]) -> tuple[PreTrainedModel, FeatureExtractionMixin]:
    """The model with a new head for `labels`, and its feature extractor."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if name is not None:
        settings = {**names, "ignore_mismatched_sizes": True}
        if getattr(transformers.AutoConfig.from_pretrained(name), "layerdrop", 0):
            settings["layerdrop"] = 0.0  # it skips blocks at random, which BSR refuses
        extractor = AutoFeatureExtractor.from_pretrained(name)
        return AutoModelForAudioClassification.from_pretrained(name, **settings), extractor
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    config = ASTConfig(**sizes, **names, num_mel_bins=32, max_length=64, frequency_stride=8, time_stride=8)
    return ASTForAudioClassification(config), ASTFeatureExtractor(num_mel_bins=32, max_length=64)


def main() -> None:
    """Train, evaluate, save, and load again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or folder of a model of sound (default: a tiny random AST)")
    parser.add_argument("--data", type=Path, help="folder with a folder of WAV files for each class (default: tones)")
    parser.add_argument("--max-steps", type=int, default=60, help="training steps (default 60)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="default 3e-3")
    parser.add_argument("--output", type=Path, default=Path("outputs/sound"), help="default outputs/sound")
    args = parser.parse_args()
    transformers.set_seed(0)

    rate = AutoFeatureExtractor.from_pretrained(args.model).sampling_rate if args.model else 16_000
    waves, classes = read_sounds(args.data, rate) if args.data else make_sounds(120, rate)
    labels = sorted(set(classes))
    base, extractor = load_base(args.model, labels)
    features = extractor(waves, sampling_rate=rate, padding=True, return_tensors="pt")[base.main_input_name]
    rows = [
        {base.main_input_name: feature, "labels": labels.index(name)}
        for feature, name in zip(features, classes, strict=True)
    ]
    order = np.random.default_rng(1).permutation(len(rows))
    test, train = ([rows[i] for i in chosen] for chosen in np.split(order, [max(1, len(rows) // 5)]))

    base.save_pretrained(args.output / "base")  # the new head begins at random; the adapter refers to this folder
    base = type(base).from_pretrained(args.output / "base")
    model = get_peft_model(base, BSRConfig(trainable_blocks="last:75%"))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.max_steps,
        per_device_train_batch_size=8,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=compute_accuracy,
        callbacks=[TrainabilityCallback()],  # stops before the first step if something would not train
    )
    trainer.train()
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    model.save_pretrained(args.output / "adapter")
    extractor.save_pretrained(args.output / "adapter")

    again = peft_bsr.load(args.output / "adapter").to(model.device)
    inputs = {base.main_input_name: torch.stack([row[base.main_input_name] for row in test]).to(model.device)}
    with torch.no_grad():
        error = (again.eval()(**inputs).logits - model.eval()(**inputs).logits).abs().max()
    print(f"saved and loaded again: outputs differ by {error:.0e}")


if __name__ == "__main__":
    main()
