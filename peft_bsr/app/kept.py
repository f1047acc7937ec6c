"""The second tab: which patches of an image a model keeps, and how much compute that saves."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import PreTrainedModel

from peft_bsr.cli.sources import find_adapter, from_config, read_model_config
from peft_bsr.cost import count_flops
from peft_bsr.data import load_processor, to_pictures, to_pixels
from peft_bsr.errors import UsageError, headline
from peft_bsr.tuners import BSRConfig
from peft_bsr.viz import KeptTokens, kept_token_pictures

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # scikit-learn's
MOST_PARAMETERS = 100_000_000
MOST_PIXELS = 50_000_000


@dataclass(frozen=True)
class KeptView:
    """What a model keeps of an image.

    Attributes:
        image: The model's input [H, W, 3] in 0 to 1.
        kept: Kept tokens of each reduction, in the order of the blocks.
        tokens: Number of tokens after each of those blocks.
        all_tokens: Number of tokens without reduction.
        flops: FLOPs of the forward.
        all_flops: FLOPs of the forward without reduction.
    """

    image: np.ndarray
    kept: list[KeptTokens]
    tokens: list[int]
    all_tokens: int
    flops: int
    all_flops: int


def photograph(name: str) -> Image.Image:
    """One of `PHOTOGRAPHS`."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


def local_models() -> list[str]:
    """Hub ids of image models with weights in the local cache."""
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    files = {repo.repo_id: {f.file_name for r in repo.revisions for f in r.files} for repo in repositories}
    needed = {"config.json", "preprocessor_config.json", "model.safetensors"}
    return sorted(name for name, found in files.items() if needed <= found)


def keep(source: str, picture: Image.Image | None, rate: float, blocks: list[int] | None = None) -> KeptView:
    """Run a model on an image with token reduction.

    Args:
        source: Folder or Hub id of a model with at most `MOST_PARAMETERS`.
        picture: Image of any size and mode.
        rate: Fraction of the tokens that each reduction keeps, below 1.
        blocks: Indices of the blocks that reduce. Default None: at a quarter, a half and three quarters of the depth.

    Raises:
        PeftBsrError: If there is no image, or the model cannot be loaded or does not support reduction.
    """
    if picture is None:
        raise UsageError("there is no image. Upload one, or select a photograph.")
    if picture.width * picture.height > MOST_PIXELS:
        raise UsageError(f"the image has {picture.width} x {picture.height} pixels; the limit is {MOST_PIXELS:,}.")
    base, processor = load(source)
    pixels = to_pixels([picture], processor)
    model: PeftModel = get_peft_model(deepcopy(base), BSRConfig(keep_rate=rate, reduction_blocks=blocks)).eval()
    [image], kept = to_pictures(pixels, processor), kept_token_pictures(model, pixels, to_pictures(pixels, processor))
    plan, spec = model.base_model.plan(), model.base_model.spec.at_size(*pixels.shape[-2:])
    counts = plan.token_counts(spec.num_tokens, spec.num_special)
    left = [*(attention for attention, _ in counts[1:]), counts[-1][1]]
    with torch.no_grad():
        flops = count_flops(lambda: model(pixel_values=pixels))
        all_flops = count_flops(lambda: base(pixel_values=pixels))
    return KeptView(image, kept, [left[one.block] for one in kept], spec.num_tokens, flops, all_flops)


@lru_cache(maxsize=1)
def load(source: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a model with its weights, and its image processor.

    Raises:
        PeftBsrError: If it is too large or cannot be loaded.
    """
    if not source:
        raise UsageError("there is no model. Enter a Hub id or a folder.")
    if find_adapter(source) is not None:
        raise UsageError(f"`{source}` is an adapter. `peft-bsr show IMAGE --model {source}` draws what it keeps.")
    config = read_model_config(source)
    with torch.device("meta"):
        model = from_config(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MOST_PARAMETERS:
        raise UsageError(f"`{source}` has {size / 1e6:.0f} M parameters; the limit is {MOST_PARAMETERS / 1e6:.0f} M.")
    try:
        return type(model).from_pretrained(source, trust_remote_code=False).eval(), load_processor(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"`{source}` cannot be loaded: {headline(error)}") from error


def read_blocks(text: str) -> list[int] | None:
    """Parse `"3, 6, 9"` to indices; None for an empty text.

    Raises:
        UsageError: If it cannot be parsed.
    """
    if not text.strip():
        return None
    if not re.fullmatch(r"\s*\d{1,3}(\s*,\s*\d{1,3})*\s*", text):
        raise UsageError(f"`{text[:40]}` is not a list of blocks. Enter indices from 0, such as 3, 6, 9.")
    return [int(word) for word in text.split(",")]


__all__ = ["MOST_PARAMETERS", "PHOTOGRAPHS", "KeptView", "keep", "load", "local_models", "photograph", "read_blocks"]
