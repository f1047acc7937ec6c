"""A vision-language model: BSR on its vision tower beside a LoRA on its language model.

    python examples/vision_language.py
    python examples/vision_language.py --model HuggingFaceTB/SmolVLM-256M-Instruct --steps 40 --learning-rate 1e-4

The model learns to name handwritten digits. Without `--model` a tiny random SmolVLM trains. Memory is what one batch
keeps for backward. Both adapters are saved, each in its own folder, and loaded again.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, SmolVLMConfig, SmolVLMForConditionalGeneration

from peft_bsr import BSRConfig
from peft_bsr.cost import saved_activations

sys.path.insert(0, str(Path(__file__).parent))
from two_towers import WORDS, Batch, digit_images

IMAGE_TOKEN, QUESTION = 19, 18  # of the tiny model
LANGUAGE = r".*(text_model|language_model).*\.(q_proj|v_proj)"
EVERYWHERE = r".*\.(q_proj|v_proj)"


def make_tiny() -> SmolVLMForConditionalGeneration:
    """A tiny random SmolVLM: an image of 64 patches takes 16 places in the text."""
    vision = {"hidden_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 96}
    vision |= {"image_size": 64, "patch_size": 8}
    text = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"intermediate_size": 96, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, scale_factor=2)
    return SmolVLMForConditionalGeneration(config)


def make_batch(name: str | None, first: int, count: int) -> Batch:
    """Questions with their images and answers; the answers are the labels."""
    images, digits = digit_images(first, count, size=64)
    if name is None:
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
        words = torch.tensor([[*[IMAGE_TOKEN] * 16, QUESTION, 2 + digit] for digit in digits])
        labels = words.masked_fill(words >= QUESTION, -100)
        return {"pixel_values": pixels[:, None] / 127.5 - 1, "input_ids": words, "labels": labels}
    processor = AutoProcessor.from_pretrained(name)
    talks = []
    for image, digit in zip(images, digits, strict=True):
        question = [{"type": "image", "image": image}, {"type": "text", "text": "Which digit is this?"}]
        answer = [{"type": "text", "text": WORDS[digit]}]
        talks.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    batch = dict(processor.apply_chat_template(talks, **options))
    is_text = batch["attention_mask"].bool() & (batch["input_ids"] != processor.tokenizer.pad_token_id)
    is_image = batch["input_ids"] == getattr(processor, "image_token_id", -1)
    return batch | {"labels": batch["input_ids"].masked_fill(~is_text | is_image, -100)}


def attach(base: nn.Module) -> tuple[PeftModel, PeftModel]:
    """A LoRA on the language model, and BSR on the vision tower beside it: the second model runs with both."""
    language = get_peft_model(base, LoraConfig(target_modules=LANGUAGE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a second adapter, which is meant here
        return language, get_peft_model(language, BSRConfig(trainable_blocks="last:2"), adapter_name="vision")


def measure(make: Callable[[], nn.Module], batch: Batch) -> dict[str, int]:
    """Bytes kept for backward by one batch, with the LoRA on the language model in each case."""

    def kept(model: nn.Module) -> int:
        return saved_activations(model.train(), lambda: model(**batch).loss)

    whole = get_peft_model(make(), LoraConfig(target_modules=LANGUAGE))
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "vision" in name or "visual" in name)
    return {
        "all of the tower": kept(whole),
        "LoRA in the tower": kept(get_peft_model(make(), LoraConfig(target_modules=EVERYWHERE))),
        "BSR in the tower": kept(attach(make())[1]),
        "a frozen tower": kept(get_peft_model(make(), LoraConfig(target_modules=LANGUAGE))),
    }


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Outputs in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**batch).logits


def main() -> None:
    """Print the memory of each way, train, save, load and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or folder of a vision-language model (default: a tiny random SmolVLM)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default 60)")
    parser.add_argument("--batch-size", type=int, default=10, help="default 10")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="default 1e-2")
    parser.add_argument("--output", type=Path, default=Path("outputs/vision_language"), help="output folder")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()

    def make() -> nn.Module:
        transformers.set_seed(0)
        return AutoModelForImageTextToText.from_pretrained(args.model) if args.model else make_tiny()

    batch = make_batch(args.model, 0, args.batch_size)
    for name, size in measure(make, batch).items():
        print(f"{size / 2**20:8.2f} MiB kept for backward with {name}")

    language, model = attach(make())
    print(f"adapter on `{model.base_model.part}`; " + model.base_model.explain().splitlines()[-1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    losses = []
    for step in range(args.steps):
        loss = model.train()(**make_batch(args.model, step * args.batch_size, args.batch_size)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in step {args.steps}")

    language.save_pretrained(args.output / "language")
    model.save_pretrained(args.output)  # in a folder with the adapter's name: vision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(make(), args.output / "language")
        again = PeftModel.from_pretrained(again, args.output / "vision", "vision")
    error = (logits_of(again, batch) - logits_of(model, batch)).abs().max()
    print(f"saved and loaded again: outputs differ by {error:.0e}")


if __name__ == "__main__":
    main()
