"""One row of the comparison: a folder with `training_params.json`, and `adapter_config.json` if PEFT attaches it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification

import peft_bsr
from peft_bsr.backbones import ModelSpec, probe_model

HERE = Path(__file__).parent
EXPERIMENTS = HERE / "experiments"
assert peft_bsr  # its import makes adapter_config.json with `"peft_type": "BSR"` readable


@dataclass(frozen=True)
class Experiment:
    """A method with its settings.

    Attributes:
        name: Folder below `experiments/`, such as `"lora/qv"`.
        params: Training parameters: the defaults, updated by its own file.
    """

    name: str
    params: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> Experiment:
        """Load `experiments/NAME`."""
        params = json.loads((HERE / "default_training_params.json").read_text())
        own = json.loads((EXPERIMENTS / name / "training_params.json").read_text())
        if unknown := set(own) - set(params):
            raise SystemExit(f"experiments/{name}/training_params.json: unknown {sorted(unknown)}, not {list(params)}")
        return cls(name, params | own)

    @classmethod
    def all(cls) -> list[Experiment]:
        """All experiments, sorted by name."""
        return [
            cls.load(str(p.parent.relative_to(EXPERIMENTS))) for p in sorted(EXPERIMENTS.rglob("training_params.json"))
        ]

    @classmethod
    def chosen(cls, names: list[str] | None) -> list[Experiment]:
        """Experiments of these names, or all but the candidates."""
        return [e for e in cls.all() if (e.name in names if names else not e.is_candidate)]

    @property
    def is_candidate(self) -> bool:
        """Whether it is in a folder `*_tried`, scored on the validation split only (see try.py)."""
        return self.name.split("/")[0].endswith("_tried")

    def adapter(self) -> PeftConfig | None:
        """The adapter's config, or None if there is no adapter."""
        folder = EXPERIMENTS / self.name
        return PeftConfig.from_pretrained(str(folder)) if (folder / "adapter_config.json").exists() else None

    def attach(self, base: nn.Module) -> nn.Module:
        """Attach the adapter to `base`, or set which of its parameters train."""
        adapter = self.adapter()
        if adapter is not None:
            return get_peft_model(base, adapter)
        trains = TRAINABLE[self.params["trainable"]]
        spec = probe_model(base)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(trains(base, spec, name))
        return base


def load_base(source: str, names: list[str]) -> nn.Module:
    """A pretrained model with a new head for these classes, initialized from torch's generator."""
    return AutoModelForImageClassification.from_pretrained(
        source,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )


def _is_behind_blocks(spec: ModelSpec, name: str) -> bool:
    return any(name.startswith(f"{module}.") for module in spec.head)


def _is_classifier(model: nn.Module, spec: ModelSpec, name: str) -> bool:
    return _is_behind_blocks(spec, name) and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)


def _is_last(count: int, spec: ModelSpec, name: str) -> bool:
    return _is_behind_blocks(spec, name) or any(name.startswith(f"{block}.") for block in spec.blocks[-count:])


# parameter name -> whether it trains without an adapter; the classifier always trains
TRAINABLE = {
    "all": lambda model, spec, name: True,
    "head": _is_classifier,
    "last:3": lambda model, spec, name: _is_last(3, spec, name),
    "biases": lambda model, spec, name: name.endswith("bias") or _is_classifier(model, spec, name),
}
