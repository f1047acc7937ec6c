"""Exported files compared with PyTorch and with the model without token reduction, on the CPU.

    python benchmarks/export.py --model <folder or Hub id of a ViT> --images <.parquet with a column "image">
    python benchmarks/export.py --formats executorch

Default: ViT-Ti/16 at 224 px with random weights and random images. The reduced and the unreduced file are timed in
turn; on a busy machine only the ratio is meaningful.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, ExportReport, export
from peft_bsr.data import to_pixels
from peft_bsr.exporting.formats import FORMATS

VARIANTS = {"onnx": ("onnx", None), "onnx-int8": ("onnx", "int8")} | {
    name: (name, None) for name in ("torch.export", "executorch")
}
SPEEDUP, DIFFERENCE = 1.5, 1e-4  # bars of "onnx"


def main() -> None:
    """Export, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: random weights")
    parser.add_argument("--images", help="real images for the column `same class` (default: random images)")
    parser.add_argument("--num-images", type=int, default=64, help="how many (default 64)")
    parser.add_argument("--formats", nargs="+", choices=VARIANTS, default=["onnx", "onnx-int8", "torch.export"])
    parser.add_argument("--keep-rate", type=float, default=0.5, help="default 0.5")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = get_peft_model(load_model(args.model), BSRConfig(keep_rate=args.keep_rate)).eval()
    images = load_images(args, model)
    rows = ["| file | MB | batch | outputs within | ms | unreduced, ms | ratio | images off by > 1e-4 | same class |"]
    rows.append("|" + "---|" * 9)
    for name in args.formats:
        format, quantize = VARIANTS[name]
        with tempfile.TemporaryDirectory() as folder:
            report = export(model, format, Path(folder) / f"vit{FORMATS[format].ending}", quantize=quantize)
            far, same = compare(model, report, images)
        bars = ("", "")
        if name == "onnx":
            bars = (bar(DIFFERENCE, report.max_difference <= DIFFERENCE), bar(SPEEDUP, report.speedup >= SPEEDUP))
        rows.append(
            f"| {name} | {report.file_bytes / 1e6:.1f} | {report.batch_size} | {report.max_difference:.1e}{bars[0]} "
            f"| {1e3 * report.seconds:.1f} | {1e3 * report.unreduced_seconds:.1f} | {report.speedup:.2f}{bars[1]} "
            f"| {far} of {len(images)} | {same} of {len(images)} |"
        )
        print(report.describe(), "\n", flush=True)
    print("\n".join(rows))
    print(
        f"\n{args.model or 'ViT-Ti/16, random weights'}, BSR keep {args.keep_rate}, CPU, {args.threads} threads, fp32; "
        f"last two columns: on {args.images or 'random images'}, against PyTorch. Median of 7 alternating runs."
    )


def load_model(name: str | None) -> torch.nn.Module:
    """The model before BSR, fp32."""
    if name is not None:
        return AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**sizes))


def load_images(args: argparse.Namespace, model: PeftModel) -> Tensor:
    """Preprocessed images [n, 3, H, W]."""
    if args.images is None:
        size = model.config.image_size
        return torch.randn(args.num_images, 3, size, size, generator=torch.Generator().manual_seed(1))
    processor = AutoImageProcessor.from_pretrained(args.model, backend="pil")
    rows = load_dataset("parquet", data_files=args.images, split="train").select(range(args.num_images))
    return to_pixels(rows["image"], processor)


@torch.no_grad()
def compare(model: PeftModel, report: ExportReport, images: Tensor) -> tuple[int, int]:
    """Number of images with a logit more than 1e-4 from PyTorch's, and number with the same class."""
    run, far, same = FORMATS[report.format].load(report.path), 0, 0
    for batch in images.split(report.batch_size):
        found, expected = run(batch)[0], model(pixel_values=batch).logits
        far += int(((found - expected).abs().amax(1) > DIFFERENCE).sum())
        same += int((found.argmax(1) == expected.argmax(1)).sum())
    return far, same


def bar(limit: float, is_met: bool) -> str:
    """The bar and whether it is met."""
    return f" (bar {limit:g}: {'met' if is_met else 'MISSED'})"


if __name__ == "__main__":
    main()
