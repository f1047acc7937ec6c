"""The second tab: which patches of an image a model keeps, and what that spares."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from peft import get_peft_model
from PIL import Image
from torch import nn

from peft_bsr.cli.sources import find_adapter, from_config, read_model_config
from peft_bsr.cost import count_flops
from peft_bsr.data import load_processor, to_pictures, to_pixels
from peft_bsr.errors import UsageError, headline
from peft_bsr.tuners import BSRConfig
from peft_bsr.viz import KeptTokens, kept_token_pictures

PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # scikit-learn's
MOST_PARAMETERS = 100_000_000
MOST_PIXELS = 50_000_000


@dataclass(frozen=True)
class KeptView:
    """What a model keeps of an image.

    Attributes:
        image: [H, W, 3] in 0 to 1, as the model sees it.
        kept: One a reduction, in the order of the blocks.
        tokens: Tokens that leave each of those blocks.
        all_tokens: Tokens without reduction.
        flops: Of the forward.
        all_flops: Of the forward without reduction.
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
    """Hub ids of the image models whose weights are in this machine's cache."""
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    files = {repo.repo_id: {f.file_name for r in repo.revisions for f in r.files} for repo in repositories}
    needed = {"config.json", "preprocessor_config.json", "model.safetensors"}
    return sorted(name for name, found in files.items() if needed <= found)


def keep(source: str, picture: Image.Image | None, rate: float, blocks: list[int] | None = None) -> KeptView:
    """Run a model on an image, reducing its tokens.

    Args:
        source: Folder or Hub id of a model of at most `MOST_PARAMETERS`.
        picture: Of any size and mode.
        rate: Share of the tokens that each reduction keeps, below 1.
        blocks: Which reduce. Default None: a quarter, a half and three quarters into the depth.

    Raises:
        PeftBsrError: If there is no image, or the model cannot be loaded or reduced; the message says why.
    """
    if picture is None:
        raise UsageError("there is no image. Upload one, or pick a photograph.")
    if picture.width * picture.height > MOST_PIXELS:
        raise UsageError(f"the image has {picture.width} x {picture.height} pixels; {MOST_PIXELS:,} are the most.")
    base, processor = load(source)
    pixels = to_pixels([picture], processor)
    model: Any = get_peft_model(deepcopy(base), BSRConfig(keep_rate=rate, reduction_blocks=blocks)).eval()
    [image], kept = to_pictures(pixels, processor), kept_token_pictures(model, pixels, to_pictures(pixels, processor))
    plan, spec = model.base_model.plan(), model.base_model.spec
    counts = plan.token_counts(spec.num_tokens, spec.num_special)
    left = [*(attention for attention, _ in counts[1:]), counts[-1][1]]
    with torch.no_grad():
        flops = count_flops(lambda: model(pixel_values=pixels))
        all_flops = count_flops(lambda: base(pixel_values=pixels))
    return KeptView(image, kept, [left[one.block] for one in kept], spec.num_tokens, flops, all_flops)


@lru_cache(maxsize=1)
def load(source: str) -> tuple[nn.Module, Any]:
    """A model with its weights, and its image processor.

    Raises:
        PeftBsrError: If it is too large or cannot be loaded.
    """
    if not source:
        raise UsageError("no model is named. Write a Hub id or a folder.")
    if find_adapter(source) is not None:
        raise UsageError(f"`{source}` is an adapter. `peft-bsr show IMAGE --model {source}` draws what it keeps.")
    config = read_model_config(source)
    with torch.device("meta"):
        model: Any = from_config(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MOST_PARAMETERS:
        raise UsageError(f"`{source}` has {size / 1e6:.0f} M parameters; {MOST_PARAMETERS / 1e6:.0f} M are the most.")
    try:
        return type(model).from_pretrained(source, trust_remote_code=False).eval(), load_processor(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"`{source}` cannot be loaded: {headline(error)}") from error


def read_blocks(text: str) -> list[int] | None:
    """`"3, 6, 9"` as indices; None where nothing is written.

    Raises:
        UsageError: If it is something else.
    """
    if not text.strip():
        return None
    if not re.fullmatch(r"\s*\d{1,3}(\s*,\s*\d{1,3})*\s*", text):
        raise UsageError(f"`{text[:40]}` names no blocks. Write indices from 0, such as 3, 6, 9.")
    return [int(word) for word in text.split(",")]


__all__ = ["MOST_PARAMETERS", "PHOTOGRAPHS", "KeptView", "keep", "load", "local_models", "photograph", "read_blocks"]
