"""Contrastive fine-tuning of a dual encoder (CLIP, SigLIP): its image tower under BSR, with the model's own loss.

    python examples/two_towers.py
    python examples/two_towers.py --model openai/clip-vit-base-patch32 --batches 40 --learning-rate 1e-5

Images are handwritten digits, texts "a photo of the digit seven". Without `--model` a tiny random CLIP trains. Memory
is what one batch of ten pairs keeps for backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, PreTrainedModel

from peft_bsr import BSRConfig
from peft_bsr.cost import saved_activations

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
Batch = dict[str, Tensor]


def make_tiny() -> CLIPModel:
    """A tiny random CLIP."""
    vision = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text |= {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 15, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=32))


@cache
def load_once() -> Bunch:
    """The digits that come with scikit-learn."""
    return load_digits()


def digit_images(first: int, count: int, size: int = 32) -> tuple[list[Image.Image], list[int]]:
    """Digits as RGB images, in turn one of each class, and their classes."""
    data = load_once()
    places = [np.flatnonzero(data.target == digit) for digit in range(10)]
    chosen = [places[i % 10][(first + i) // 10] for i in range(count)]
    grey = [Image.fromarray((16 - data.images[place]).astype(np.uint8) * 15) for place in chosen]
    return [image.convert("RGB").resize((size, size)) for image in grey], [int(data.target[i]) for i in chosen]


def to_batches(name: str | None, first: int, count: int) -> Iterator[Batch]:
    """Batches of ten pairs, each with one of every digit, as the model takes them."""
    processor = AutoProcessor.from_pretrained(name) if name else None
    for start in range(first, first + 10 * count, 10):
        images, digits = digit_images(start, 10)
        if processor is not None:
            texts = [f"a photo of the digit {WORDS[digit]}" for digit in digits]
            yield dict(processor(text=texts, images=images, return_tensors="pt", padding="max_length", truncation=True))
        else:
            pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
            words = torch.tensor([[0, 1 + digit, 15] for digit in digits])
            yield {"pixel_values": pixels / 127.5 - 1, "input_ids": words}


def loss_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The model's own contrastive loss."""
    return model(**batch, return_loss=True).loss


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Share of images whose own text of ten is the most similar."""
    best = torch.cat([model(**batch).logits_per_image.argmax(dim=1) for batch in batches])
    return float((best == torch.arange(10).repeat(len(batches))).float().mean())


def main() -> None:
    """Print the memory with and without BSR, train, save, load and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or folder of a CLIP or SigLIP (default: a tiny random CLIP)")
    parser.add_argument("--batches", type=int, default=100, help="training batches of ten pairs (default 100)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="default 2e-3")
    parser.add_argument("--output", type=Path, default=Path("outputs/two_towers"), help="output folder")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)

    base: PreTrainedModel = AutoModel.from_pretrained(args.model) if args.model else make_tiny()
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    train, test = list(to_batches(args.model, 0, args.batches)), list(to_batches(args.model, 10 * args.batches, 10))
    whole = saved_activations(base.train(), lambda: loss_of(base, train[0]))

    # the image tower is found by itself; its projection trains and is saved as a whole
    projection = [name for name, _ in base.named_children() if name == "visual_projection"]
    model = get_peft_model(base, BSRConfig(modules_to_save=projection or None)).train()
    kept = saved_activations(model, lambda: loss_of(model, train[0]))
    print(f"adapter on `{model.base_model.part}`, {model.get_nb_trainable_parameters()[0]:,} trained parameters")
    print(f"kept for backward: {whole / 2**20:.2f} MiB training all, {kept / 2**20:.2f} MiB with BSR")

    before = accuracy(model.eval(), test)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    for batch in train:
        loss = loss_of(model.train(), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = accuracy(model.eval(), test)
    print(f"loss {loss.item():.3f}; accuracy on 100 test images {before:.2f} before, {after:.2f} now")

    model.save_pretrained(args.output / "adapter")
    fresh = AutoModel.from_pretrained(args.model) if args.model else make_tiny()
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, args.output / "adapter").eval()
    with torch.no_grad():
        error = (loaded(**test[0]).logits_per_image - model(**test[0]).logits_per_image).abs().max()
    print(f"saved and loaded again: outputs differ by {error:.0e}")


if __name__ == "__main__":
    main()
