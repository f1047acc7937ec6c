"""Description of models: the only package that knows model families. `probe_model(model)` returns a `ModelSpec`."""

from peft_bsr.backbones.add_head import with_head
from peft_bsr.backbones.block_spec import apply_part
from peft_bsr.backbones.fingerprint import Fingerprint, weights_digest
from peft_bsr.backbones.headed_model import BackboneForImageClassification, BackboneWithHeadConfig
from peft_bsr.backbones.image_size import native_size, resized_tables, set_image_size
from peft_bsr.backbones.inputs import (
    StockRun,
    default_state,
    hidden_first,
    in_mode,
    input_shapes,
    main_input,
    probe_inputs,
    quiet,
    relative_error,
    run_probe,
    run_stock,
    seed,
    tensors_of,
    tolerance,
)
from peft_bsr.backbones.model_spec import BlockSpec, ModelSpec, ScoreSource, StageBlock
from peft_bsr.backbones.part import VisionPart, find_part, view_of
from peft_bsr.backbones.permutation import excess, no_zero_tables
from peft_bsr.backbones.pooling import takes_head
from peft_bsr.backbones.probe import probe, probe_model
from peft_bsr.backbones.registry import FamilyRule, find_rule, inner_config, register_family, unregister_family
from peft_bsr.backbones.scoring import (
    AttentionScorer,
    ScoringConfig,
    SdpaObserver,
    attend,
    computes_weights,
    explicit_attention,
    first_rows,
    observed_interface,
    run_scored,
)
from peft_bsr.backbones.side_inputs import SideInputHooks, input_names
from peft_bsr.backbones.stages import frozen_parameters
from peft_bsr.deprecation import renamed

__getattr__ = renamed(__name__, {"Column": "ModelSpec", "probe_column": "probe_model"}, globals())

__all__ = [
    "AttentionScorer",
    "BackboneForImageClassification",
    "BackboneWithHeadConfig",
    "BlockSpec",
    "FamilyRule",
    "Fingerprint",
    "ModelSpec",
    "ScoreSource",
    "ScoringConfig",
    "SdpaObserver",
    "SideInputHooks",
    "StageBlock",
    "StockRun",
    "VisionPart",
    "apply_part",
    "attend",
    "computes_weights",
    "default_state",
    "excess",
    "explicit_attention",
    "find_part",
    "find_rule",
    "first_rows",
    "frozen_parameters",
    "hidden_first",
    "in_mode",
    "inner_config",
    "input_names",
    "input_shapes",
    "main_input",
    "native_size",
    "no_zero_tables",
    "observed_interface",
    "probe",
    "probe_inputs",
    "probe_model",
    "quiet",
    "register_family",
    "relative_error",
    "resized_tables",
    "run_probe",
    "run_scored",
    "run_stock",
    "seed",
    "set_image_size",
    "takes_head",
    "tensors_of",
    "tolerance",
    "unregister_family",
    "view_of",
    "weights_digest",
    "with_head",
]
