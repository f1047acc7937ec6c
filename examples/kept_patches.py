"""Draw which patches of photographs a pretrained model keeps with BSR attached, before any training.

    python examples/kept_patches.py
    python examples/kept_patches.py --model facebook/dinov2-base --keep-rate 0.7 my_photo.jpg

Without arguments: scikit-learn's two photographs, and the model of `examples/quickstart.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image, ImageOps
from quickstart import find_model
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.viz import draw_kept_tokens


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="files (default: scikit-learn's two photographs)")
    parser.add_argument("--model", help="Hub id or folder (default: DINOv2-small or its stand-in)")
    parser.add_argument("--keep-rate", type=float, default=0.5, help="patches kept at each reduction (default 0.5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/kept_patches.png"), help="picture")
    args = parser.parse_args()
    photographs = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in args.images]
    photographs = photographs or [Image.fromarray(image) for image in load_sample_images().images]
    source, _ = find_model(args.model)
    processor = AutoImageProcessor.from_pretrained(source)
    model = get_peft_model(
        AutoModelForImageClassification.from_pretrained(source, num_labels=2, ignore_mismatched_sizes=True),
        BSRConfig(keep_rate=args.keep_rate),
    ).eval()
    pixels = processor(photographs, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    shown = (pixels * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy().astype(np.float32)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(draw_kept_tokens(model, pixels, shown, args.output))


if __name__ == "__main__":
    main()
