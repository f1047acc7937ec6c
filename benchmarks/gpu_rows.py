"""The rows of `gpu.py`, the most important first: a model, a method, and how it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, SynQTConfig

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_TINY = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 192}
MODELS: dict[str, dict[str, dict[str, int]]] = {  # size -> model -> fields of its config
    "full": {
        "ViT-B/16": _BASE | {"image_size": 224, "patch_size": 16},
        "ViT-B/16 at 512 px": _BASE | {"image_size": 512, "patch_size": 16},
        "ViT-L/16": _LARGE | {"image_size": 224, "patch_size": 16},
    },
    "tiny": {
        "ViT-B/16": _TINY | {"image_size": 32, "patch_size": 8},
        "ViT-B/16 at 512 px": _TINY | {"image_size": 64, "patch_size": 8},
        "ViT-L/16": _TINY | {"num_hidden_layers": 16, "image_size": 32, "patch_size": 8},
    },
}
MOST_IMAGES = {"full": 2**20, "tiny": 4}  # largest batch of a row
LEVELS: dict[str, dict[str, str]] = {
    "off": {"lean": "off"},
    "exact": {"lean": "exact"},
    "max": {"lean": "max"},
    "exact int8": {"lean": "exact", "saved_activations": "int8"},
    "max int8": {"lean": "max", "saved_activations": "int8"},
}
EVERY = {"trainable_blocks": "every:1", "keep_rate": 1.0}
LAST_BLOCKS = {"linear probe": 0, "last 3 blocks": 3}  # number of blocks that train, besides the head


def _lora(targets: str | list[str], **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=targets, modules_to_save=["classifier"], **settings)


def _velora() -> LoraConfig:
    from peft import VeloraConfig  # needs peft 0.21; otherwise the row fails with the reason

    return _lora("all-linear", velora_config=VeloraConfig())


# name -> function (depth of the model, settings of our configs) -> config
METHODS: dict[str, Callable[..., PeftConfig | None]] = {
    "full fine-tuning": lambda depth: None,
    **{name: lambda depth: None for name in LAST_BLOCKS},
    "LoRA q v": lambda depth: _lora(["q_proj", "v_proj"]),
    "LoRA every Linear": lambda depth: _lora("all-linear"),
    "VeLoRA every Linear": lambda depth: _velora(),
    "BSR": lambda depth, **lean: BSRConfig(**lean),
    "BSR {5,8,11} keep .7": lambda depth, **lean: BSRConfig(trainable_blocks=[5, 8, 11], keep_rate=0.7, **lean),
    "BSR last 3, halved": lambda depth, **lean: BSRConfig(
        trainable_blocks="last:3", reduction_blocks=[2 * depth // 3], keep_rate=0.5, **lean
    ),
    "BSR every block, all tokens": lambda depth, **lean: BSRConfig(**EVERY, **lean),
    "BSR low-rank, every block": lambda depth, **lean: BSRConfig(trainable="lora", **EVERY, **lean),
    "ALaST": lambda depth, **lean: ALaSTConfig(**lean),
    "SynQT": lambda depth, **lean: SynQTConfig(**lean),
}
BUDGETS = {"compiled, budget .5": 0.5, "compiled, budget .2": 0.2}  # torch's activation_memory_budget
MODES = ("eager", "checkpointing", "offloaded checkpointing", "compiled", *BUDGETS)


@dataclass(frozen=True)
class Row:
    """What is measured, and how.

    Attributes:
        method: Key of `METHODS`.
        lean: Key of `LEVELS`; `""` if the method has none, or for its default.
        mode: One of `MODES`.
        batch: Images per step; None = as many as fit.
        model: Key of `MODELS`.
        optimizer: `"fused"` or `"8-bit"`, both AdamW.
        frozen_weights: As in `BSRConfig`.
    """

    method: str
    lean: str = ""
    mode: str = "eager"
    batch: int | None = 128
    model: str = "ViT-B/16"
    optimizer: str = "fused"
    frozen_weights: str = "full"

    @property
    def label(self) -> str:
        """Description without the model."""
        frozen = "" if self.frozen_weights == "full" else f"frozen in {self.frozen_weights}"
        mode = "" if self.mode == "eager" else self.mode
        optimizer = "" if self.optimizer == "fused" else f"{self.optimizer} AdamW"
        batch = "largest batch" if self.batch is None else f"batch {self.batch}"
        return ", ".join(filter(None, (self.method, self.lean, frozen, mode, optimizer, batch)))

    @property
    def name(self) -> str:
        """Unique name: model and label."""
        return f"{self.model}: {self.label}"

    @property
    def compiles(self) -> bool:
        """Whether it runs compiled."""
        return self.mode.startswith("compiled")

    @property
    def seconds(self) -> float:
        """Estimated time on a datacentre card: process, model, adapter, warm-up, about 25 steps."""
        large = 2.0 if self.model == "ViT-L/16" else 1.0
        steps = 3 * large * (2 if "512" in self.model else 1)
        compiling = 35 * large if self.compiles else 0
        return 4 + steps + compiling + 10 * (self.optimizer == "8-bit") + 12 * large * (self.batch is None)

    def config(self, sizes: Mapping[str, int]) -> PeftConfig | None:
        """Config for `get_peft_model`; None without an adapter."""
        settings = dict(LEVELS.get(self.lean, {}))
        if self.frozen_weights != "full":
            settings["frozen_weights"] = self.frozen_weights
        return METHODS[self.method](sizes["num_hidden_layers"], **settings)

    def base(self, sizes: Mapping[str, int], device: str) -> nn.Module:
        """The model with random weights; weights that the method does not train are frozen."""
        settings = ViTConfig(**sizes, num_labels=100)
        settings.problem_type = "single_label_classification"  # otherwise step 1 sets it, and step 2 recompiles
        with torch.device(device):
            model = ViTForImageClassification(settings)
        last = LAST_BLOCKS.get(self.method)
        if last is not None:
            model.requires_grad_(False)
            blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
            # the final norm trains too, except in a linear probe
            for part in (model.classifier, *([*blocks[len(blocks) - last :], model.vit.layernorm] if last else [])):
                part.requires_grad_(True)
        return model


_BAR_ROWS = (
    Row("full fine-tuning"),
    Row("BSR", "exact"),
    Row("BSR", "exact", "compiled"),
    Row("full fine-tuning", mode="compiled, budget .2"),
    Row("BSR every block, all tokens", "max", "compiled"),
    Row("BSR", "exact int8"),
    Row("ALaST"),
    Row("LoRA every Linear", mode="compiled"),
    Row("BSR low-rank, every block", "exact", "compiled"),
    Row("SynQT", mode="compiled"),
    Row("BSR", "max"),
    Row("BSR", "max int8"),
)
_EAGER_ROWS = (
    Row("full fine-tuning", mode="checkpointing"),
    Row("full fine-tuning", mode="offloaded checkpointing"),
    Row("linear probe"),
    Row("last 3 blocks"),
    Row("LoRA q v"),
    Row("LoRA every Linear"),
    Row("LoRA every Linear", mode="checkpointing"),
    Row("VeLoRA every Linear"),
    Row("BSR", "off"),
    Row("BSR", "exact", frozen_weights="bfloat16"),
    Row("BSR", "max", frozen_weights="bfloat16"),
    Row("BSR", "off", "checkpointing"),
    Row("BSR {5,8,11} keep .7", "exact"),
    Row("BSR last 3, halved", "exact"),
    Row("BSR last 3, halved", "max"),
    *(Row("BSR every block, all tokens", level) for level in ("off", "exact", "max", "max int8")),
    *(Row("BSR low-rank, every block", level) for level in ("off", "exact", "max", "max int8")),
    Row("SynQT"),
    Row("SynQT", frozen_weights="bfloat16"),
    Row("full fine-tuning", optimizer="8-bit"),
    Row("BSR", "exact", optimizer="8-bit"),
    *(Row("full fine-tuning", mode=mode, batch=None) for mode in ("eager", "checkpointing")),
    Row("LoRA every Linear", batch=None),
    *(Row("BSR", level, batch=None) for level in ("exact", "max", "max int8")),
    Row("BSR every block, all tokens", "max", batch=None),
    *(Row(method, batch=8) for method in ("full fine-tuning", "LoRA every Linear", "ALaST", "SynQT")),
    *(Row("BSR", level, batch=8) for level in ("off", "exact", "max")),
)
_LARGE_ROWS = tuple(
    Row(method, lean, mode, batch=64, model="ViT-L/16")
    for method, lean, mode in (
        ("full fine-tuning", "", "eager"),
        ("full fine-tuning", "", "checkpointing"),
        ("LoRA every Linear", "", "eager"),
        ("LoRA every Linear", "", "checkpointing"),
        ("BSR", "exact", "eager"),
        ("BSR", "max", "eager"),
        ("BSR last 3, halved", "exact", "eager"),
        ("BSR every block, all tokens", "max", "eager"),
        ("BSR low-rank, every block", "exact", "eager"),
        ("BSR low-rank, every block", "max", "eager"),
        ("ALaST", "", "eager"),
        ("SynQT", "", "eager"),
    )
)
_FINE_ROWS = tuple(
    Row(method, lean, mode, batch=32, model="ViT-B/16 at 512 px")
    for method, lean, mode in (
        ("full fine-tuning", "", "eager"),
        ("full fine-tuning", "", "checkpointing"),
        ("full fine-tuning", "", "offloaded checkpointing"),
        ("LoRA every Linear", "", "eager"),
        ("BSR", "exact", "eager"),
        ("BSR", "max", "eager"),
        ("BSR every block, all tokens", "max", "eager"),
        ("BSR low-rank, every block", "exact", "eager"),
        ("ALaST", "", "eager"),
        ("SynQT", "", "eager"),
    )
)
_COMPILED_ROWS = (
    Row("full fine-tuning", mode="compiled"),
    Row("full fine-tuning", mode="compiled, budget .5"),
    Row("BSR", "max", "compiled"),
    Row("BSR", "off", "compiled"),
    Row("BSR", "exact", "compiled", frozen_weights="bfloat16"),
    Row("BSR last 3, halved", "exact", "compiled"),
    Row("BSR every block, all tokens", "exact", "compiled"),
    Row("LoRA every Linear", mode="compiled, budget .5"),
    Row("LoRA every Linear", mode="compiled, budget .2"),
    Row("BSR low-rank, every block", "max", "compiled"),
    Row("BSR", "exact", "compiled, budget .5"),
    Row("BSR", "off", "compiled, budget .2"),
    Row("ALaST", mode="compiled"),
    Row("linear probe", mode="compiled"),
    Row("LoRA q v", mode="compiled"),
    Row("last 3 blocks", mode="compiled"),
    Row("BSR {5,8,11} keep .7", "exact", "compiled"),
    Row("VeLoRA every Linear", mode="compiled"),
    Row("full fine-tuning", mode="compiled", batch=8),
    Row("BSR", "exact", "compiled", batch=8),
    Row("full fine-tuning", mode="compiled, budget .2", batch=32, model="ViT-B/16 at 512 px"),
    Row("BSR", "exact", "compiled", batch=32, model="ViT-B/16 at 512 px"),
    Row("full fine-tuning", mode="compiled", batch=64, model="ViT-L/16"),
    Row("full fine-tuning", mode="compiled, budget .2", batch=64, model="ViT-L/16"),
    Row("BSR", "exact", "compiled", batch=64, model="ViT-L/16"),
    Row("BSR every block, all tokens", "max", "compiled", batch=64, model="ViT-L/16"),
)
ROWS = (*_BAR_ROWS, *_EAGER_ROWS, *_LARGE_ROWS, *_FINE_ROWS, *_COMPILED_ROWS)
