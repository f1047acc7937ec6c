"""What each block, and each part of it, would gain by training, measured on one's own images before a plan is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset, default_collate
from tqdm.auto import tqdm

from peft_bsr.backbones import ModelSpec, in_mode, probe_model
from peft_bsr.cost.trials import gains_of_trials
from peft_bsr.errors import ConfigError
from peft_bsr.training import default_learning_rate
from peft_bsr.training.side_effect_free import side_effect_free
from peft_bsr.tuners import BSRConfig

Kind = Literal["sensitivity", "trial"]
_PARTS = {"attention": "attention", "norm1": "attention", "scale1": "attention"}
_PARTS |= {"mlp": "mlp", "norm2": "mlp", "scale2": "mlp"}


@dataclass(frozen=True)
class Contributions:
    """What was found, block by block.

    Attributes:
        kind: `"sensitivity"`: mean over the batches of the sum of squared gradients, by which the loss falls to first
            order under a small step. `"trial"`: how far a short run brings the loss of other images below what a head
            alone reaches.
        whole: For each block, name of a module in it (`"attention.query"`, `"mlp.0"`; `"block"` of a trial) -> what
            training it whole gains.
        low_rank: The same for a low-rank update of each Linear, as `BSRConfig(trainable="lora")` begins it.
        images: That were looked at.
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
        """What each block gains in all; never below 0.

        Args:
            trainable: `"full"` or `"lora"`, as in `BSRConfig`. Default `"full"`.
        """
        blocks = self.low_rank if trainable == "lora" else self.whole
        return [max(0.0, sum(block.values())) for block in blocks]

    def of_parts(self, trainable: str = "full") -> list[dict[str, float]]:
        """For each block, what its attention (with the norm before it), its MLP and the rest of it gain.

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

    def save(self, path: str | Path) -> Path:
        """Write JSON.

        Args:
            path: File, `.json`.
        """
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Contributions:
        """Read what `save` wrote.

        Args:
            path: File.

        Raises:
            ConfigError: If it is something else.
        """
        try:
            found = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            numbers = [*found.of_blocks(), *found.of_blocks("lora")]
            whole = found.kind in get_args(Kind) and len(found.whole) == len(found.low_rank) > 0
            if not whole or not all(0 <= number < float("inf") for number in numbers):
                raise ConfigError("not every block has a finite number")
        except (OSError, ConfigError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"`{path}` holds no contributions of blocks: {error}. Measure them again.") from error
        return found


def contributions(
    model: nn.Module,
    dataset: Any,
    batches: int = 8,
    kind: Kind = "sensitivity",
    *,
    batch_size: int = 32,
    collate: Callable[[list[Any]], dict[str, Any]] = default_collate,
    epochs: int = 3,
    progress: bool = True,
) -> Contributions:
    """Measure what each block of `model` would gain by training on `dataset`.

    First the head (with the final norm) trains for a few steps, as a new one says nothing about what lies before it.
    `"sensitivity"` then takes one backward a batch; every block runs under a checkpoint of its own and each gradient
    is squared and let go as soon as it is there, so that the inputs of the blocks, one block's activations and one
    gradient are alive at a time. `"trial"` trains each block by itself, whole and low-rank, on four fifths of the
    samples, from a feature cache in a temporary folder and on a copy of the model; it takes minutes. The model is left
    bit for bit as it was.

    Source: sensitivities as in SPT, arXiv 2303.08566; trials as the contribution analysis of arXiv 2206.15472.
    Departures: sums of whole modules instead of single weights; a low-rank update counts with what is expected over
    PEFT's draw of its first factor.

    Args:
        model: Of transformers, with its weights, without adapters, on the device to compute on.
        dataset: Samples with the model's inputs and `labels`, of which `batches * batch_size` are drawn (seed 0).
        batches: Default 8.
        kind: `"sensitivity"` (seconds) or `"trial"` (minutes). Default `"sensitivity"`.
        batch_size: Images of each. Default 32.
        collate: Makes a batch of samples. Default torch's.
        epochs: Passes over these batches: of the head before sensitivities, 0 takes it as it is; of each run of a
            trial. Default 3.
        progress: Show a bar. Default True.

    Returns:
        `Contributions`.

    Raises:
        ConfigError: If an argument is out of range, the model has an adapter, or gives no loss.
        UnsupportedModelError: If the model is no plain vision transformer.

    Examples:
        >>> found = contributions(model, train_dataset)  # doctest: +SKIP
        >>> found.save("contributions.json")  # doctest: +SKIP
    """
    _check(model, dataset, batches, batch_size, kind, epochs)
    spec = probe_model(model)
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: batches * batch_size].tolist()
    samples = Subset(dataset, drawn)
    loader = DataLoader(samples, batch_size, collate_fn=collate)
    if kind == "trial":
        how: Any = {"batch_size": batch_size, "epochs": epochs, "collate": collate, "progress": progress}
        return Contributions(kind, *gains_of_trials(model, spec, samples, _loss_of, **how), len(samples))
    with (
        tqdm(total=(epochs + 1) * len(loader), desc="Contributions", unit="batch", disable=not progress) as bar,
        side_effect_free(model),
        in_mode(False, model),
        torch.enable_grad(),
        _trained_head(model, spec, loader, epochs, bar),
    ):
        return Contributions(kind, *_sensitivities(model, spec, loader, bar), len(samples))


def _check(model: Any, dataset: Any, batches: int, batch_size: int, kind: str, epochs: int) -> None:
    least = {"batches": (batches, 1), "batch_size": (batch_size, 1), "epochs": (epochs, 0)}
    problems = [
        f"`{name}={value!r}` must be a whole number of at least {low}."
        for name, (value, low) in least.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < low
    ]
    if kind not in get_args(Kind):
        problems.append(f'`kind={kind!r}` must be "sensitivity" or "trial".')
    if kind == "trial" and epochs == 0:
        problems.append("`epochs=0` trains nothing in a trial. Give 1 at least.")
    if len(dataset) < 2:
        problems.append(f"`dataset` has {len(dataset)} samples; 2 at least are needed.")
    if getattr(model, "peft_config", None) is not None:
        problems.append("`model` has an adapter. Pass the base model: what blocks would gain is asked before.")
    if any(parameter.is_meta for parameter in model.parameters()):
        problems.append("`model` has no weights. Load them.")
    if problems:
        raise ConfigError.from_problems("contributions", problems)


def _loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss of one batch.

    Raises:
        ConfigError: If the model gives none.
    """
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    loss = getattr(model(**moved), "loss", None)
    if loss is None:
        raise ConfigError(f"contributions: the model gives no loss for {sorted(batch)}. Samples need `labels`.")
    found: Tensor = loss
    return found


@contextmanager
def _trained_head(model: nn.Module, spec: ModelSpec, loader: Any, epochs: int, bar: Any) -> Iterator[None]:
    """The head is trained inside, and as it was afterwards. Blocks build no graph for it."""
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
    model: nn.Module, spec: ModelSpec, loader: Any, bar: Any
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Mean over the batches of the sum of squared gradients: of each module, and of low-rank updates of Linears."""
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
        return float(sums.get(parameter, 0)) / len(loader)  # blocks that the output does not depend on have none

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
    """Of a weight's squared gradient, what its low-rank update has at its start, expected over the draw of `lora_A`.

    The gradient G of the weight gives `lora_B` the gradient `scaling * G A^T` and `lora_A` none, as `lora_B` is zero.
    Numbers of A are uniform within +- in^-0.5 (PEFT's draw), so that E |G A^T|^2 = r / (3 in) |G|^2.
    """
    config = BSRConfig(trainable="lora")
    scaling = config.lora_alpha / config.r
    return scaling**2 * config.r / (3 * linear.in_features)


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    """The block keeps its inputs alone for backward, inside."""
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
