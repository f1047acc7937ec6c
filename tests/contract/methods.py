"""The methods in the tests of PEFT's behaviour, and the names and parameters expected of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_bsr import ALaSTConfig, BSRConfig, LoSAConfig, SynQTConfig

LINEARS = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {"mlp.fc1", "mlp.fc2"}
NORMS = {"layernorm_before", "layernorm_after"}
MIXER = {"norm", "channel_down", "channel_up", "token_down", "token_up"}
RANK = 4


@dataclass(frozen=True)
class Method:
    """One method on a ViT of four blocks, with random adapter weights so that its outputs differ from the base model's.

    Attributes:
        config_class: Class of its configuration.
        defaults: Values in the configurations of the tests.
        blocks: Indices of the blocks that it changes.
        other: Values in the configuration of a second adapter.
    """

    config_class: type[PeftConfig]
    defaults: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[int, ...] = (1, 3)
    other: dict[str, Any] = field(default_factory=lambda: {"trainable_blocks": [2]})

    @property
    def is_synqt(self) -> bool:
        return self.config_class is SynQTConfig

    @property
    def is_losa(self) -> bool:
        return self.config_class is LoSAConfig

    @property
    def merges(self) -> bool:
        """Whether it trains weights of the blocks, which can be merged, instead of a side network."""
        return not (self.is_synqt or self.is_losa)

    @property
    def is_alast(self) -> bool:
        return self.config_class is ALaSTConfig

    @property
    def is_lora(self) -> bool:
        return self.defaults.get("trainable") == "lora"

    @property
    def in_blocks(self) -> set[str]:
        """Names of the modules in a block that train."""
        return set() if self.is_losa else LINEARS if self.is_lora else LINEARS | NORMS

    @property
    def reduces(self) -> bool:
        """Whether it reduces tokens in evaluation mode."""
        return not self.is_alast and self.defaults.get("keep_rate", 1.0) < 1

    @property
    def peft_type(self) -> str:
        return str(self.config_class().peft_type.value)

    @property
    def container(self) -> str:
        """Name of the container of the adapters' parameters on a layer."""
        return "synqt_params" if self.is_synqt else "bsr_params"

    def config(self, **settings: Any) -> PeftConfig:
        away = {} if self.is_synqt else {"init_weights": False}
        return self.config_class(**{**self.defaults, **away, **settings})

    def start_config(self, **settings: Any) -> PeftConfig:
        """A configuration whose adapter starts equal to the base model, if the method supports it."""
        return self.config(**({} if self.is_synqt else {"init_weights": True}), **settings)

    def attach(self, base: nn.Module, name: str = "default", **settings: Any) -> PeftModel:
        """`base` with an adapter of the method, in evaluation mode."""
        model = get_peft_model(base, self.config(**settings), adapter_name=name)
        return self.stir(model) if self.is_synqt else model.eval()

    def stir(self, model: nn.Module) -> Any:
        """Add noise to each adapter parameter, because SynQT's adapters start as the identity."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.container in name and not parameter.is_meta:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.eval()

    def assert_same(self, found: Tensor, expected: Tensor) -> None:
        """Assert bit equality. SynQT: to 1e-6, as torch's order of operations depends on `requires_grad`."""
        if self.is_synqt:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(found, expected)

    def expected_keys(self, model: PeftModel, name: str = "default") -> set[str]:
        """Keys in the file of an adapter on `blocks`."""
        if self.is_synqt:
            names = (key for key, _ in model.named_parameters() if f".synqt_params.{name}." in key)
            return {key.replace(f".synqt_params.{name}.", ".synqt_params.") for key in names}
        in_blocks = self.in_blocks
        param_modules = {f"vit.layers.{block}.{leaf}" for block in self.blocks for leaf in in_blocks}
        parameters = ("lora_A", "lora_B") if self.is_lora else ("weight", "bias")
        keys = {f"{leaf}.bsr_params.{p}" for leaf in param_modules for p in parameters}
        keys |= {f"{leaf}.bsr_params.{p}" for leaf in ("vit.layernorm", "classifier") for p in ("weight", "bias")}
        keys |= {"vit.layers.0.token_router.bsr_state"} if self.is_alast else set()
        for block in self.blocks if self.is_losa else ():
            keys |= {f"vit.layers.{block}.token_router.bsr_params.{m}.{p}" for m in MIXER for p in ("weight", "bias")}
        return {f"base_model.model.{key}" for key in keys}

    def num_trained(self, base: nn.Module) -> int:
        """Number of trainable parameters, computed from the base model; not for SynQT."""
        total = sum(
            p.numel() for leaf in ("vit.layernorm", "classifier") for p in base.get_submodule(leaf).parameters()
        )
        for block in self.blocks:
            if self.is_losa:  # width 32, 17 tokens
                total += 2 * 32 + 2 * 32 * RANK + RANK + 32 + 2 * 17 * RANK + RANK + 17
            for leaf in self.in_blocks:
                module: Any = base.get_submodule(f"vit.layers.{block}.{leaf}")
                whole = sum(p.numel() for p in module.parameters())
                total += RANK * (module.in_features + module.out_features) if self.is_lora else whole
        return total


def _bsr(**settings: Any) -> Method:
    return Method(BSRConfig, {"trainable_blocks": [1, 3], "r": RANK, **settings})


def _synqt(**settings: Any) -> Method:
    defaults = {"num_queries": 2, "bottleneck": 4, "attention_bottleneck": 2, "layers": [0, 2, 3], **settings}
    return Method(SynQTConfig, defaults, (0, 2, 3), {"layers": [1]})


METHODS: dict[str, Method] = {
    "bsr_full": _bsr(keep_rate=1.0),
    "bsr_full_reduced": _bsr(keep_rate=0.5),
    "bsr_lora": _bsr(trainable="lora", keep_rate=1.0),
    "bsr_lora_reduced": _bsr(trainable="lora", keep_rate=0.5),
    "alast": Method(ALaSTConfig, {"trainable_blocks_per_step": 2}, (0, 1, 2, 3), {"initial_budget": 0.7}),
    "synqt": _synqt(keep_rate=1.0),
    "synqt_reduced": _synqt(keep_rate=0.5),
    "losa": Method(LoSAConfig, {"layers": [1, 3], "r": RANK, "token_r": RANK}, other={"layers": [2]}),
}
