"""The output of the frozen blocks before the first trained one, computed once and read from disk in every epoch.

These blocks and the embeddings never change; without random augmentation they give the same tokens in every epoch. If
all blocks are frozen and a side network reads them (SynQT, LoSA), the cache stores the tokens that it reads.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from peft_bsr.backbones import in_mode, main_input, relative_error, tensors_of, tolerance
from peft_bsr.engine import run_from, run_until
from peft_bsr.errors import FeatureCacheError, headline
from peft_bsr.training.cache_files import CacheFiles, Key, num_bytes
from peft_bsr.training.cache_point import CachePoint
from peft_bsr.training.cache_samples import Samples
from peft_bsr.training.random_draws import drawn_before, parts_before
from peft_bsr.training.types import Batch, Collate, MapStyleDataset
from peft_bsr.tuners.base.layer import find_controllers

_TOKENS, _ORIGINS, _MERGED, _DIGEST = "cached_tokens", "cached_origins", "cached_merged", "digest"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SOME = 64  # samples compared with `check_all=False`


class FeatureCache(Dataset):
    """Memory-mapped input tokens of the first trained block, one row per image: a dataset to train its model on.

    With SynQT and LoSA they are the tokens of every layer that is read, concatenated, and no block runs in training.

    Items are `cached_tokens` [N, D], `cached_origins` [A] (the kept patches, if a frozen block before reduces),
    `cached_merged` [M] (the token that each patch is part of, if it merges) and the other tensors of the samples
    (labels). Inside `read_by(model)` the model takes batches of them instead of images; it still takes images, for
    evaluation.

    A cache is tied to the model's architecture, the weights before the first trained block, the reductions there, a
    dtype and all tensors of the processed samples; a mismatch is an error. Randomness is an error too, because it would
    be frozen: augmentation always, randomness in the model unless `freeze_random` is set. Every row is checked against
    its checksum when it is read.

    Args:
        files: Made by `build` or `open`.
        freeze_random: Whether randomness in the model may be frozen.
        drawing: Name of the first module whose randomness is, if there is one.

    Examples:
        >>> cache = FeatureCache.build(model, train_dataset, "cache")  # doctest: +SKIP
        >>> with cache.read_by(model):  # doctest: +SKIP
        ...     Trainer(model, TrainingArguments("out", remove_unused_columns=False), train_dataset=cache).train()
    """

    def __init__(self, files: CacheFiles, freeze_random: bool = False, drawing: str | None = None) -> None:
        self.files, self.freeze_random, self.drawing = files, freeze_random, drawing

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: MapStyleDataset,
        folder: str | Path,
        *,
        collate: Collate = default_collate,
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 32,
        num_workers: int = 0,
        progress: bool = True,
        freeze_random: bool = False,
        check_all: bool = True,
    ) -> FeatureCache:
        """Compute the tokens of every sample. An interrupted run continues; a complete cache is checked and returned.

        A complete cache is only read. If another process builds in the same folder, this one waits for it.

        Args:
            model: A model with an active adapter of ours, on the device to compute on. Its modes are not changed.
            dataset: Samples with the model's main input (`pixel_values` [3, H, W]), all of one size, in a fixed order.
            folder: Folder of the cache; created if missing.
            collate: Makes a batch from samples. Default torch's.
            dtype: Dtype of the tokens on disk: bfloat16, float16 or float32. Default bfloat16.
            batch_size: Images per forward. Default 32.
            num_workers: Number of processes that load samples. Default 0.
            progress: Whether to print the size on disk and show a progress bar. Default True.
            freeze_random: Whether to store the tokens of evaluation mode if the model is random in training before the
                first trained block (dropout of embeddings, DINOv3's rescaled positions), and to give the
                trained blocks its positions. Default False: an error.
            check_all: Whether to compare all existing samples with the dataset, which reads it once. False: compare 64
                of them. Default True.

        Returns:
            The cache.

        Raises:
            FeatureCacheError: If the folder holds another cache or cannot be written, there is too little disk space,
                samples differ when they are read again, the model is random before the first trained block, or its
                output from the tokens differs from its output from images.
        """
        if dtype not in _DTYPES or len(dataset) == 0:
            raise FeatureCacheError(
                f"`dtype={dtype!r}` and {len(dataset)} samples: tokens are stored as bfloat16, float16 or float32, and "
                "there must be at least one sample."
            )
        place = CachePoint(model)
        samples = Samples(dataset, collate, main_input(model), batch_size, num_workers, progress)
        samples.check_steady()
        pair = samples.take(samples.spread(2))
        drawing = drawn_before(model, place.index, _to_model(pair, model))
        if drawing and not freeze_random:
            raise _draws(drawing, place.index)
        with in_mode(False, model):
            _check_replay(model, place.index, pair, samples.name)
            first, lengths = _rows(model, place.index, pair, samples, dtype)
            key = place.key() | {
                "dtype": _text(dtype),
                "num_samples": len(dataset),
                "image": list(pair[samples.name][0].shape),
                **({"lengths": list(lengths)} if lengths else {}),
            }
            files = CacheFiles(Path(folder))
            if files.is_complete():
                _check_same(files, key, samples, check_all)
                return cls(files, freeze_random, drawing)
            with files.locked(lambda: _say_waiting(folder) if progress else None):
                if not files.exists:
                    fields = {n: (_text(rows.dtype), list(rows.shape[1:])) for n, rows in first.items()}
                    if progress:
                        _announce(Path(folder), num_bytes(fields, 1), len(dataset))
                    files.create(key, fields, len(dataset))
                files.open()
                _check_same(files, key, samples, check_all)
                for batch in samples.batches(range(files.num_done, len(dataset)), "Feature cache"):
                    files.append(_rows(model, place.index, batch, samples, dtype)[0])
                files.flush()
        return cls(files, freeze_random, drawing)

    @classmethod
    def open(cls, folder: str | Path, freeze_random: bool = False) -> FeatureCache:
        """Open a complete cache without its dataset. `read_by` checks that it belongs to the model.

        Args:
            folder: Folder of the cache.
            freeze_random: See `build`.

        Raises:
            FeatureCacheError: If there is none, or it is not complete.
        """
        files = CacheFiles(Path(folder))
        files.open()
        if files.num_done < files.num_rows:
            raise FeatureCacheError(
                f"the feature cache in {str(folder)!r} holds {files.num_done} of {files.num_rows} samples: its "
                "build was interrupted. Call FeatureCache.build with the same model and dataset to continue."
            )
        return cls(files, freeze_random)

    def __len__(self) -> int:
        return self.files.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: row for name, row in self.files.read(index).items() if name != _DIGEST}

    @contextmanager
    def read_by(self, model: nn.Module) -> Iterator[None]:
        """Context manager: `model` takes batches of this cache instead of images.

        Args:
            model: The model of the cache; its weights before the first trained block are compared.

        Raises:
            FeatureCacheError: If the cache belongs to another model, if the model is random in training where the cache
                is frozen, or if it gets a batch while another adapter is active.
        """
        place = CachePoint(model)
        _check_key(self.files, place.key())
        row = {n: value[None] for n, value in self[0].items() if n not in (_TOKENS, _ORIGINS, _MERGED)}
        image = torch.rand(1, *self.files.key["image"], generator=torch.Generator().manual_seed(0))
        weight = next(p for p in model.parameters() if p.is_floating_point())
        inputs = {**row, main_input(model): image.to(weight.dtype)}
        if not self.freeze_random and (drawing := drawn_before(model, place.index, _to_model(inputs, model))):
            raise _draws(drawing, place.index)
        steady = parts_before(model, place.index, _to_model(inputs, model)) if self.freeze_random else []
        lengths = tuple(self.files.key.get("lengths", ()))
        running = ExitStack()

        def begin(_: nn.Module, args: tuple[object, ...], kwargs: Batch) -> tuple[tuple[object, ...], Batch] | None:
            if _TOKENS not in kwargs:
                return None
            if find_controllers(model)[0].plan is not place.plan:
                raise FeatureCacheError("the model got cached tokens, but the adapter of the cache is not active.")
            kwargs = dict(kwargs)
            tokens, origins, merged = kwargs.pop(_TOKENS), kwargs.pop(_ORIGINS, None), kwargs.pop(_MERGED, None)
            running.enter_context(in_mode(False, *steady))  # trained blocks get the positions that the frozen ones had
            running.enter_context(run_from(model, place.resume_point(tokens, origins, lengths, merged)))
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
    model: nn.Module, index: int, batch: Batch, samples: Samples, dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """The rows of a batch, and the number of tokens of each layer."""
    resume_point = run_until(model, index, _to_model(batch, model))
    assert resume_point.tokens is not None, "a forward that stops leaves its tokens"
    rows = {n: value for n, value in batch.items() if n != samples.name and isinstance(value, Tensor)}
    rows |= {_TOKENS: resume_point.tokens.to(dtype), _DIGEST: torch.tensor(samples.digests(batch))}
    for name, places in ((_ORIGINS, resume_point.origins), (_MERGED, resume_point.merged)):
        if places is not None:
            rows[name] = places.to(torch.int32)
    return {n: value.cpu() for n, value in rows.items()}, resume_point.lengths


def _draws(drawing: str, index: int) -> FeatureCacheError:
    """For a model that is random in training before the block."""
    return FeatureCacheError(
        f"`{drawing}` is random in training (dropout, positions that are shifted or rescaled), before block "
        f"{index}: a cache would freeze that. Turn it off in the model's config, train without a cache, or store "
        "the tokens of evaluation mode with `freeze_random=True`."
    )


def _check_replay(model: nn.Module, index: int, batch: Batch, name: str) -> None:
    """Refuse a model that reads more than the cached tokens of an image."""
    batch = _to_model(batch, model)
    with torch.no_grad():
        expected = tensors_of(model(**batch))
        blank = {**batch, name: torch.zeros_like(batch[name][:1])}
        try:
            with run_from(model, run_until(model, index, batch)):
                found = tensors_of(model(**blank))
            pairs = list(zip(found, expected, strict=True))
        except (RuntimeError, ValueError, IndexError) as failure:
            raise FeatureCacheError(
                f"{type(model).__name__} does not run from the input tokens of block {index} ({headline(failure)}): it "
                "reads more than these tokens. Train without a cache."
            ) from failure
    error = max(relative_error(a, b) if a.shape == b.shape else float("inf") for a, b in pairs)
    if not error <= tolerance(expected[0].dtype):
        raise FeatureCacheError(
            f"{type(model).__name__} gives another output from the input tokens of block {index} than from the "
            f"images (off by {error:.1e}): it reads more than these tokens. Train without a cache."
        )


def _check_same(files: CacheFiles, key: Key, samples: Samples, check_all: bool) -> None:
    """Compare the key of the cache, and the samples that are finished."""
    _check_key(files, key)
    done = files.spec(_DIGEST)
    picked: Sequence[int] = range(len(done)) if check_all else samples.spread(_SOME, len(done))
    indices = iter(picked)
    for batch in samples.batches(picked, "Checking the samples"):
        for digest, index in zip(samples.digests(batch), indices, strict=False):
            if digest != done[index]:
                raise FeatureCacheError(
                    f"sample {index} is not the one that the feature cache in {str(files.folder)!r} was built from: "
                    "another image or label, another order or another processor. Use another folder, or delete this "
                    "one."
                )


def _check_key(files: CacheFiles, key: Key) -> None:
    differing = [f"{n} is {key[n]!r}, in the cache {files.key.get(n)!r}" for n in key if key[n] != files.key.get(n)]
    if differing:
        raise FeatureCacheError(
            f"the feature cache in {str(files.folder)!r} belongs to something else: {'; '.join(differing)}. "
            "Use another folder, or delete this one."
        )


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_model(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _say_waiting(folder: str | Path) -> None:
    print(f"Feature cache: another process builds in {folder}; waiting for it.", file=sys.stderr)


def _announce(folder: Path, row_bytes: int, number: int) -> None:
    exists = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    print(
        f"Feature cache: {number} samples of {row_bytes / 1024:.0f} KiB, {number * row_bytes / 2**30:.2f} GiB in all, "
        f"to {folder} ({shutil.disk_usage(exists).free / 2**30:.1f} GiB free).",
        file=sys.stderr,
    )


__all__ = ["FeatureCache"]
