"""BSR in a training loop of your own, with Accelerate: one process or several, CPU or GPU, half precision.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py --mixed-precision bf16

It uses the images and weights of `quickstart.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from peft_bsr import BSRConfig, verify_trainability
from peft_bsr.data import collate, load_images, load_processor, put_aside, with_pixels
from peft_bsr.training import WARMUP_SHARE

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import find_model, load_base, make_parser, size_of


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="default 4")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps (default: by epochs)")
    parser.add_argument("--mixed-precision", default="no", help='"no", "bf16" or "fp16"')
    parser.add_argument("--output", type=Path, default=Path("outputs/accelerate"), help="default outputs/accelerate")
    return parser.parse_args()


def main() -> None:
    """Train, evaluate, save."""
    args = parse_arguments()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    transformers.set_seed(0)
    data = put_aside(load_images(args.dataset), validation_size=0)
    source, _ = find_model(args.model)
    processor = load_processor(source, size_of(args))
    base = load_base(source, data.labels)
    model = get_peft_model(base, BSRConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    verify_trainability(model, optimizer)  # raises an error if something would not train
    train, test = (
        DataLoader(with_pixels(images, processor), args.batch_size, shuffle=shuffle, collate_fn=collate)
        for images, shuffle in ((data.train, True), (data.test, False))
    )
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    total = args.max_steps or args.epochs * len(train)
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=round(WARMUP_SHARE * total), num_training_steps=total
    )

    step = 0
    for epoch in range(args.epochs):
        model.train()
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step >= total:
                break
        accelerator.print(f"epoch {epoch + 1}, step {step}: loss {loss:.3f}, {accuracy(accelerator, model, test):.3f}")
        if step >= total:
            break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output / "adapter")
        processor.save_pretrained(args.output / "adapter")
    accelerator.wait_for_everyone()
    accelerator.end_training()


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: torch.nn.Module, test: DataLoader) -> float:
    """Accuracy on the test images, over all processes."""
    model.eval()
    right = total = 0
    for batch in test:
        labels = batch.pop("labels")
        found, labels = accelerator.gather_for_metrics((model(**batch).logits.argmax(-1), labels))
        right, total = right + int((found == labels).sum()), total + len(labels)
    return right / total


if __name__ == "__main__":
    main()
