"""The tuner of LoSA."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import CONTROLLER, Plan
from peft_bsr.errors import AdapterError
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.reading import ReadingTuner
from peft_bsr.tuners.base.resolution import Resolution
from peft_bsr.tuners.blocks.config import BlockConfig
from peft_bsr.tuners.blocks.targets import Way
from peft_bsr.tuners.blocks.tuner import BlockTuner
from peft_bsr.tuners.losa.layer import LoSAController


class LoSAModel(ReadingTuner, BlockTuner):
    """LoSA on a vision transformer; made by `get_peft_model(model, LoSAConfig())`.

    All checks (probe of the model, its plan) run before the model is changed.

    Args:
        model: A supported vision transformer, see `peft_bsr.probe_model`.
        config: The configuration.
        adapter_name: Name of the adapter, default `"default"`.

    Raises:
        UnsupportedModelError: If the model is not supported; the message gives the reason.
        ConfigError: If the model does not allow the configuration; the message names every problem.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_bsr import LoSAConfig
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), LoSAConfig(layers="every:2"))
        >>> model.base_model.layers()
        [1, 3]
    """

    controller_cls = LoSAController

    @classmethod
    def _other_targets(cls, model: nn.Module, spec: ModelSpec, config: BlockConfig, plan: Plan) -> dict[str, Way]:
        """The mixers, in the blocks' controllers."""
        return {f"{spec.blocks[index]}.{CONTROLLER}": "mixer" for index in config.read_layers(spec)}

    def _assign(self, model: nn.Module, adapter_name: str, given: SavedConfig, found: Resolution) -> None:
        for controller in self._attached_controllers(model, found.spec):
            controller.layers[adapter_name] = self.peft_config[adapter_name].read_layers(found.spec)
        super()._assign(model, adapter_name, given, found)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> NoReturn:
        raise AdapterError(
            "LoSA cannot be merged: its mixers compute in addition to the backbone and do not change its weights. Keep "
            "the adapter to use it, or call `unload()` for the base model."
        )


__all__ = ["LoSAModel"]
