"""What the frozen leading blocks make of each image, computed once and read from disk in every epoch.

Blocks in front of the first trained one, and the embeddings, never change; without random augmentation they give the
same tokens in every epoch. Where all blocks are frozen and queries read them (SynQT), it is the tokens that they read.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm.auto import tqdm

from peft_bsr.backbones import in_mode, main_input, relative_error, tensors_of, tolerance
from peft_bsr.engine import run_from, run_until
from peft_bsr.errors import FeatureCacheError
from peft_bsr.training.cache_files import CacheFiles, num_bytes
from peft_bsr.training.cached_place import CachedPlace
from peft_bsr.tuners.base.layer import find_routers

_TOKENS, _ORIGINS, _DIGEST = "cached_tokens", "cached_origins", "digest"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHECKED = 8  # samples compared when a cache is used again


class FeatureCache(Dataset):
    """Tokens in front of the first trained block, one row an image, memory-mapped: a dataset that trains its model.

    With SynQT they are the normalised tokens of every layer that is read, side by side, and no block runs any more.

    Items are `cached_tokens` [N, D], `cached_origins` [A] (the patches alive, if a leading block reduces) and the
    tensors that the samples had beside the image (labels). Inside of `read_by(model)` the model takes batches of them
    in the place of images; images go on as before, for evaluation.

    A cache belongs to the weights in front of the first trained block, the reductions there, a dtype and the very
    images as processed; on a mismatch it is refused. Random augmentation is refused, because it would be frozen.

    Args:
        files: Made by `build` or `open`.

    Examples:
        >>> cache = FeatureCache.build(model, train_dataset, "cache")  # doctest: +SKIP
        >>> with cache.read_by(model):  # doctest: +SKIP
        ...     Trainer(model, TrainingArguments("out", remove_unused_columns=False), train_dataset=cache).train()
    """

    def __init__(self, files: CacheFiles) -> None:
        self.files = files

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Any,
        folder: str | Path,
        *,
        collate: Callable[[list[Any]], dict[str, Any]] = default_collate,
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 32,
        num_workers: int = 0,
        progress: bool = True,
    ) -> FeatureCache:
        """Run the leading blocks on every sample. An interrupted run goes on; a complete cache is checked and taken.

        Args:
            model: With an active adapter of ours, on the device to compute on. Its modes are left as they were.
            dataset: Samples with the model's main input (`pixel_values` [3, H, W]), all of one size, in a fixed order.
            folder: Of the cache; made if missing.
            collate: Makes a batch of samples. Default torch's.
            dtype: Of the tokens on disk: bfloat16, float16 or float32. Default bfloat16.
            batch_size: Images a forward. Default 32.
            num_workers: Processes that load samples. Default 0.
            progress: Say what it takes on disk before it starts, and show a bar. Default True.

        Returns:
            The cache.

        Raises:
            FeatureCacheError: If the folder holds another cache, the disk has no room, samples come out different when
                they are read again, or the model does not give the same from its tokens as from images.
        """
        if dtype not in _DTYPES or len(dataset) == 0:
            raise FeatureCacheError(
                f"`dtype={dtype!r}` and {len(dataset)} samples: tokens are kept as bfloat16, float16 or float32, and "
                "there must be samples to keep."
            )
        name, device = main_input(model), next(model.parameters()).device
        sample = _to(collate([dataset[0], dataset[len(dataset) - 1]]), device)
        if _digests(sample[name]) != _digests(collate([dataset[0], dataset[len(dataset) - 1]])[name]):
            raise FeatureCacheError(
                "a sample came out different when it was read again: random augmentation, or no fixed order. A cache "
                "would freeze it. Leave it out, or train without a cache."
            )
        key = CachedPlace(model).key() | {
            "dtype": _text(dtype),
            "num_samples": len(dataset),
            "image": list(sample[name][0].shape),
        }
        files = CacheFiles(Path(folder))
        with in_mode(False, model):
            first, lengths = _rows(model, sample, name, dtype)
            key |= {"lengths": list(lengths)} if lengths else {}
            _check_replay(model, sample, name)
            if files.exists:
                files.open()
                _check_key(files, key)
                _check_samples(files, dataset, collate, name)
            else:
                fields = {n: (_text(rows.dtype), list(rows.shape[1:])) for n, rows in first.items()}
                if progress:
                    _announce(Path(folder), num_bytes(fields, 1), len(dataset))
                files.create(key, fields, len(dataset))
            rest = Subset(dataset, range(files.num_done, len(dataset)))
            loader: Any = DataLoader(rest, batch_size, collate_fn=collate, num_workers=num_workers)
            with tqdm(
                total=len(dataset), initial=files.num_done, unit="image", desc="Feature cache", disable=not progress
            ) as bar:
                for batch in loader if len(rest) else ():
                    files.append(_rows(model, _to(batch, device), name, dtype)[0])
                    bar.update(files.num_done - bar.n)
            files.flush()
        return cls(files)

    @classmethod
    def open(cls, folder: str | Path) -> FeatureCache:
        """A complete cache, without its dataset. `read_by` checks that it is the model's.

        Raises:
            FeatureCacheError: If there is none, or it is not complete.
        """
        files = CacheFiles(Path(folder))
        files.open()
        if files.num_done < files.num_rows:
            raise FeatureCacheError(
                f"the feature cache in {str(folder)!r} holds {files.num_done} of {files.num_rows} samples: its making "
                "was interrupted. Call FeatureCache.build with the same model and dataset to go on."
            )
        return cls(files)

    def __len__(self) -> int:
        return self.files.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: row for name, row in self.files.read(index).items() if name != _DIGEST}

    @contextmanager
    def read_by(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` takes batches of this cache in the place of images.

        Args:
            model: The one whose cache it is: its leading weights are compared.

        Raises:
            FeatureCacheError: If it is another model's cache, or a batch comes while another adapter is active.
        """
        place = CachedPlace(model)
        _check_key(self.files, place.key())
        lengths = tuple(self.files.key.get("lengths", ()))
        running = ExitStack()

        def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if _TOKENS not in kwargs:
                return None
            if find_routers(model)[0].plan is not place.plan:
                raise FeatureCacheError("a batch of cached tokens came while another adapter is active, or none.")
            kwargs = dict(kwargs)
            tokens, origins = kwargs.pop(_TOKENS), kwargs.pop(_ORIGINS, None)
            running.enter_context(run_from(model, place.entry(tokens, origins, lengths)))
            weight = next(p for p in model.parameters() if p.is_floating_point())
            image = torch.zeros(1, *self.files.key["image"], device=tokens.device, dtype=weight.dtype)
            return args, {main_input(model): image, **kwargs}

        handles = (
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(lambda *_: running.close(), always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _rows(
    model: nn.Module, batch: dict[str, Any], name: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """What is kept of a batch, and how many of the tokens are each layer's."""
    entry = run_until(model, CachedPlace(model).index, batch)
    assert entry.tokens is not None, "a forward that stops leaves its tokens"
    rows = {n: value for n, value in batch.items() if n != name and isinstance(value, Tensor)}
    rows |= {_TOKENS: entry.tokens.to(dtype), _DIGEST: torch.tensor(_digests(batch[name]))}
    if entry.origins is not None:
        rows[_ORIGINS] = entry.origins.to(torch.int32)
    return {n: value.cpu() for n, value in rows.items()}, entry.lengths


def _check_replay(model: nn.Module, batch: dict[str, Any], name: str) -> None:
    """Refuse a model that reads more of an image than its tokens."""
    with torch.no_grad():
        expected = tensors_of(model(**batch))
        entry = run_until(model, CachedPlace(model).index, batch)
        blank = {**batch, name: torch.zeros_like(batch[name][:1])}
        with run_from(model, entry):
            found = tensors_of(model(**blank))
    pairs = list(zip(found, expected, strict=True))
    error = max(relative_error(a, b) if a.shape == b.shape else float("inf") for a, b in pairs)
    if not error <= tolerance(expected[0].dtype):
        raise FeatureCacheError(
            f"{type(model).__name__} gives another output from the tokens in front of block {entry.index} than from "
            f"the images they were made of (off by {error:.1e}): it reads more than that. Train without a cache."
        )


def _check_samples(files: CacheFiles, dataset: Any, collate: Any, name: str) -> None:
    """Compare a few of the samples that are done, the last one among them."""
    step = max(1, files.num_done // _CHECKED)
    for index in range(files.num_done - 1, -1, -step):
        if _digests(collate([dataset[index]])[name]) != [int(files.read(index)[_DIGEST])]:
            raise FeatureCacheError(
                f"sample {index} is not the one that the feature cache in {str(files.folder)!r} was made of: other "
                "images, another order or another processor. Use another folder, or delete this one."
            )


def _check_key(files: CacheFiles, key: dict[str, Any]) -> None:
    differing = [f"{n} is {key[n]!r}, in the cache {files.key.get(n)!r}" for n in key if key[n] != files.key.get(n)]
    if differing:
        raise FeatureCacheError(
            f"the feature cache in {str(files.folder)!r} is of something else: {'; '.join(differing)}. "
            "Use another folder, or delete this one."
        )


def _digests(images: Tensor) -> list[int]:
    """One number an image, by which another is told from it."""
    rows = images.detach().cpu().contiguous()
    hashes = (hashlib.blake2b(row.view(-1).view(torch.uint8).numpy().data, digest_size=8).digest() for row in rows)
    return [int.from_bytes(value, "little", signed=True) for value in hashes]


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _announce(folder: Path, row_bytes: int, number: int) -> None:
    exists = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    print(
        f"Feature cache: {number} samples of {row_bytes / 1024:.0f} KiB, {number * row_bytes / 2**30:.2f} GiB in all, "
        f"to {folder} ({shutil.disk_usage(exists).free / 2**30:.1f} GiB free).",
        file=sys.stderr,
    )


__all__ = ["FeatureCache"]
