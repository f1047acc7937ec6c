"""Measures how much each block, and each part of it, would gain from training, on your own images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm.auto import tqdm

from peft_bsr.backbones import ModelSpec, in_mode, probe_model
from peft_bsr.cost.trials import Collate, gains_of_trials
from peft_bsr.errors import ConfigError
from peft_bsr.training import default_learning_rate
from peft_bsr.training.side_effect_free import side_effect_free
from peft_bsr.tuners import BSRConfig

Kind = Literal["sensitivity", "trial"]
_PARTS = {"attention": "attention", "norm1": "attention", "scale1": "attention"}
_PARTS |= {"mlp": "mlp", "norm2": "mlp", "scale2": "mlp"}


class Samples(Protocol):
    """A map-style dataset, of torch or of `datasets`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


@dataclass(frozen=True)
class Contributions:
    """Gains of each block.

    Attributes:
        kind: `"sensitivity"`: mean over the batches of the sum of squared gradients, the first-order decrease of the
            loss for a small step. `"trial"`: decrease of the loss on held-out images after a short run, compared with
            training only the head.
        whole: For each block, name of a module in it (`"attention.query"`, `"mlp.0"`; `"block"` for a trial) -> gain
            from training its whole weights.
        low_rank: The same for a low-rank update of each Linear, as initialized by `BSRConfig(trainable="lora")`.
        images: Number of images that were used.
    """

    kind: Kind
    whole: list[dict[str, float]]
    low_rank: list[dict[str, float]]
    images: int

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.whole)

    def of_blocks(self, trainable: str = "full") -> list[float]:
        """Total gain of each block; never below 0.

        Args:
            trainable: `"full"` or `"lora"`, as in `BSRConfig`. Default `"full"`.
        """
        blocks = self.low_rank if trainable == "lora" else self.whole
        return [max(0.0, sum(block.values())) for block in blocks]

    def of_parts(self, trainable: str = "full") -> list[dict[str, float]]:
        """For each block, gains of its attention (with the norm before it), its MLP and its other modules.

        Args:
            trainable: `"full"` or `"lora"`, as in `BSRConfig`. Default `"full"`.
        """
        found = []
        for block in self.low_rank if trainable == "lora" else self.whole:
            parts: dict[str, float] = {}
            for name, gain in block.items():
                part = _PARTS.get(name.partition(".")[0], "other")
                parts[part] = parts.get(part, 0.0) + gain
            found.append(parts)
        return found

    @property
    def not_finite(self) -> list[int]:
        """Indices of the blocks with a gain that is infinite or not a number."""
        blocks = zip(self.whole, self.low_rank, strict=True)
        gains = [(*whole.values(), *low_rank.values()) for whole, low_rank in blocks]
        return [index for index, numbers in enumerate(gains) if not all(map(math.isfinite, numbers))]

    def save(self, path: str | Path) -> Path:
        """Write JSON.

        Args:
            path: File, `.json`.
        """
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Contributions:
        """Read a file that `save` wrote.

        Args:
            path: File.

        Raises:
            ConfigError: If the file has no valid contributions.
        """
        try:
            found = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            is_whole = found.kind in get_args(Kind) and len(found.whole) == len(found.low_rank) > 0
            is_finite = is_whole and not found.not_finite
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise _not_contributions(path, error) from error
        if not is_finite:
            raise _not_contributions(path, "some blocks have no finite number")
        return found


def _not_contributions(path: str | Path, problem: object) -> ConfigError:
    return ConfigError(f"`{path}` holds no contributions of blocks: {problem}. Measure them again.")


def contributions(
    model: nn.Module,
    dataset: Samples,
    batches: int = 8,
    kind: Kind = "sensitivity",
    *,
    batch_size: int = 32,
    collate: Collate = default_collate,
    epochs: int = 3,
    progress: bool = True,
) -> Contributions:
    """Measure how much each block of `model` would gain from training on `dataset`.

    First the head (with the final norm) is trained for a few steps, because gradients through a new head are not
    informative. `"sensitivity"` then runs one backward per batch; every block is checkpointed and each gradient is
    squared and freed at once, so that only the inputs of the blocks, one block's activations and one gradient are in
    memory at a time. `"trial"` trains each block separately, whole and low-rank, on four fifths of the samples, from a
    feature cache in a temporary folder and on a copy of the model; it takes minutes. The model is not changed, bit for
    bit.

    Source: sensitivities as in SPT, arXiv 2303.08566; trials as the contribution analysis of arXiv 2206.15472.
    Differences: sums over whole modules instead of single weights; for a low-rank update, the expected value over
    PEFT's random initialization of its first factor.

    Args:
        model: A model of transformers, with its weights, without adapters, on the device to compute on.
        dataset: Samples with the model's inputs and `labels`; `batches * batch_size` of them are drawn (seed 0).
        batches: Number of batches. Default 8.
        kind: `"sensitivity"` (seconds) or `"trial"` (minutes). Default `"sensitivity"`.
        batch_size: Images per batch. Default 32.
        collate: Makes a batch from samples. Default torch's.
        epochs: Epochs over these batches: to train the head before sensitivities (0: the head as it is), or for each
            run of a trial. Default 3.
        progress: Whether to show a progress bar. Default True.

    Returns:
        `Contributions`.

    Raises:
        ConfigError: If an argument is out of range, the model has an adapter, or returns no loss.
        UnsupportedModelError: If the model is not a plain vision transformer.

    Examples:
        >>> found = contributions(model, train_dataset)  # doctest: +SKIP
        >>> found.save("contributions.json")  # doctest: +SKIP
    """
    _check(model, dataset, batches, batch_size, kind, epochs)
    spec = probe_model(model)
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: batches * batch_size].tolist()
    samples = Subset(cast("Dataset[object]", dataset), drawn)
    loader = DataLoader(samples, batch_size, collate_fn=collate)
    if kind == "trial":
        whole, low_rank = gains_of_trials(
            model, spec, samples, _loss_of, batch_size=batch_size, epochs=epochs, collate=collate, progress=progress
        )
        return _finite(Contributions(kind, whole, low_rank, len(samples)))
    with (
        tqdm(total=(epochs + 1) * len(loader), desc="Contributions", unit="batch", disable=not progress) as bar,
        side_effect_free(model),
        in_mode(False, model),
        torch.enable_grad(),
        _trained_head(model, spec, loader, epochs, bar),
    ):
        return _finite(Contributions(kind, *_sensitivities(model, spec, loader, bar), len(samples)))


def _finite(found: Contributions) -> Contributions:
    """The contributions, if all are numbers."""
    if wrong := found.not_finite:
        raise ConfigError(
            f"the contributions of block {', '.join(map(str, wrong))} are not finite: training diverged, or the model "
            "overflows in its dtype. Measure in float32."
        )
    return found


def _check(model: nn.Module, dataset: Sized, batches: int, batch_size: int, kind: str, epochs: int) -> None:
    least = {"batches": (batches, 1), "batch_size": (batch_size, 1), "epochs": (epochs, 0)}
    problems = [
        f"`{name}={value!r}` must be a whole number of at least {low}."
        for name, (value, low) in least.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < low
    ]
    if kind not in get_args(Kind):
        problems.append(f'`kind={kind!r}` must be "sensitivity" or "trial".')
    if kind == "trial" and epochs == 0:
        problems.append("`epochs=0` trains nothing. Use at least 1.")
    if len(dataset) < 2:
        problems.append(f"`dataset` has {len(dataset)} samples; at least 2 are needed.")
    if getattr(model, "peft_config", None) is not None:
        problems.append("`model` has an adapter. Pass the base model.")
    if any(parameter.is_meta for parameter in model.parameters()):
        problems.append("`model` is on the meta device. Load its weights.")
    if problems:
        raise ConfigError.from_problems("contributions", problems)


def _loss_of(model: nn.Module, batch: Mapping[str, object]) -> Tensor:
    """The loss of one batch.

    Raises:
        ConfigError: If the model returns no loss.
    """
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    loss = getattr(model(**moved), "loss", None)
    if loss is None:
        raise ConfigError(f"contributions: the model gives no loss for {sorted(batch)}. Samples need `labels`.")
    found: Tensor = loss
    return found


@contextmanager
def _trained_head(model: nn.Module, spec: ModelSpec, loader: DataLoader, epochs: int, bar: tqdm) -> Iterator[None]:
    """Context manager: train the head alone, and restore its weights on exit."""
    model.requires_grad_(False)
    head = [p for name in spec.head for p in model.get_submodule(name).parameters() if p.is_floating_point()]
    before = [parameter.detach().clone() for parameter in head]
    for parameter in head:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(head, lr=default_learning_rate("linear")) if head else None
    try:
        for _ in range(epochs):
            for batch in loader:
                if optimizer is not None:
                    _loss_of(model, batch).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                bar.update()
        model.requires_grad_(False)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(head, before, strict=True):
                parameter.copy_(value)


def _sensitivities(
    model: nn.Module, spec: ModelSpec, loader: DataLoader, bar: tqdm
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Mean over the batches of the sum of squared gradients, for each module and for low-rank updates of Linears."""
    sums: dict[Tensor, Tensor] = {}

    def square(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        sums[parameter] = sums.get(parameter, 0) + parameter.grad.float().square().sum()
        parameter.grad = None

    leaves = [
        {name: model.get_submodule(f"{block}.{path}") for name, path in spec.paths.items()} for block in spec.blocks
    ]
    with ExitStack() as stack:
        for block in spec.blocks:
            stack.enter_context(_checkpointed(model.get_submodule(block)))
        for module in (module for block in leaves for module in block.values()):
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
                    stack.callback(parameter.register_post_accumulate_grad_hook(square).remove)
        for batch in loader:
            _loss_of(model, batch).backward()
            bar.update()

    def mean(parameter: Tensor) -> float:
        return float(sums.get(parameter, 0)) / len(loader)  # 0 for blocks that the output does not depend on

    whole = [{name: sum(map(mean, module.parameters())) for name, module in block.items()} for block in leaves]
    low_rank = [
        {
            name: _low_rank_share(linear) * mean(linear.weight)
            for name, linear in block.items()
            if isinstance(linear, nn.Linear)
        }
        for block in leaves
    ]
    return whole, low_rank


def _low_rank_share(linear: nn.Linear) -> float:
    """Expected squared gradient of a new low-rank update, as a fraction of the weight's squared gradient.

    If G is the gradient of the weight, `lora_B` has the gradient `scaling * G A^T` and `lora_A` has none, because
    `lora_B` is zero. PEFT draws A uniformly from +- in^-0.5, so that E |G A^T|^2 = r / (3 in) |G|^2.
    """
    config = BSRConfig(trainable="lora")
    scaling = config.lora_alpha / config.r
    return scaling**2 * config.r / (3 * linear.in_features)


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    """Context manager: checkpoint the block, so that it saves only its inputs for backward."""
    own = vars(block).get("forward")
    forward = block.forward
    block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


__all__ = ["Contributions", "contributions"]
